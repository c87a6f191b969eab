"""VideoTask: steps, views, logging and the optimizer, written once for every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from vidtrain.types import UserError, Views


class StepOutput(NamedTuple):
    """What a task makes of a batch."""

    loss: Tensor
    scores: Tensor  # (B, K), averaged over the views
    clip_scores: Tensor  # (B, V, K), before that
    target: Tensor  # (B,) or (B, K)


class VideoTask(L.LightningModule):
    """A network and what it is to learn. A subclass writes `step` and `metrics`; no more is needed.

    Attributes:
        description: what a checkpoint says of itself; written by the verb that trains.
        views_per_forward: how many views go through the network at once; None: all of a batch.
    """

    model: nn.Module
    optimizer: Callable[[nn.Module, int], dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.description: dict[str, Any] = {}
        self.views_per_forward: int | None = None
        video, clip = self.metrics(), self.clip_metrics()
        self.val_metrics = video.clone(prefix="val/")
        self.test_metrics = video.clone(prefix="test/")
        self.test_clip_metrics = clip.clone(prefix="test/clip_")

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
        """Run the network over all views: `(B, V, C, T, H, W) -> (B, V, K)`."""
        weights = next(self.model.parameters(), None)
        dtype = torch.float32 if weights is None else weights.dtype  # bf16-true: the net's own
        video = batch["video"]
        if isinstance(video, Views):
            if tuple(self.model.inputs) != ("video",):  # type: ignore[arg-type]
                raise UserError(
                    "views.memory is too small for the views of a network of two inputs"
                )
            made = video.pieces(self.views_per_forward)
            return torch.cat([self.model(part.to(dtype)) for part in made]).unflatten(
                0, video.shape[:2]
            )
        inputs = [batch[key].to(dtype) for key in self.model.inputs]  # type: ignore[union-attr]
        views = inputs[0].shape[:2]
        flat = [tensor.flatten(0, 1) for tensor in inputs]  # (B·V, C, T, H, W)
        size = None if self.training else self.views_per_forward
        if size is None:
            return self.model(*flat).unflatten(0, views)
        parts = [
            self.model(*part) for part in zip(*(tensor.split(size) for tensor in flat), strict=True)
        ]
        return torch.cat(parts).unflatten(0, views)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        output = self.step(batch)
        self.log("train/loss", output.loss, prog_bar=True, batch_size=len(output.target))
        return output.loss

    def _evaluate(self, batch: dict[str, Any], metrics: MetricCollection) -> dict[str, Any]:
        if "video" not in batch:  # every video of the batch failed; the report names them
            return {}
        output = self.step(batch)
        metrics.update(output.scores, output.target)
        return output._asdict()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Score a batch, one view each."""
        output = self._evaluate(batch, self.val_metrics)
        if output:
            size = len(output["target"])
            many = self.trainer.world_size > 1
            self.log("val/loss", output["loss"], on_epoch=True, batch_size=size, sync_dist=many)
        return output

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation videos."""
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
