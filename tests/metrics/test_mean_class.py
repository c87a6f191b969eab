import pytest
import torch

from vidtrain.metrics.mean_class import MeanClassAccuracy


def test_mean_class_accuracy_by_hand():
    metric = MeanClassAccuracy(4)
    scores = torch.eye(4)[[0, 0, 1, 3, 2]]
    metric.update(scores[:3], torch.tensor([0, 0, 0]))  # two of three
    metric.update(scores[3:], torch.tensor([1, -1]))  # taken for 3, which has no video; unknown
    assert metric.compute().item() == pytest.approx((2 / 3 + 0) / 2)
