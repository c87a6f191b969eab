"""Stem, bottleneck and stage of the 3D ResNets of 50 layers and more.

C2D, I3D-ResNet, Slow and SlowFast have them equal and differ in how many frames each convolution
spans: Wang et al., CVPR 2018, table 1 and section 4.1, and Feichtenhofer et al., ICCV 2019, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.drop_path import drop_path
from vidtrain.layers.flat import dense_order
from vidtrain.layers.head import linear
from vidtrain.types import UserError

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # layers -> blocks of a stage


def stage_depths(depth: int) -> tuple[int, ...]:
    """Count the blocks of the four stages of a ResNet with so many layers.

    Raises:
        UserError: there is no such ResNet of bottlenecks.
    """
    if depth not in DEPTHS:
        raise UserError(f"model.depth is {depth}; it must be one of {', '.join(map(str, DEPTHS))}")
    return DEPTHS[depth]


def conv_of(
    dim_in: int, dim_out: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> nn.Conv3d:
    """Make a convolution without bias that keeps its map's length, with He et al.'s first weights."""
    padding = tuple(size // 2 for size in kernel)
    conv = nn.Conv3d(dim_in, dim_out, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


class Stem(nn.Module):
    """First convolution and max pool: space is quartered, time is kept.

    Args:
        dim: Channels that go out.
        kernel: Frames that the convolution spans; in space it is 7 x 7.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = conv_of(3, dim, (kernel, 7, 7), (1, 2, 2))
        self.norm = nn.BatchNorm3d(dim)
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, H/4, W/4)."""
        return self.pool(F.relu(self.norm(self.conv(dense_order(x))), inplace=True))


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut: `kernel` x 1 x 1, 1 x 3 x 3, 1 x 1 x 1.

    The stride is in the middle one, not in the first as in He et al. 2016.

    Args:
        dim_in: Channels that come in.
        dim_inner: Channels of the middle convolution.
        dim_out: Channels that go out.
        kernel: Frames that the first convolution spans.
        stride: In space.
        zero_init: Whether the last norm's scale starts at 0, and so the block as its shortcut.
        drop: Share of samples that skip the block in training.
    """

    def __init__(
        self,
        dim_in: int,
        dim_inner: int,
        dim_out: int,
        kernel: int,
        stride: int,
        zero_init: bool,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv_a = conv_of(dim_in, dim_inner, (kernel, 1, 1), (1, 1, 1))
        self.norm_a = nn.BatchNorm3d(dim_inner)
        self.conv_b = conv_of(dim_inner, dim_inner, (1, 3, 3), (1, stride, stride))
        self.norm_b = nn.BatchNorm3d(dim_inner)
        self.conv_c = conv_of(dim_inner, dim_out, (1, 1, 1), (1, 1, 1))
        self.norm_c = nn.BatchNorm3d(dim_out)
        if zero_init:
            nn.init.zeros_(self.norm_c.weight)
        self.drop_path = drop_path(drop)
        self.has_shortcut = dim_in != dim_out or stride != 1
        if self.has_shortcut:
            self.shortcut_conv = conv_of(dim_in, dim_out, (1, 1, 1), (1, stride, stride))
            self.shortcut_norm = nn.BatchNorm3d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, h, w)."""
        y = F.relu(self.norm_a(self.conv_a(x)), inplace=True)
        y = F.relu(self.norm_b(self.conv_b(y)), inplace=True)
        y = self.drop_path(self.norm_c(self.conv_c(y)))
        y += self.shortcut_norm(self.shortcut_conv(x)) if self.has_shortcut else x
        return F.relu(y, inplace=True)


class Stage(nn.Sequential):
    """Blocks one after another; the first may halve space.

    Its children are called `0`, `1`, ...; what comes after block 1 is called `after1`.

    Args:
        dims: Channels that come in, of the middle convolutions, and that go out.
        depth: How many blocks.
        kernels: Frames that each block's first convolution spans, over again until all have one.
        stride: Of the first block, in space.
        zero_init: As of the bottleneck.
        after: Block number -> a module that its output goes through.
        drops: Each block's share of samples that skip it in training; None: no sample does.

    Raises:
        UserError: `after` names a block that is not there.
    """

    def __init__(
        self,
        dims: tuple[int, int, int],
        depth: int,
        kernels: Sequence[int],
        stride: int,
        zero_init: bool,
        after: Mapping[int, nn.Module],
        drops: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if absent := sorted(set(after) - set(range(depth))):
            raise UserError(
                f"model.non_local_at names block {absent[0]} of a stage that has {depth},"
                f" counted from 0 to {depth - 1}"
            )
        dim_in, dim_inner, dim_out = dims
        for number, kernel in enumerate(islice(cycle(kernels), depth)):
            drop = drops[number] if drops else 0.0
            block = Bottleneck(dim_in, dim_inner, dim_out, kernel, stride, zero_init, drop)
            self.add_module(str(number), block)
            if number in after:
                self.add_module(f"after{number}", after[number])
            dim_in, stride = dim_out, 1


class Head(nn.Module):
    """Dropout and one linear layer.

    Args:
        dim: Channels that come in.
        num_classes: K; 0 for no linear layer.
        dropout: Before it.
    """

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = nn.Dropout(dropout)
        self.reset(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        return self.proj(self.dropout(x))

    def reset(self, num_classes: int) -> None:
        """Replace the linear layer; 0 takes it away."""
        self.proj = linear(self.dim, num_classes)
