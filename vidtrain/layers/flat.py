"""What convolutions need to be fast: memory order, and two dimensions where three are slow.

In channels-last memory, what all channels have at one place lies together. On a GPU cuDNN computes in
that order alone: what comes otherwise it reorders around each convolution, and torch's batch norms and
max pools are slower on it as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAST = torch.channels_last_3d
HALF = (torch.float16, torch.bfloat16)

# Fewer places than this in a batch of clips, and launching kernels takes longer than running them.
MANY_PLACES = 8_000_000


def dense_order(x: Tensor) -> Tensor:
    """Lay (B, C, T, H, W) out as convolutions over all channels are fastest; on a CPU as it comes.

    A compiler chooses for itself, and does worse with what is chosen for it (docs/BENCHMARKS.md).
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return x
    return x.contiguous(memory_format=LAST)


def depthwise_order(x: Tensor) -> Tensor:
    """Lay (B, C, T, H, W) out as convolutions of single channels are fastest.

    On a CPU that is channels last. On a GPU it is channels last for large batches in half precision;
    otherwise torch's own kernels, which are fewer, want channels first.
    """
    if not x.is_cuda:
        return x.contiguous(memory_format=LAST)
    half = x.dtype in HALF or torch.is_autocast_enabled("cuda")
    if half and x.numel() // x.shape[1] >= MANY_PLACES:
        return x.contiguous(memory_format=LAST)
    return x.contiguous()


class FlatConv3d(nn.Conv3d):
    """A 3D convolution of k x 1 x 1, computed over time and all places in one row where that is faster.

    That is on a CPU, and where channels are convolved by themselves. Weights and results are those of
    `nn.Conv3d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, t, h, w)."""
        if x.is_cuda and self.groups == 1:
            return super().forward(x)
        if self.stride[1:] != (1, 1):
            x = x[..., :: self.stride[1], :: self.stride[2]]
        weight, beside = self.weight.flatten(3), 0
        if x.is_cuda and x.is_contiguous(memory_format=LAST):
            beside = self.kernel_size[0] // 2  # cuDNN is fast at squares: zeros beside the kernel
            weight = F.pad(weight, (beside, beside))
        stride, padding = (self.stride[0], 1), (self.padding[0], beside)
        y = F.conv2d(x.flatten(3), weight, self.bias, stride, padding, 1, self.groups)
        return y.unflatten(3, x.shape[3:])


class DepthwiseConv3d(nn.Conv3d):
    """A 3D convolution of each channel by itself, see `depthwise`; weights are those of `nn.Conv3d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, t, h, w)."""
        return depthwise(x, self.weight, self.stride, self.padding)


def depthwise(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Convolve each channel by itself, with stride 1 in time.

    On a GPU, in channels-last memory, frame by frame, once for each frame of the kernel: cuDNN is so
    much faster at that in two dimensions than in three.

    Args:
        x: (B, C, T, H, W).
        weight: (C, 1, k_t, k, k).
        stride: In t, h, w.
        padding: In t, h, w, on both sides.
    """
    if not x.is_cuda or not x.is_contiguous(memory_format=LAST):
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
