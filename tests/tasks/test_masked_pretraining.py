"""The task of masked pretraining, by a network that answers what a test tells it."""

import pytest
import torch
from torch import nn

from vidtrain.metrics.mean_score import MeanScore
from vidtrain.models.videomae_pretrain import videomae_base_pretrain
from vidtrain.tasks.masked_pretraining import MaskedPretraining
from vidtrain.types import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
NARROW = dict(num_frames=4, size=32, patch=8, dim=24, depth=1, heads=2, mask_ratio=0.5)
NARROW |= dict(decoder_dim=12, decoder_depth=1, decoder_heads=2)


def make(**changes) -> MaskedPretraining:
    torch.manual_seed(0)
    task = MaskedPretraining(MEAN, STD)
    task.model = videomae_base_pretrain(**NARROW | changes)
    return task.eval()


def batch_of(count: int, views: int = 1, seed: int = 3) -> dict:
    torch.manual_seed(1)
    video = torch.randn(count, views, 3, 4, 32, 32)
    return {"video": video, "index": torch.arange(10, 10 + count), "seed": seed}


def test_a_network_that_answers_zero_scores_the_variance_of_what_is_hidden():
    task = make()
    nn.init.zeros_(task.model.decoder.head.weight)
    nn.init.zeros_(task.model.decoder.head.bias)
    output = task.step(batch_of(3, views=2))
    # Boxes have an unbiased variance of 1 over 2 x 8 x 8 pixels, so the mean square is 127 / 128.
    torch.testing.assert_close(output.loss, torch.tensor(127 / 128), rtol=1e-4, atol=0)
    torch.testing.assert_close(output.scores, torch.full((3, 1), 127 / 128), rtol=1e-4, atol=0)


def test_targets_are_pixels_as_they_were_before_normalisation():
    """By hand, of one clip: the loss against a network that answers 1 everywhere."""
    task, batch = make(), batch_of(1)
    nn.init.zeros_(task.model.decoder.head.weight)
    nn.init.ones_(task.model.decoder.head.bias)
    mask = task._draw(batch, 1, 1, (4, 32, 32))
    std, mean = (torch.tensor(v).view(3, 1, 1, 1) for v in (STD, MEAN))
    video = batch["video"][0, 0] * std + mean
    squares = []
    for number in mask.predicted[0].tolist():
        slot, row, column = number // 16, number // 4 % 4, number % 4
        box = video[:, 2 * slot :, 8 * row :, 8 * column :][:, :2, :8, :8].flatten(1)
        normal = (box - box.mean(1, keepdim=True)) / (box.std(1, keepdim=True) + 1e-6)
        squares.append((normal - 1).square().mean())
    torch.testing.assert_close(task.step(batch).loss, torch.stack(squares).mean())


def test_a_videos_mask_in_a_test_does_not_hang_on_its_batch():
    task, batch = make(), batch_of(4, views=2)
    together = task.step(batch).clip_scores
    for place in range(4):
        alone = {key: value[place : place + 1] for key, value in batch.items() if key != "seed"}
        scores = task.step({**alone, "seed": 99}).clip_scores
        torch.testing.assert_close(scores[0], together[place])
    assert together[0, 0] != together[0, 1]


def test_views_a_few_at_a_time_score_the_same():
    task, batch = make(), batch_of(3, views=4)
    whole = task.step(batch).clip_scores
    task.views_per_forward = 3
    torch.testing.assert_close(task.step(batch).clip_scores, whole)


def test_training_draws_from_the_batchs_seed():
    task = make().train()
    first, again, other = (task.step(batch_of(2, seed=s)).loss for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pictures_show_what_was_hidden_and_what_was_made_of_it():
    task, batch = make(), batch_of(2)
    task.to_show = (1,)
    task.step(batch)
    (shown,) = task.shown.values()
    std, mean = (torch.tensor(v).view(3, 1, 1, 1) for v in (STD, MEAN))
    original = (batch["video"][1, 0] * std + mean).clamp(0, 1)
    torch.testing.assert_close(shown.original, original)
    places = shown.masked[:, 0, ::8, ::8].eq(0.5).all(0)
    assert places.sum() == 8  # half of the 16 places
    seen = (~places).repeat_interleave(8, 0).repeat_interleave(8, 1)
    for picture in (shown.masked, shown.made, shown.means):
        torch.testing.assert_close(picture[:, :, seen], original[:, :, seen])
        assert not torch.allclose(picture[:, :, ~seen], original[:, :, ~seen], atol=0.1)
    box = original[:, :2, :8, :8] if places[0, 0] else None
    for row in range(4):
        for column in range(4):
            if places[row, column]:
                part = (slice(None), slice(0, 2), slice(8 * row, 8 * row + 8))
                part = (*part, slice(8 * column, 8 * column + 8))
                box = (batch["video"][1, 0] * std + mean)[part]
                level = box.flatten(1).mean(1).clamp(0, 1).view(3, 1, 1, 1)
                torch.testing.assert_close(shown.means[part], level.expand_as(box))


def test_a_perfect_answer_restores_the_clip():
    """A network that is told the answer: what is shown as made is then the original."""

    class Told(nn.Module):
        inputs = ("video",)

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return super().__getattr__("inner") if name == "inner" else getattr(self.inner, name)

        def forward(self, video, mask):
            std, mean = (torch.tensor(v).view(3, 1, 1, 1) for v in (STD, MEAN))
            boxes = self.inner.boxes(video * std + mean)
            numbers = mask.predicted[..., None, None].expand(-1, -1, *boxes.shape[2:])
            return self.inner.standardise(boxes.gather(1, numbers)).values

    task = make()
    task.model = Told(task.model)
    task.to_show = (0,)
    output = task.step(batch_of(1))
    assert output.loss < 1e-9
    torch.testing.assert_close(task.shown[0].made, task.shown[0].original, rtol=0, atol=1e-4)


def test_the_mean_of_videos_lies_on_every_device():
    """Apple's have no numbers of 64 bits."""
    metric = MeanScore()
    metric.update(torch.tensor([[1.0], [2.0]]), torch.arange(2))
    metric.update(torch.tensor([[6.0]], dtype=torch.bfloat16), torch.arange(1))
    assert metric.total.dtype == metric.compute().dtype == torch.float32
    assert metric.compute() == 3


def test_a_classifier_is_refused():
    task = make()
    task.model = nn.Conv3d(3, 1, 1)
    with pytest.raises(UserError, match=r"Conv3d is none; choose a model .* _pretrain"):
        task.check_model()


def test_nothing_is_asked_of_labels():
    assert not MaskedPretraining.uses_labels and MaskedPretraining.monitor == "val/loss"
