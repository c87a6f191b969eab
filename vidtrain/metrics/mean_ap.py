"""Mean average precision over classes, for videos with several labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class MeanAveragePrecision(Metric):
    """Mean over classes of the average precision; classes that no video has are left out.

    torchmetrics counts such a class as 0, which makes the mean depend on how many classes the
    dataset names rather than on how well they are told apart. Average precision is the mean, over a
    class's videos, of the precision at the rank of each (ties share the rank of the last).
    """

    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Take a batch: scores `(B, K)`, target `(B, K)` zeros and ones."""
        self.scores.append(scores.detach().float())
        self.targets.append(target.bool())

    def per_class(self) -> Tensor:
        """Give the average precision of each class: `(K,)`, NaN where no video has it."""
        scores, targets = dim_zero_cat(self.scores), dim_zero_cat(self.targets)
        return torch.stack(
            [average_precision(s, t) for s, t in zip(scores.T, targets.T, strict=True)]
        )

    def compute(self) -> Tensor:
        """Give the mean over the classes that some video has."""
        return self.per_class().nanmean()


def average_precision(scores: Tensor, target: Tensor) -> Tensor:
    """Average precision of one class: scores `(N,)`, target `(N,)` bool; NaN without a positive."""
    if not target.any():
        return scores.new_tensor(float("nan"))
    order = scores.argsort(descending=True)
    scores, hits = scores[order], target[order].cumsum(0)
    # Videos of equal score have no order among them: all stand at the rank of the last.
    last = torch.searchsorted(-scores, -scores, right=True) - 1
    precision = hits[last].float() / (last + 1)
    return precision[target[order]].mean()
