"""What the 3D networks made of Inception v1 have equal.

Szegedy et al. "Going Deeper with Convolutions." CVPR 2015, table 1, with 3 x 3 where that has 5 x 5.
https://arxiv.org/abs/1409.4842
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# Channels of a module: alone 1 x 1; 1 x 1, then 3 x 3; the same again; 1 x 1 after a pool.
WIDTHS = {
    "3b": (64, (96, 128), (16, 32), 32),
    "3c": (128, (128, 192), (32, 96), 64),
    "4b": (192, (96, 208), (16, 48), 64),
    "4c": (160, (112, 224), (24, 64), 64),
    "4d": (128, (128, 256), (24, 64), 64),
    "4e": (112, (144, 288), (32, 64), 64),
    "4f": (256, (160, 320), (32, 128), 128),
    "5b": (256, (160, 320), (32, 128), 128),
    "5c": (384, (192, 384), (48, 128), 128),
}  # fmt: skip


def out_channels(name: str) -> int:
    """Count the channels of a module's four branches together."""
    alone, (_, second), (_, third), pooled = WIDTHS[name]
    return alone + second + third + pooled


def window_means(x: Tensor) -> Tensor:
    """Average over windows of 2 x 7 x 7, one place apart, or of the whole of a smaller map.

    (B, D, t, h, w) -> (B, D, t - 1, h - 6, w - 6), and at least 1 along each axis.
    """
    _, _, t, h, w = x.shape
    return F.avg_pool3d(x, (min(2, t), min(7, h), min(7, w)), stride=1)
