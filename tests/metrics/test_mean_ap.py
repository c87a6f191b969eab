import pytest
import torch
from torchmetrics.functional.classification import multilabel_average_precision

from vidtrain.metrics.mean_ap import MeanAveragePrecision, average_precision


def test_average_precision_by_hand():
    target = torch.tensor([True, False, True, False])
    assert average_precision(torch.tensor([0.9, 0.8, 0.7, 0.1]), target).item() == pytest.approx(
        (1 + 2 / 3) / 2
    )
    assert average_precision(torch.tensor([0.9, 0.1, 0.8, 0.2]), target).item() == 1.0
    assert average_precision(torch.tensor([0.5, 0.5, 0.5, 0.5]), target).item() == 0.5  # chance
    assert average_precision(torch.rand(4), torch.zeros(4, dtype=torch.bool)).isnan()


def test_it_agrees_with_torchmetrics_where_every_class_occurs():
    torch.manual_seed(0)
    scores = torch.randint(0, 20, (60, 5)) / 20  # with ties
    target = torch.rand(60, 5) < 0.3
    metric = MeanAveragePrecision()
    metric.update(scores[:25], target[:25])
    metric.update(scores[25:], target[25:])
    theirs = multilabel_average_precision(scores, target.int(), 5, average="macro")
    torch.testing.assert_close(metric.compute(), theirs)


def test_a_class_that_no_video_has_does_not_count():
    metric = MeanAveragePrecision()
    metric.update(torch.tensor([[0.9, 0.4], [0.1, 0.3]]), torch.tensor([[1, 0], [0, 0]]))
    assert metric.compute().item() == 1.0
