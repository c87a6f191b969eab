"""Steps, views and metrics of the classification task, by hand-made logits."""

import pytest
import torch
from torch import nn

from vidtrain.tasks.classification import Classification


class Lookup(nn.Module):
    """A network whose logits are the clip's first pixels, so that a test can write them."""

    inputs = ("video",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.calls = num_classes, []

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(video))
        return video[:, 0, 0, 0, : self.num_classes]


def video(logits) -> torch.Tensor:
    """(B, V, K) logits -> (B, V, C, T, H, W) video that Lookup reads them from."""
    return torch.tensor(logits, dtype=torch.float32)[:, :, None, None, None, :]


def make(num_classes=3, **settings) -> Classification:
    task = Classification(num_classes, **settings)
    task.model = Lookup(num_classes)
    return task.eval()


LOGITS = [[[4.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]]  # B=2, V=2


def test_scores_are_the_mean_of_the_views_softmax_not_of_their_logits():
    output = make().step({"video": video(LOGITS), "label": torch.tensor([0, 1])})
    views = torch.tensor(LOGITS).softmax(-1)
    torch.testing.assert_close(output.clip_scores, views)
    torch.testing.assert_close(output.scores, views.mean(1))
    assert not torch.allclose(output.scores, torch.tensor(LOGITS).mean(1).softmax(-1))
    torch.testing.assert_close(output.scores.sum(-1), torch.ones(2))


def test_the_loss_is_the_mean_over_views():
    output = make().step({"video": video(LOGITS), "label": torch.tensor([0, 1])})
    log_p = torch.tensor(LOGITS).log_softmax(-1)
    by_hand = -(log_p[0, :, 0].sum() + log_p[1, :, 1].sum()) / 4
    torch.testing.assert_close(output.loss, by_hand)


def test_smoothing_counts_in_training_alone():
    batch = {"video": video(LOGITS), "label": torch.tensor([0, 1])}
    plain, smooth = make(), make(label_smoothing=0.3)
    torch.testing.assert_close(smooth.step(batch).loss, plain.step(batch).loss)
    assert not torch.allclose(smooth.train().step(batch).loss, plain.train().step(batch).loss)


def test_views_can_go_through_in_pieces():
    batch = {"video": video(LOGITS), "label": torch.tensor([0, 1])}
    whole, pieces = make(), make()
    pieces.views_per_forward = 3
    torch.testing.assert_close(pieces.step(batch).scores, whole.step(batch).scores)
    assert whole.model.calls == [4] and pieces.model.calls == [3, 1]


def test_many_labels_are_scored_one_by_one():
    task = make(multi_label=True)
    target = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    output = task.step({"video": video(LOGITS), "label": target})
    torch.testing.assert_close(output.scores, torch.tensor(LOGITS).sigmoid().mean(1))
    p = torch.tensor(LOGITS).sigmoid()
    t = target[:, None].expand_as(p)
    by_hand = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss, by_hand)


def test_metrics_by_hand():
    task = make(num_classes=6)
    scores = torch.eye(6)[[0, 1, 2, 2]]  # four videos, said to be 0, 1, 2, 2
    task.test_metrics.update(scores, torch.tensor([0, 1, 2, 3]))
    values = task.test_metrics.compute()
    assert values["test/top1"].item() == 0.75  # micro: three of four
    assert values["test/mean_class"].item() == pytest.approx(0.75)  # 1, 1, 1, 0


def test_a_batch_of_failures_changes_nothing():
    task = make()
    assert task.test_step({"failures": ["..."], "index": torch.tensor([])}, 0) == {}
    assert not any(metric.update_called for metric in task.test_metrics.values())
