"""Optical flow as pictures: the direction is the hue, the length how strong it is."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

# Steps from hue to hue around the circle, as many as there are between two that an eye tells apart:
# red, yellow, green, cyan, blue, magenta and back (Baker et al. 2011, A database and evaluation
# methodology for optical flow, figure 1).
STEPS = (15, 6, 4, 11, 13, 6)
HUES = ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))


def flow_pictures(flow: Tensor, brightest: float | None = None) -> tuple[Tensor, float]:
    """Colour fields: white stands still, red goes right, yellowish down, blue-green left, violet up.

    Args:
        flow: `(T, 2, H, W)` dx and dy in pixels.
        brightest: pixels that have the full colour; what is longer is darkened. None: the longest
            displacement but for one in a hundred, so that an outlier does not bleach the rest.

    Returns:
        `(T, 3, H, W)` uint8, and the pixels that have the full colour.
    """
    if flow.ndim != 4 or flow.shape[1] != 2:
        raise ValueError(f"flow of shape {tuple(flow.shape)}; expected (T, 2, H, W)")
    across, down = flow.float().cpu().numpy().transpose(1, 0, 2, 3)
    length = np.hypot(across, down)
    if brightest is None:
        brightest = float(np.quantile(length, 0.99))
    share = length / max(brightest, 1e-6)
    place = np.arctan2(down, across) / (2 * np.pi) % 1.0  # 0 right, a quarter down, a half left
    wheel = color_wheel()
    at = place * len(wheel)
    before = at.astype(int) % len(wheel)
    part = (at - np.floor(at))[..., None]
    hue = (1 - part) * wheel[before] + part * wheel[(before + 1) % len(wheel)]
    strength = share[..., None]
    colors = np.where(strength <= 1, 1 - strength * (1 - hue), 0.75 * hue)
    pictures = np.rint(255 * colors).astype(np.uint8)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), brightest


@lru_cache
def color_wheel() -> npt.NDArray[np.float64]:
    """Give the hues of a circle, from 0 to 1: `(55, 3)`, from right over down, left and up."""
    parts = []
    for steps, here, there in zip(STEPS, HUES, (*HUES[1:], HUES[0]), strict=True):
        share = np.arange(steps)[:, None] / steps
        parts.append((1 - share) * np.array(here) + share * np.array(there))
    return np.concatenate(parts) / 255
