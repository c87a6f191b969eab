"""Frames folded into the batch, where 2D layers take them for images."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from vidtrain.types import UserError


def fold_time(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T, C, H, W)."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def unfold_time(x: Tensor, num_frames: int) -> Tensor:
    """(B·T, C, H, W) -> (B, C, T, H, W)."""
    return rearrange(x, "(b t) c h w -> b c t h w", t=num_frames)


def check_clip(x: Tensor, num_frames: int | None = None, size: int | None = None) -> None:
    """Refuse a clip (B, C, T, H, W) of another shape than the network was built for.

    Raises:
        UserError: naming what the network takes and what came.
    """
    if num_frames is not None and x.shape[2] != num_frames:
        raise UserError(
            f"the model was built for clips of {num_frames} frames and got {x.shape[2]};"
            " leave clip.num_frames and views.num_frames as they were in training, or train anew"
        )
    if size is not None and tuple(x.shape[3:]) != (size, size):
        raise UserError(
            f"the model was built for frames of {size} x {size} pixels and got"
            f" {x.shape[3]} x {x.shape[4]}; leave clip.size and views.size as they were in"
            " training, or train anew"
        )
