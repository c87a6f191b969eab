"""RandAugment and random erasing of whole clips, on the device: one draw a clip, all frames alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

RATIO = (0.3, 1 / 0.3)  # width / height of an erased box; Zhong et al. 2020, and timm


def rand_augment(
    video: Tensor, ops: int, magnitude: int, fill: Sequence[int], rng: np.random.Generator
) -> Tensor:
    """Do a few random operations to each clip. Cubuk et al. 2020, as torchvision has them.

    Differs from timm's, which VideoMAE and MViT use: there each operation happens half the time, and
    magnitudes are noisy.

    Args:
        video: `(B, V, T, C, H, W)` uint8.
        ops: operations of each clip, of torchvision's fourteen.
        magnitude: of each, 0 to 30.
        fill: what comes in at the edges, of R, G and B.
        rng: of the batch.
    """
    change = v2.RandAugment(
        ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR, fill=list(fill)
    )
    clips = []
    with torch.random.fork_rng([]):  # torchvision draws from the global generator, of the CPU
        for clip in video.flatten(0, 1):
            torch.manual_seed(int(rng.integers(2**62)))
            clips.append(change(clip))
    return torch.stack(clips).view(video.shape)


def erase(
    video: Tensor, probability: float, area: Sequence[float], rng: np.random.Generator
) -> Tensor:
    """Fill a box of some clips with noise, in place: the same box in all of a clip's frames.

    Zhong et al. 2020, "Random Erasing"; a box through time ("cube") and normal noise, another for
    each pixel, as in VideoMAE.

    Args:
        video: `(B, V, C, T, H, W)` normalised, mixed already.
        probability: of each clip's having a box.
        area: of the box, from and to, as a share of the frame.
        rng: of the batch.
    """
    height, width = video.shape[-2:]
    noise = torch.Generator(video.device).manual_seed(int(rng.integers(2**62)))
    for clip in (view for views in video for view in views):
        if rng.random() >= probability:
            continue
        size = rng.uniform(area[0], area[1]) * height * width
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        h = min(height, max(1, round(math.sqrt(size / ratio))))
        w = min(width, max(1, round(math.sqrt(size * ratio))))
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        box = clip[..., top : top + h, left : left + w]
        box.copy_(torch.randn(box.shape, generator=noise, device=video.device, dtype=video.dtype))
    return video
