"""Accuracy averaged over classes, so that each counts alike however many videos it has."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanClassAccuracy(Metric):
    """Mean over classes of the share of their videos that is right; classes without videos are left out.

    torchmetrics' macro average counts a class without videos as 0 as soon as one video is taken
    for it.
    """

    higher_is_better = True
    full_state_update = False
    hits: Tensor
    total: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Count a batch: scores `(B, K)`, target `(B,)`, -1 where unknown."""
        known = target >= 0
        scores, target = scores[known], target[known]
        right = scores.argmax(1) == target
        self.total += torch.bincount(target, minlength=len(self.total))
        self.hits += torch.bincount(target[right], minlength=len(self.total))

    def compute(self) -> Tensor:
        """Give the mean; 0 without any video."""
        seen = self.total > 0
        if not seen.any():
            return self.hits.sum().float()
        return (self.hits[seen] / self.total[seen]).mean()
