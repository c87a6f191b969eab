"""Mixup and CutMix of the clips of a batch: each with its mirror image in the batch.

Both are one weight for each pixel: what the clip keeps of itself, the rest comes from the other.
Mixup (Zhang et al. 2018) has one weight everywhere, CutMix (Yun et al. 2019) zeros in a box and ones
around it; over a clip's frames the box stays where it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Mix(NamedTuple):
    """What is drawn for a batch."""

    weight: Tensor  # (H, W) float, what a pixel keeps of itself
    share: float  # mean of it: what the label keeps


def draw(
    height: int, width: int, mixup: float, cutmix: float, rng: np.random.Generator
) -> Mix | None:
    """Draw how a batch is mixed, by Beta(alpha, alpha); with both, one of them half the time.

    Args:
        height: of a frame, in pixels.
        width: of a frame.
        mixup: its alpha; 0: none.
        cutmix: its alpha; 0: none.
        rng: of the batch.
    """
    if not mixup and not cutmix:
        return None
    if cutmix and (not mixup or rng.random() < 0.5):
        share = rng.beta(cutmix, cutmix)
        h, w = round(height * np.sqrt(1 - share)), round(width * np.sqrt(1 - share))
        middle, center = rng.integers(height), rng.integers(width)
        weight = torch.ones(height, width)
        top, left = max(0, middle - h // 2), max(0, center - w // 2)
        weight[top : max(0, middle - h // 2 + h), left : max(0, center - w // 2 + w)] = 0
        return Mix(weight, float(weight.mean()))  # the box may have been cut at the border
    share = rng.beta(mixup, mixup)
    return Mix(torch.full((height, width), share), float(share))


def mix_labels(labels: Tensor, share: float, num_classes: int) -> Tensor:
    """Mix `(B,)` classes to `(B, K)` shares, as clips are mixed; who has no class has no share either."""
    soft = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    return share * soft + (1 - share) * soft.flip(0)
