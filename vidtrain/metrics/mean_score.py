"""The mean over videos of a number that each of them has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanScore(Metric):
    """Average `(B, 1)` scores over all videos of all ranks; targets are not looked at."""

    higher_is_better = None
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Take a batch."""
        self.total += scores.float().sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Give the mean."""
        return self.total / self.count
