"""Classification: one label a video, or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from vidtrain.losses.classification import binary_cross_entropy, cross_entropy
from vidtrain.metrics.hit import Hit
from vidtrain.metrics.mean_ap import MeanAveragePrecision
from vidtrain.metrics.mean_class import MeanClassAccuracy
from vidtrain.tasks.base import StepOutput, VideoTask
from vidtrain.types import UserError

UNKNOWN = -1  # the label of a video without one


class Classification(VideoTask):
    """Cross-entropy for one label, binary cross-entropy for many; scores averaged over views.

    A video's score is the mean over its views of the softmax (sigmoid with many labels), as the
    papers test. A network that answers S times (see `types.VideoModel`) has each answer compared with
    the label, and one score made of all of them after the mean over views. Metrics: top-1, top-5 and
    the mean over classes of their accuracy; with many labels mAP (mean over classes of the average
    precision) and Sports-1M's hit@1 and hit@5.

    Args:
        num_classes: K.
        multi_label: whether a video may have several labels.
        label_smoothing: share of the target that all classes get, in training.
        class_weights: `balanced`: in training a video counts in inverse proportion to how many there are of
            its class, on average 1; or K numbers; None: all count the same.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        class_weights: str | Sequence[float] | None = None,
    ) -> None:
        if num_classes < (1 if multi_label else 2):
            raise UserError(
                f"there are {num_classes or 'no'} classes to tell apart: is data.label right? Only models"
                " named *_pretrain take videos without labels"
            )
        self.num_classes, self.multi_label = num_classes, multi_label
        self.label_smoothing = label_smoothing
        if multi_label and label_smoothing:
            raise UserError("task.label_smoothing is for one label a video; set it to 0")
        if class_weights is not None and multi_label:
            raise UserError("task.class_weights is for one label a video; set it to null")
        super().__init__()
        self.monitor = "val/mAP" if multi_label else "val/top1"
        self.balanced = class_weights == "balanced"
        weight = None
        if class_weights is not None and not self.balanced:
            weight = _weights(class_weights, num_classes)
        self.register_buffer("class_weight", weight, persistent=False)

    def on_fit_start(self) -> None:
        """Weigh the classes by the training videos there are, where it is asked for."""
        if self.balanced:
            counts = self.trainer.datamodule.manifest.label_counts("train")  # type: ignore[attr-defined]
            shares = torch.zeros(self.num_classes)
            shares[: len(counts)] = torch.from_numpy(counts).float()
            there = shares > 0
            shares[there] = shares.sum() / (there.sum() * shares[there])
            self.class_weight = shares.to(self.device)

    def metrics(self) -> MetricCollection:
        """Make the metrics of whole videos."""
        top5 = min(5, self.num_classes)
        if self.multi_label:
            return MetricCollection(
                {"mAP": MeanAveragePrecision(), "hit1": Hit(1), "hit5": Hit(top5)},
                compute_groups=False,
            )
        return MetricCollection(
            {
                "top1": self.accuracy(1),
                "top5": self.accuracy(top5),
                "mean_class": MeanClassAccuracy(self.num_classes),
            },
            compute_groups=False,
        )

    def clip_metrics(self) -> MetricCollection:
        """Make the metrics of single views."""
        if self.multi_label:
            return MetricCollection({"hit1": Hit(1), "hit5": Hit(min(5, self.num_classes))})
        return MetricCollection({"top1": self.accuracy(1)})

    def accuracy(self, k: int) -> MulticlassAccuracy:
        """Share of videos whose label is among the `k` best; unlabelled ones are not counted."""
        return MulticlassAccuracy(self.num_classes, top_k=k, average="micro", ignore_index=UNKNOWN)

    def step(self, batch: dict[str, Any]) -> StepOutput:
        """Score a batch; the loss is the mean over views, and over answers."""
        logits = self.logits(batch).float()  # (B, V, K), or (B, V, S, K)
        target = batch["label"]
        each = logits.flatten(1, -2)  # (B, V·S, K)
        repeated = target.repeat_interleave(each.shape[1], 0)  # (B·V·S, ...)
        if self.multi_label:
            loss = binary_cross_entropy(each.flatten(0, 1), repeated)
            target = target.int()
        else:
            smoothing = self.label_smoothing if self.training else 0.0
            weight = self.class_weight if self.training else None
            loss = cross_entropy(each.flatten(0, 1), repeated, smoothing, weight)
        scores = self.activate(logits.detach())
        clip_scores = self.fuse(scores.flatten(0, 1)).unflatten(0, scores.shape[:2])
        return StepOutput(loss, self.fuse(scores.mean(1)), clip_scores, target)

    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits into scores: softmax over the classes, or sigmoid with many labels."""
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn `(B, V, K)` or `(B, V, S, K)` logits into `(B, K)` scores of videos."""
        return self.fuse(self.activate(logits.float()).mean(1))


def _weights(values: Any, num_classes: int) -> Tensor:
    numbers = [
        v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0
    ]
    if isinstance(values, str) or len(numbers) != num_classes or len(values) != num_classes:
        raise UserError(
            f"task.class_weights is {values!r}; it is balanced, null or {num_classes} numbers, one a class"
        )
    return torch.tensor([float(number) for number in numbers])
