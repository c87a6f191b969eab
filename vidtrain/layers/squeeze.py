"""Squeeze and excitation, and the widths of networks whose channels come in eights.

Hu, Shen, Sun. "Squeeze-and-Excitation Networks." CVPR 2018. https://arxiv.org/abs/1709.01507
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def round_channels(channels: float) -> int:
    """Round to a multiple of 8, at least 8, that is no more than a tenth too small.

    MobileNetV2's rule, by which X3D and MoViNet count channels.
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class SqueezeExcitation(nn.Module):
    """Scale each channel by a sigmoid of what two 1 x 1 x 1 convolutions make of all channels' means.

    Args:
        dim: Channels.
        dim_inner: Channels between the two convolutions.
        activation: Between them.
    """

    def __init__(self, dim: int, dim_inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(dim, dim_inner, 1)
        self.expand = nn.Conv3d(dim_inner, dim, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same."""
        scale = self.activation(self.reduce(x.mean((2, 3, 4), keepdim=True)))
        return x * torch.sigmoid(self.expand(scale))
