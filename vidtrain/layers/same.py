"""TensorFlow's SAME padding, whose two sides may differ.

A convolution or pool of stride s makes ceil(n / s) of n places, at any n. What it lacks for that is
padded, half of it on each side, and where that is odd, the larger half behind: kernel 3, stride 2 over
112 places pads (0, 1). PyTorch's own `padding` is the same on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int]
) -> list[tuple[int, int]]:
    """Count the places to pad before and behind each axis.

    Args:
        size: Length of each axis.
        kernel: Extent of the window along each.
        stride: Its step along each.
    """
    pads = []
    for n, k, s in zip(size, kernel, stride, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads


class SameConv3d(nn.Conv3d):
    """A 3D convolution, not dilated, with TensorFlow's SAME padding of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, t, h, w), T / stride rounded up, and so on."""
        pads = same_padding(x.shape[2:], self.kernel_size, self.stride)
        front = [before for before, _ in pads]
        if any(before != behind for before, behind in pads):
            x = F.pad(x, [places for pair in reversed(pads) for places in pair])
            front = [0, 0, 0]
        return F.conv3d(x, self.weight, self.bias, self.stride, front, groups=self.groups)


class SameMaxPool3d(nn.Module):
    """The maximum over windows with TensorFlow's SAME padding, which no maximum is taken from.

    Args:
        kernel: Extent of the window in t, h, w.
        stride: Its step in t, h, w.
    """

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        if any(k % 2 == 0 and s == 1 for k, s in zip(kernel, stride, strict=True)):
            raise ValueError(f"an even window of stride 1 would lack its last place: {kernel}")
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, t, h, w), T / stride rounded up, and so on."""
        pads = same_padding(x.shape[2:], self.kernel, self.stride)
        front = [before for before, _ in pads]
        # Of the two sides only the one behind may be larger, by one: a window over the rest.
        return F.max_pool3d(x, self.kernel, self.stride, front, ceil_mode=True)

    def extra_repr(self) -> str:
        """Show the window."""
        return f"kernel={self.kernel}, stride={self.stride}"
