"""What networks of depthwise convolutions need to be fast: kernels of one pixel, and memory order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FlatConv3d(nn.Conv3d):
    """A 3D convolution of k x 1 x 1, computed over time and all places in one row.

    Weights and results are those of `nn.Conv3d`. In two dimensions there are faster kernels, above all
    on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, t, h, w)."""
        if self.stride[1:] != (1, 1):
            if x.device.type != "cpu":  # picking places costs more there than it saves
                return super().forward(x)
            x = x[..., :: self.stride[1], :: self.stride[2]]
        stride, padding = (self.stride[0], 1), (self.padding[0], 0)
        weight = self.weight.flatten(3)
        y = F.conv2d(x.flatten(3), weight, self.bias, stride, padding, 1, self.groups)
        return y.unflatten(3, x.shape[3:])


class DepthwiseConv3d(nn.Conv3d):
    """A 3D convolution of each channel by itself, see `depthwise`; weights are those of `nn.Conv3d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, t, h, w)."""
        return depthwise(x, self.weight, self.stride, self.padding)


def depthwise(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Convolve each channel by itself, with stride 1 in time.

    On a GPU, in channels-last memory, frame by frame: cuDNN's kernels for that are many times faster
    in two dimensions than in three, even where each frame of the kernel takes one of its own.

    Args:
        x: (B, C, T, H, W).
        weight: (C, 1, k_t, k, k).
        stride: In t, h, w.
        padding: In t, h, w, on both sides.
    """
    last = torch.channels_last_3d
    if x.device.type == "cpu" or not x.is_contiguous(memory_format=last):
        return F.conv3d(x, weight, None, stride, padding, 1, len(weight))
    batch, frames = x.shape[0], x.shape[2]
    length = frames + 2 * padding[0] - weight.shape[2] + 1
    folded = x.transpose(1, 2).flatten(0, 1)
    y = None
    for number, tap in enumerate(weight.to(x.dtype).unbind(2)):
        first = padding[0] - number  # where in the result the first frame goes
        if not -frames < first < length:
            continue
        part = F.conv2d(folded, tap, None, stride[1:], padding[1:], 1, len(weight))
        part = part.unflatten(0, (batch, frames)).transpose(1, 2)
        if first or length != frames:
            part = F.pad(part, (0, 0, 0, 0, first, length - frames - first))
        y = part if y is None else y + part
    assert y is not None
    return y


def depthwise_order(x: Tensor) -> Tensor:
    """Lay (B, C, T, H, W) out as convolutions of single channels are fastest.

    On a CPU that is with channels innermost. On a GPU torch's own kernels want them outermost and
    cuDNN's innermost; the clip is left as it comes.
    """
    if x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)
