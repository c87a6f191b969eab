"""What networks of depthwise convolutions need to be fast: kernels of one pixel, and memory order."""

from __future__ import annotations

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
            x = x[..., :: self.stride[1], :: self.stride[2]]
        stride, padding = (self.stride[0], 1), (self.padding[0], 0)
        y = F.conv2d(x.flatten(3), self.weight[..., 0], self.bias, stride, padding, 1, self.groups)
        return y.unflatten(3, x.shape[3:])


def depthwise_order(x: Tensor) -> Tensor:
    """Lay (B, C, T, H, W) out as convolutions of single channels are fastest.

    On a CPU that is with channels innermost. On a GPU torch's own kernels want them outermost and
    cuDNN's innermost; the clip is left as it comes.
    """
    if x.device.type != "cpu":
        return x
    return x.contiguous(memory_format=torch.channels_last_3d)
