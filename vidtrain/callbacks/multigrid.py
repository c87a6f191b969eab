"""Batch norm while batches change their size: statistics over parts of a batch, as large as ever.

Wu et al. 2020, arXiv:1912.00998 (multigrid training): where a step has eight times as many clips, statistics
over all of them would be less noisy than those that the fine shapes are trained with.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from vidtrain.data.multigrid import Multigrid


class _SplitNorm(_BatchNorm):
    """Batch norm that in training takes a batch in `splits` parts, each with statistics of its own.

    Every so manyth clip is of one part: clips of the same video, which follow each other, are of several.

    The running statistics are those of the whole batch. With `splits` 1 it is batch norm to the bit.
    """

    splits = 1

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(B, D, ...)`."""
        count = min(self.splits, len(input) // 2)  # one clip alone may have nothing to vary
        if not self.training or count < 2:
            return super().forward(input)
        self._check_input_dim(input)
        parts = [input[first::count] for first in range(count)]
        shape = (count, self.num_features)
        # a momentum of 1 leaves each part's own moments there
        means, variances = (torch.zeros(shape, device=input.device) for _ in range(2))
        made = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for part, mean, variance in zip(parts, means, variances, strict=True)
        ]
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            new = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            share = means.new_tensor([[len(part) / len(input)] for part in parts])
            mean = (share * means).sum(0)
            variance = (share * (variances + (means - mean) ** 2)).sum(0)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), new)
            self.running_var.lerp_(variance.to(self.running_var.dtype), new)
        each = len(input) // count
        whole = torch.stack([part[:each] for part in made], 1).flatten(0, 1)
        return torch.cat([whole, *(part[each:] for part in made)])


class SplitNorm1d(_SplitNorm, nn.BatchNorm1d):
    """Of `(B, D, T)`."""


class SplitNorm2d(_SplitNorm, nn.BatchNorm2d):
    """Of `(B, D, H, W)`."""


class SplitNorm3d(_SplitNorm, nn.BatchNorm3d):
    """Of `(B, D, T, H, W)`."""


SPLIT = {nn.BatchNorm1d: SplitNorm1d, nn.BatchNorm2d: SplitNorm2d, nn.BatchNorm3d: SplitNorm3d}


def split_norms(network: nn.Module) -> list[_SplitNorm]:
    """Turn a network's batch norms, in their places, into ones that can split; no tensor changes.

    Returns:
        All of them.
    """
    for module in network.modules():
        if type(module) in SPLIT:
            module.__class__ = SPLIT[type(module)]
    return [module for module in network.modules() if isinstance(module, _SplitNorm)]


class SplitNorms(L.Callback):
    """Have batch norm split the batches of each epoch as the plan says.

    Args:
        plan: of the shapes.
        repeats: clips of each video of a batch.
    """

    def __init__(self, plan: Multigrid, repeats: int) -> None:
        self.plan, self.repeats = plan, repeats
        self.norms: list[_SplitNorm] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the network's norms."""
        self.norms = split_norms(pl_module.model)  # type: ignore[arg-type]

    def _split(self, splits: int) -> None:
        for norm in self.norms:
            norm.splits = splits

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Split as this epoch's shape asks for."""
        self._split(self.plan.splits(trainer.current_epoch, self.repeats))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Split as the default shape asks for, which precise batch norm measures with."""
        self._split(self.plan.splits(None, self.repeats))
