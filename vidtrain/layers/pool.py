"""Pooling that several architectures have equal."""

from __future__ import annotations

from torch import Tensor, nn


class GlobalAvgPool(nn.Module):
    """Average over time and space.

    Args:
        keep_time: Whether T stays as an axis of length 1, as height and width do.
    """

    def __init__(self, keep_time: bool = True) -> None:
        super().__init__()
        self.keep_time = keep_time

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, 1, 1, 1), or (B, C, 1, 1) without time."""
        if not self.keep_time:
            x = x.mean(2)
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)
