"""What a masked autoencoder predicts: the pixels of a token, each box of them brought to one scale.

He et al. "Masked Autoencoders Are Scalable Vision Learners." CVPR 2022. https://arxiv.org/abs/2111.06377
(section 3, reconstruction target)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """Pixels of the tokens of a clip, of mean 0 and deviation 1, and what they were before."""

    values: (
        Tensor  # (B, N, P), P pixels of a box, of each all channels: frame, row, column, channel
    )
    mean: Tensor  # (B, N, 1, C) or (B, N, 1, 1)
    deviation: Tensor  # likewise


def cut(video: Tensor, box: Sequence[int]) -> Tensor:
    """Cut a clip into boxes: (B, C, T, H, W) -> (B, N, pixels, C), N and pixels in order of t, h, w."""
    t, h, w = box
    x = video.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4, 6).flatten(1, 3)


def join(boxes: Tensor, grid: Sequence[int], box: Sequence[int]) -> Tensor:
    """Put the boxes of a clip together again: (B, N, pixels, C) -> (B, C, T, H, W)."""
    x = boxes.unflatten(2, tuple(box)).unflatten(1, tuple(grid))  # (B, t, h, w, box, C)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def standardise(boxes: Tensor, axes: Sequence[int], before: float, after: float) -> Target:
    """Bring boxes (B, N, pixels, C) to mean 0 and deviation 1 along some of the last two axes.

    Args:
        boxes: Pixels.
        axes: -2 alone: each channel for itself; -2 and -1: all together.
        before: What is added to the variance, which is the unbiased one.
        after: What is added to the deviation. A box of one colour becomes 0.
    """
    axes = tuple(axes)
    variance = boxes.var(axes, unbiased=True, keepdim=True)
    mean = boxes.mean(axes, keepdim=True)
    deviation = (variance + before).sqrt() + after
    return Target(((boxes - mean) / deviation).flatten(2), mean, deviation)
