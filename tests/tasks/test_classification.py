"""Steps, views and metrics of the classification task, by hand-made logits."""

import pytest
import torch
from torch import nn

from vidtrain.tasks import base
from vidtrain.tasks.classification import Classification
from vidtrain.types import UserError


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


class Steps(Lookup):
    """Answers once per channel: `(B, S, 1, 1, K) -> (B, S, K)`."""

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(video))
        return video[:, :, 0, 0, : self.num_classes]


class Best(Steps):
    """... and is as sure as its surest answer."""

    def fuse(self, scores: torch.Tensor) -> torch.Tensor:
        assert scores.ndim == 3
        return scores.amax(1)


ANSWERS = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3  # (B, V, S, K)


def answering(net=Steps, **settings) -> Classification:
    task = Classification(5, **settings)
    task.model = net(5)
    return task.eval()


@pytest.mark.parametrize("per_forward", [None, 2])
def test_each_of_many_answers_has_its_loss_and_their_scores_are_averaged(per_forward):
    task, label = answering(), torch.tensor([0, 3])
    task.views_per_forward = per_forward
    output = task.step({"video": ANSWERS[:, :, :, None, None], "label": label})
    by_hand = -torch.stack([ANSWERS.log_softmax(-1)[b, ..., k] for b, k in enumerate(label)])
    torch.testing.assert_close(output.loss, by_hand.mean())
    torch.testing.assert_close(output.scores, ANSWERS.softmax(-1).mean((1, 2)))
    torch.testing.assert_close(output.clip_scores, ANSWERS.softmax(-1).mean(2))
    torch.testing.assert_close(task.probabilities(ANSWERS), output.scores)


def test_a_network_that_fuses_its_answers_is_given_the_mean_over_views():
    task = answering(Best)
    batch = {"video": ANSWERS[:, :, :, None, None], "label": torch.tensor([0, 3])}
    output = task.step(batch)
    scores = ANSWERS.softmax(-1)
    torch.testing.assert_close(output.scores, scores.mean(1).amax(1))
    torch.testing.assert_close(output.clip_scores, scores.amax(2))
    torch.testing.assert_close(task.probabilities(ANSWERS), output.scores)
    assert not torch.allclose(output.scores, scores.amax(2).mean(1))  # the other way round
    torch.testing.assert_close(output.loss, answering().step(batch).loss)


def test_many_answers_and_many_labels():
    task = answering(multi_label=True)
    target = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    output = task.step({"video": ANSWERS[:, :, :, None, None], "label": target})
    p, t = ANSWERS.sigmoid(), target[:, None, None].expand_as(ANSWERS)
    torch.testing.assert_close(output.scores, p.mean((1, 2)))
    by_hand = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss, by_hand)


class Sum(Lookup):
    inputs = ("video", "flow")

    def forward(self, video, flow):
        return super().forward(video) + 10 * super().forward(flow)


@pytest.mark.parametrize("per_forward", [None, 1])
def test_a_network_gets_its_inputs_in_its_own_order(per_forward):
    task = Classification(3)
    task.model, task.views_per_forward = Sum(3), per_forward
    flow = torch.tensor(LOGITS).flip(2)
    batch = {"flow": video(flow.tolist()), "video": video(LOGITS), "label": torch.tensor([0, 1])}
    expected = torch.tensor(LOGITS) + 10 * flow
    torch.testing.assert_close(task.eval().logits(batch), expected)


def test_a_batch_without_pictures_is_scored():
    task = make()
    task.model.inputs = ("flow",)
    batch = {"flow": video(LOGITS), "label": torch.tensor([0, 1]), "index": torch.tensor([0, 1])}
    output = task.test_step(batch, 0)
    torch.testing.assert_close(output["scores"], torch.tensor(LOGITS).softmax(-1).mean(1))
    assert task.test_metrics.compute()["test/top1"].item() == 1.0


