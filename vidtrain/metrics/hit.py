"""Hit@k: is one of a video's labels among the k best scores?"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Hit(Metric):
    """Share of videos with at least one true label among the `k` best (Karpathy et al. 2014, 4.1)."""

    higher_is_better = True
    full_state_update = False
    hits: Tensor
    total: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Count a batch: scores `(B, K)`, target `(B, K)` zeros and ones."""
        best = scores.topk(self.k, dim=1).indices
        self.hits += target.gather(1, best).bool().any(1).sum()
        self.total += len(target)

    def compute(self) -> Tensor:
        """Give the share."""
        return self.hits.float() / self.total.clamp(min=1)
