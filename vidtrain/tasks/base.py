"""VideoTask: steps, views, logging and the optimizer, written once for every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from vidtrain.metrics.mean_score import MeanScore
from vidtrain.types import UserError, Views

PIECE = 1 << 30  # bytes of several inputs that are made at once, where nobody says how many views

_LACKING = {
    "video": "these data have no frames",
    "flow": "for flow add data.flow=farneback, or one of the other methods",
    "features": "features come out of `vidtrain extract`; add data=features",
}


class StepOutput(NamedTuple):
    """What a task makes of a batch."""

    loss: Tensor
    scores: Tensor  # (B, K), averaged over the views, of several answers one made
    clip_scores: Tensor  # (B, V, K), before that
    target: Tensor  # (B,) or (B, K)


def pieces(views: Tensor | Views, size: int | None) -> Iterator[Tensor]:
    """Yield the views of one video after another, `size` at a time: `(n, ...)`."""
    if isinstance(views, Views):
        yield from views.pieces(size)
    else:
        for video in views:
            yield from video.split(size or len(video))


class VideoTask(L.LightningModule):
    """A network and what it is to learn. A subclass writes `step` and `metrics`; no more is needed.

    Attributes:
        description: what a checkpoint says of itself; written by the verb that trains.
        views_per_forward: how many views go through the network at once; None: all of a batch.
        frozen: submodules of the network that stay as they are, in eval mode.
        uses_labels: whether videos must have labels; scores are then those of classes.
        monitor: what the best epoch is chosen by, where nobody says otherwise.
    """

    uses_labels = True
    monitor = "val/loss"
    model: nn.Module
    optimizer: Callable[..., dict[str, Any]]  # of a network and a number of steps

    def __init__(self) -> None:
        super().__init__()
        self.description: dict[str, Any] = {}
        self.views_per_forward: int | None = None
        self.frozen: tuple[str, ...] = ()
        video, clip = self.metrics(), self.clip_metrics()
        # Not by Lightning's `log`, in which a rank that could read no video would be missed.
        self.val_losses = MetricCollection({"loss": MeanScore()}, prefix="val/")
        self.val_metrics = video.clone(prefix="val/")
        self.test_metrics = video.clone(prefix="test/")
        self.test_clip_metrics = clip.clone(prefix="test/clip_")

    def train(self, mode: bool = True) -> VideoTask:
        """Switch to training, or from it; what is frozen computes as in a test either way."""
        super().train(mode)
        for name in self.frozen:
            self.model.get_submodule(name).eval()
        return self

    def check_model(self) -> None:
        """Refuse a network that is made for another task.

        Raises:
            UserError: it is a masked autoencoder.
        """
        if hasattr(self.model, "draw"):
            raise UserError(
                f"{type(self.model).__name__} is a masked autoencoder and knows no classes; leave out"
                " task=, which its model file sets, or choose a model whose name does not end in _pretrain"
            )

    def step(self, batch: dict[str, Any]) -> StepOutput:
        """Run the network on a batch and compare with the target."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """Make the metrics of whole videos, without a prefix."""
        raise NotImplementedError

    def clip_metrics(self) -> MetricCollection:
        """Make the metrics of single views, without a prefix."""
        return MetricCollection({})

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Run the network over all views: `(B, V, C, T, H, W) -> (B, V, K)`, or `(B, V, S, K)`.

        Raises:
            UserError: the data do not have what the network takes.
        """
        weights = next(self.model.parameters(), None)
        dtype = torch.float32 if weights is None else weights.dtype  # bf16-true: the net's own
        inputs = self._inputs(batch)
        views = inputs[0].shape[:2]
        size = None if self.training else self.views_per_forward
        parts: Iterator[Sequence[Tensor]]
        if any(isinstance(one, Views) for one in inputs):
            if size is None and len(inputs) > 1:  # each would choose by its own size
                size = max(1, PIECE // sum(4 * math.prod(one.shape[2:]) for one in inputs))
            parts = zip(*(pieces(one, size) for one in inputs), strict=True)
        else:
            flat = [one.flatten(0, 1) for one in inputs]  # (B·V, C, T, H, W)
            if size is None:
                return self.model(*(one.to(dtype) for one in flat)).unflatten(0, views)
            parts = zip(*(one.split(size) for one in flat), strict=True)
        made = [self.model(*(one.to(dtype) for one in part)) for part in parts]
        return torch.cat(made).unflatten(0, views)

    def _inputs(self, batch: dict[str, Any]) -> list[Any]:
        """Take what the network takes: `(B, V, ...)` each."""
        wanted: tuple[str, ...] = self.model.inputs  # type: ignore[assignment]
        for key in wanted:
            if key not in batch:
                raise UserError(f"the model takes {' and '.join(wanted)}; {_LACKING[key]}")
        return [batch[key] for key in wanted]

    def fuse(self, scores: Tensor) -> Tensor:
        """Make one score of a network's S answers: `(N, S, K) -> (N, K)`; `(N, K)` stays.

        The network's own `fuse` says how, else it is their mean.
        """
        if scores.ndim == 2:
            return scores
        own = getattr(self.model, "fuse", None)
        return scores.mean(1) if own is None else own(scores)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Compute the loss of a batch; it is noted where somebody is going to read it."""
        output = self.step(batch)
        trainer = self.trainer
        if trainer._logger_connector.should_update_logs or trainer.is_last_batch:
            # Not at each step: Lightning's `log` is slow.
            self.log("train/loss", output.loss, prog_bar=True, batch_size=len(output.target))
        return output.loss

    def _evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Any]:
        if not len(batch["index"]):  # every video of the batch failed; the report names them
            return {}
        output = self.step(batch)
        metrics.update(output.scores, output.target)
        return output._asdict()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Score a batch, one view each."""
        output = self._evaluate(batch, self.val_metrics)
        if output:
            loss, target = output["loss"].detach(), output["target"]
            self.val_losses.update(loss.expand(len(target), 1), target)
        return output

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the metrics of all validation videos."""
        self._log_all(self.val_losses)
        self._log_all(self.val_metrics)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Score a batch over all its views."""
        output = self._evaluate(batch, self.test_metrics)
        if output:
            clips = output["clip_scores"]
            target = output["target"].repeat_interleave(clips.shape[1], 0)
            self.test_clip_metrics.update(clips.flatten(0, 1), target)
        return output

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all test videos, and of their single views."""
        self._log_all(self.test_metrics)
        self._log_all(self.test_clip_metrics)

    def _log_all(self, metrics: MetricCollection) -> None:
        counted = any(metric.update_called for metric in metrics.values())
        if self.trainer.world_size > 1:  # a rank without videos must not leave the others waiting
            counted = self.trainer.strategy.reduce_boolean_decision(counted, all=False)
        if counted:
            self.log_dict(metrics.compute())
        metrics.reset()

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule for the steps of this run."""
        return self.optimizer(self.model, int(self.trainer.estimated_stepping_batches))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint describe itself: config, label names, data fingerprint, version."""
        checkpoint["vidtrain"] = self.description
