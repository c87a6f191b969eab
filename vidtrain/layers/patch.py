"""From pixels to tokens: patches or tubelets, and the tables that say where each lay.

Dosovitskiy et al. "An Image is Worth 16x16 Words." ICLR 2021. https://arxiv.org/abs/2010.11929 (patches)
Arnab et al. "ViViT: A Video Vision Transformer." ICCV 2021. https://arxiv.org/abs/2103.15691 (tubelets)
Vaswani et al. "Attention Is All You Need." NeurIPS 2017. https://arxiv.org/abs/1706.03762 (sines, cosines)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.types import UserError


class PatchEmbed(nn.Module):
    """Cut a clip into boxes that do not overlap, and make of each a token by one linear map.

    That is a convolution whose stride is its kernel, and `proj` holds it as one; it is computed as the
    matrix product that it is, which is as fast for every type and memory order.

    Args:
        dim: D of a token.
        box: Frames, rows and columns of a box: (1, 16, 16) are patches, (2, 16, 16) tubelets.
    """

    def __init__(self, dim: int, box: Sequence[int]) -> None:
        super().__init__()
        self.box = tuple(box)
        self.proj = nn.Conv3d(3, dim, self.box, self.box)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, t, h, w, D).

        Raises:
            UserError: the boxes do not fill the clip.
        """
        grid_of(x.shape[2:], self.box)
        t, h, w = self.box
        x = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # (B, t, h, w, 3 · box)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def grid_of(clip: Sequence[int], box: Sequence[int]) -> tuple[int, int, int]:
    """Count the boxes of a clip: (T, H, W) -> (t, h, w).

    Raises:
        UserError: they do not fill it.
    """
    frames, *sides = (size % part for size, part in zip(clip, box, strict=True))
    if frames:
        raise UserError(
            f"the model takes {box[0]} frames at a time and got a clip of {clip[0]};"
            f" make clip.num_frames (in a test views.num_frames) a multiple of {box[0]}"
        )
    if any(sides):
        raise UserError(
            f"the model cuts frames into {box[1]} x {box[2]} pixels and got {clip[1]} x {clip[2]};"
            f" make clip.size (in a test views.size) a multiple of {math.lcm(*box[1:])}"
        )
    t, h, w = (size // part for size, part in zip(clip, box, strict=True))
    return t, h, w


def resize_table(table: Tensor, grid: Sequence[int], new: Sequence[int], mode: str) -> Tensor:
    """Spread a table of positions over a grid of another size.

    Args:
        table: (1, N, D), a row for each of the N places of `grid`, the last axis running fastest.
        grid: One to three sizes, whose product is N.
        new: As many.
        mode: Of `F.interpolate`: `nearest`, or `linear`, `bilinear`, `trilinear` by the number of axes.

    Returns:
        (1, M, D) with M places in `new`; the table itself where the sizes are the same.
    """
    if tuple(grid) == tuple(new):
        return table
    places = table.transpose(1, 2).unflatten(2, tuple(grid))
    return F.interpolate(places, size=tuple(new), mode=mode).flatten(2).transpose(1, 2)


def sincos_table(places: int, dim: int) -> Tensor:
    """Sines and cosines of a place's number: (1, N, D), sin in even channels and cos in odd ones.

    Channels 2i and 2i + 1 have the frequency 10000^(-2i / D) (Vaswani et al., section 3.5).
    """
    channel = torch.arange(dim, dtype=torch.float64)
    frequency = 10000.0 ** (-2 * (channel // 2) / dim)
    angle = torch.arange(places, dtype=torch.float64)[:, None] * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]