class Lazy:
    """Views of a batch that are made when they are asked for."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole, self.shape = whole, whole.shape

    def pieces(self, size):
        for views in self.whole:
            yield from views.split(size or 2)


@pytest.mark.parametrize("lazy", [("video", "flow"), ("flow",)])
def test_inputs_that_are_made_a_few_at_a_time_stay_together(lazy, monkeypatch):
    torch.manual_seed(0)
    batch = {key: torch.randn(2, 5, 3, 1, 1, 3) for key in ("video", "flow")}
    task = Classification(3)
    task.model = Sum(3)
    whole = task.eval().logits(batch)
    pieces = {key: Lazy(value) if key in lazy else value for key, value in batch.items()}
    for task.views_per_forward in (None, 2):
        task.model.calls.clear()
        assert torch.equal(task.logits(pieces), whole)
    assert max(task.model.calls) == 2  # never more than asked for
    monkeypatch.setattr(base, "PIECE", 4 * (9 + 9) * 3)  # room for three views of both
    task.views_per_forward = None
    task.model.calls.clear()
    assert torch.equal(task.logits(pieces), whole)
    assert max(task.model.calls) == 3


def test_what_the_data_lack_is_named():
    task = Classification(3)
    task.model = Sum(3)
    with pytest.raises(UserError, match=r"takes video and flow; for flow add data\.flow=farneback"):
        task.logits({"video": video(LOGITS)})


def test_class_weights_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    each = -logits.log_softmax(1)[range(3), labels]
    task = make(2, class_weights=[3.0, 1.0]).train()
    batch = {"video": video([[row] for row in logits.tolist()]), "label": labels}
    expected = (3 * each[0] + each[1] + each[2]) / 5
    torch.testing.assert_close(task.step(batch).loss, expected)
    soft = nn.functional.one_hot(labels, 2).float()  # as Mixup gives them
    torch.testing.assert_close(task.step({**batch, "label": soft}).loss, expected)
    torch.testing.assert_close(task.eval().step(batch).loss, each.mean())
    for wrong in ("rare", [1.0], [1.0, -1.0], [1.0, True]):
        with pytest.raises(UserError, match=r"task\.class_weights is"):
            make(2, class_weights=wrong)


def test_balanced_classes_in_a_run(vidtrain, tiny_dataset, tmp_path, monkeypatch):
    """Classes of 2, 8 and 8 videos: weights 3, 0.75 and 0.75; as many of each where they are drawn."""
    import shutil

    root = tmp_path / "rare"
    shutil.copytree(tiny_dataset, root)
    for video in sorted((root / "train" / "apple").iterdir())[2:]:
        video.unlink()
    seen: dict[str, list] = {"labels": [], "weights": []}
    step = Classification.step

    def noted(self, batch):
        if self.training:
            seen["labels"] += batch["label"].tolist()
            seen["weights"].append(
                None if self.class_weight is None else self.class_weight.tolist()
            )
        return step(self, batch)

    monkeypatch.setattr(Classification, "step", noted)
    words = [
        "train", "model=toy_3d_cnn", "clip.size=16", "clip.num_frames=4", "data=folder",
        f"data.root={root}", "data.workers=0", "data.batch_size=6", "trainer=cpu", "logger=none",
        "trainer.max_epochs=10",
    ]  # fmt: skip
    assert vidtrain(*words, "task.class_weights=balanced", "trainer.max_epochs=1").code == 0
    assert seen["weights"][0] == pytest.approx([3.0, 0.75, 0.75]) and seen["labels"].count(0) == 2
    seen["labels"].clear()
    done = vidtrain(*words, "data.balance=1", "trainer.limit_val_batches=0")
    assert done.code == 0, done.err
    assert len(seen["labels"]) == 180 and 40 < seen["labels"].count(0) < 80
    wrong = vidtrain(*words, "data.balance=2")
    assert wrong.code == 2 and "data.balance is 2" in wrong.err
