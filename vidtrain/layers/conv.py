"""Convolutions over time for networks whose frames are folded into the batch."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


class FoldedConv3d(nn.Conv3d):
    """A 3D convolution in the place of a 2D one, where frames lie in the batch.

    Args:
        conv: The 2D convolution that it replaces; its settings are kept, its weights are not.
        num_frames: T of the clips that come in.
        extent: How many frames the kernel covers; no frames are padded.
        stride: Its step in time.
    """

    def __init__(self, conv: nn.Conv2d, num_frames: int, extent: int, stride: int) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            (extent, *conv.kernel_size),
            stride=(stride, *conv.stride),
            padding=(0, *conv.padding),
            dilation=(1, *conv.dilation),
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        self.num_frames = num_frames

    def forward(self, x: Tensor) -> Tensor:
        """(B·T, C, H, W) -> (B·t, D, H', W')."""
        x = super().forward(rearrange(x, "(b t) c h w -> b c t h w", t=self.num_frames))
        return rearrange(x, "b c t h w -> (b t) c h w")


class FoldedTimeConv(nn.Module):
    """A convolution over time alone, each channel by itself, where frames lie in the batch.

    Args:
        dim: Channels.
        num_frames: T of the clips that come in.
        extent: How many frames the kernel covers; no frames are padded.
        stride: Its step in time.
        channels_last: Whether maps are (N, H, W, D), or tokens (N, L, D), instead of (N, D, H, W).
    """

    def __init__(
        self, dim: int, num_frames: int, extent: int, stride: int, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.channels_last = channels_last
        self.conv = nn.Conv2d(dim, dim, (extent, 1), stride=(stride, 1), groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B·T, D, H, W) -> (B·t, D, H, W), or the same with channels last."""
        if self.channels_last:
            x = x.movedim(-1, 1)
        places = x.shape[2:]
        x = rearrange(x.flatten(2), "(b t) d n -> b d t n", t=self.num_frames)
        x = rearrange(self.conv(x), "b d t n -> (b t) d n").unflatten(2, places)
        return x.movedim(1, -1) if self.channels_last else x
