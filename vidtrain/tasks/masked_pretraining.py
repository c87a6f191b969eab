"""Masked pretraining: hidden parts of videos are predicted from what is left. No labels are needed.

Tong et al. "VideoMAE." NeurIPS 2022. https://arxiv.org/abs/2203.12602
Feichtenhofer et al. "Masked Autoencoders As Spatiotemporal Learners." NeurIPS 2022.
https://arxiv.org/abs/2205.09113
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from vidtrain.losses.reconstruction import masked_mse
from vidtrain.metrics.mean_score import MeanScore
from vidtrain.tasks.base import StepOutput, VideoTask, pieces
from vidtrain.types import UserError, Views, check_colours


class Reconstruction(NamedTuple):
    """A clip, what of it was hidden, and what was made of that: `(3, T, H, W)` each, 0 to 1."""

    original: Tensor
    masked: Tensor  # hidden boxes are grey
    made: Tensor  # hidden boxes predicted, in the mean and contrast that they had
    means: Tensor  # hidden boxes in the mean that they had: what the scale alone gives away


class MaskedPretraining(VideoTask):
    """The mean squared error of hidden boxes of pixels, each brought to mean 0 and deviation 1.

    1 is what predicting each box's mean scores; 0 would be perfect. What is hidden is drawn for each clip, in
    training from the batch's own seed, else from the video's number, so that a video has the same mask
    in every validation and test, whatever else is in its batch.

    Args:
        mean: of R, G and B, by which frames were normalised.
        std: likewise.

    Raises:
        UserError: one of them is not three numbers.
    """

    uses_labels = False
    monitor = "val/loss"
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # In validation the base logs the loss.
        self.val_metrics = MetricCollection({})
        for name, values in (("mean", mean), ("std", std)):
            check_colours(f"task.{name}", values)
            tensor = torch.tensor(list(values), dtype=torch.float32).view(3, 1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        self.shown: dict[int, Reconstruction] = {}  # of the batch under evaluation, by its place
        self.to_show: Sequence[int] = ()  # places of videos whose first view is to be kept

    def metrics(self) -> MetricCollection:
        """Make the metric of whole videos: the loss, mean over views."""
        return MetricCollection({"loss": MeanScore()})

    def check_model(self) -> None:
        """Refuse a network that is made for another task.

        Raises:
            UserError: it is no masked autoencoder.
        """
        if not hasattr(self.model, "draw"):
            raise UserError(
                "task=masked_pretraining needs a masked autoencoder, and"
                f" {type(self.model).__name__} is none; choose a model whose name ends in _pretrain"
            )

    def step(self, batch: dict[str, Any]) -> StepOutput:
        """Hide, predict, compare; the loss of a video is the mean over its views."""
        model: Any = self.model
        (video,) = self._inputs(batch)
        count, views = video.shape[:2]
        clip = tuple(video.shape[3:])
        masks = self._draw(batch, count, views, clip)
        dtype = next(model.parameters()).dtype
        self.shown = {}
        losses, first = [], 0
        for part in self._views(video):
            mask = _rows(masks, first, len(part)).to(part.device)
            predicted = model(part.to(dtype), mask)
            boxes = model.boxes(part.float() * self.std + self.mean)
            numbers = mask.predicted[..., None, None].expand(-1, -1, *boxes.shape[2:])
            target = model.standardise(boxes.gather(1, numbers))
            losses.append(masked_mse(predicted, target.values, mask.counted))
            for place in self.to_show:
                if not self.training and first <= place * views < first + len(part):
                    at = place * views - first
                    self.shown[place] = _reconstruct(
                        model,
                        boxes[at : at + 1],
                        _rows(mask, at, 1),
                        _rows(target, at, 1),
                        predicted[at : at + 1].detach().float(),
                        clip,
                    )
            first += len(part)
        each = torch.cat(losses).unflatten(0, (count, views))
        scores = each.detach().unsqueeze(-1)  # (B, V, 1)
        return StepOutput(each.mean(), scores.mean(1), scores, batch["index"])

    def _views(self, video: Tensor | Views) -> Iterator[Tensor]:
        """Yield views, all of a batch or a few at a time: `(n, 3, T, H, W)`."""
        size = None if self.training else self.views_per_forward
        if isinstance(video, Views):
            yield from pieces(video, size)
        else:
            flat = video.flatten(0, 1)
            yield from flat.split(size or len(flat))

    def _draw(self, batch: dict[str, Any], count: int, views: int, clip: tuple[int, ...]) -> Any:
        """Draw the masks of all views, `B · V` of them."""
        model: Any = self.model
        generator = torch.Generator()
        if self.training:
            return model.draw(count * views, clip, generator.manual_seed(int(batch["seed"])))
        drawn = [
            model.draw(views, clip, generator.manual_seed(index))
            for index in batch["index"].tolist()
        ]
        return type(drawn[0])(*(torch.cat(parts) for parts in zip(*drawn, strict=True)))


def _rows(tensors: Any, first: int, count: int) -> Any:
    """Take some clips of a mask or a target."""
    return type(tensors)(*(tensor[first : first + count] for tensor in tensors))


def _reconstruct(
    model: Any, boxes: Tensor, mask: Any, target: Any, values: Tensor, clip: tuple[int, ...]
) -> Reconstruction:
    """Make pictures of one clip: boxes (1, N, pixels, 3), and of its predicted ones the values (1, m, P)."""
    hidden = torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    hidden = hidden.scatter(1, mask.visible, torch.zeros_like(mask.visible, dtype=torch.bool))
    grey = boxes.masked_fill(hidden[..., None, None], 0.5)
    # Of what is predicted only the hidden part is shown.
    numbers = mask.predicted[..., None, None].expand(-1, -1, *boxes.shape[2:])
    wanted = mask.counted[..., None, None]
    means = target.mean.expand_as(numbers)
    made = values.unflatten(2, boxes.shape[2:]) * target.deviation + target.mean
    before = grey.gather(1, numbers)
    pictures = [
        model.picture(one, clip)[0].clamp(0, 1)
        for one in (
            boxes,
            grey,
            grey.scatter(1, numbers, made.where(wanted, before)),
            grey.scatter(1, numbers, means.where(wanted, before)),
        )
    ]
    return Reconstruction(*pictures)
