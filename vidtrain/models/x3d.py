"""X3D: a tiny image network, expanded along one axis after another.

Feichtenhofer. "X3D: Expanding Architectures for Efficient Video Recognition." CVPR 2020.
https://arxiv.org/abs/2004.04730

A ResNet whose 3 x 3 x 3 convolutions see each channel by itself, so that it is thin (24 to 192
channels), deep and finely sampled. Six factors make a member of the family out of X2D, where all are 1
(table 1); `Expansion` counts what they come to. With stages of 24, 48, 96 and 192 channels:

    stem    1 x 3 x 3, every 2nd pixel, then 5 x 1 x 1 on each channel, norm, ReLU
    res2    1 x 1 x 1 to 2.25 times the channels, norm, ReLU; 3 x 3 x 3 on each channel, every 2nd
    ...     pixel in a stage's first block, norm; in blocks 0, 2, 4, ... squeeze and excitation;
    res5    swish; 1 x 1 x 1, norm; plus the shortcut, ReLU
    conv5   1 x 1 x 1 to the last inner width, norm, ReLU
    head    mean over time and space; fc1, 2048 without bias, ReLU; dropout; fc2

Time is never halved, and any clip will do. Each block's last norm starts at a scale of 0, so that the
block begins as its shortcut and no gradient reaches its other layers before the first step.

Submodules: `stem.conv` (space) `stem.conv_t` (time) `stem.norm`; `res2` to `res5`, each with
`N.conv_a` `N.norm_a` `N.conv_b` `N.norm_b` `N.se.reduce` `N.se.expand` `N.conv_c` `N.norm_c`
`N.shortcut_conv` `N.shortcut_norm` of block N; `conv5` `norm5`; `fc1` `fc2`.

Departs from the paper: nowhere. Its released implementations differ in two points. The shortcut of
res2, which halves the map and keeps the width, has no norm in PyTorchVideo, as here, and one in
PySlowFast (`norm_res2=true`). The widths of XL are PyTorchVideo's, which come to the paper's numbers.

Parameters with 400 classes: XS, S and M 3,794,274, L 6,153,384, XL 11,095,840; multiply-adds 0.6053,
1.9629, 4.7325, 18.368 and 35.838 G at each one's own clip, as tests/models/test_x3d.py asserts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.drop_path import drop_path, path_rates
from vidtrain.layers.flat import DepthwiseConv3d, FlatConv3d, depthwise_order
from vidtrain.layers.head import linear
from vidtrain.layers.squeeze import SqueezeExcitation, round_channels
from vidtrain.types import UserError


@dataclass(frozen=True)
class Expansion:
    """The six factors of table 1, and what they come to. With all of them 1 this is X2D.

    Each factor changes one dimension and no other. A step along two axes is a product of them: twice
    the frames in the same time is `expand(fast=2, temporal=2)`.

        Expansion(gamma_tau=12).expand(bottleneck=2.25).expand(fast=2, temporal=2)

    Attributes:
        gamma_tau: Frames from one sample of the clip to the next; the frame rate is its inverse.
        gamma_t: Frames of the clip.
        gamma_s: Height and width, times 112 pixels.
        gamma_d: Blocks, times 1, 2, 5 and 3 of the four stages.
        gamma_w: Channels, times 24, 48, 96 and 192.
        gamma_b: Channels inside a block, times those that go in.

    Raises:
        UserError: a factor is not above 0.
    """

    gamma_tau: float = 1.0
    gamma_t: float = 1.0
    gamma_s: float = 1.0
    gamma_d: float = 1.0
    gamma_w: float = 1.0
    gamma_b: float = 1.0

    def __post_init__(self) -> None:
        """Refuse factors that leave nothing."""
        for name, factor in vars(self).items():
            if factor <= 0:
                raise UserError(f"model.{name} is {factor}; an expansion factor is above 0")

    def expand(
        self,
        fast: float = 1.0,
        temporal: float = 1.0,
        spatial: float = 1.0,
        depth: float = 1.0,
        width: float = 1.0,
        bottleneck: float = 1.0,
    ) -> Expansion:
        """Take a step along the paper's axes, X-Fast to X-Bottleneck, each by a factor.

        They multiply frame rate, frames, height and width, blocks, channels, and inner channels.
        """
        return replace(
            self,
            gamma_tau=self.gamma_tau / fast,
            gamma_t=self.gamma_t * temporal,
            gamma_s=self.gamma_s * spatial,
            gamma_d=self.gamma_d * depth,
            gamma_w=self.gamma_w * width,
            gamma_b=self.gamma_b * bottleneck,
        )

    @property
    def stride(self) -> int:
        """Frames of the video from one of the clip to the next."""
        return max(round(self.gamma_tau), 1)

    @property
    def num_frames(self) -> int:
        """T."""
        return max(round(self.gamma_t), 1)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return max(round(112 * self.gamma_s), 1)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of res2 to res5, rounded up."""
        return tuple(math.ceil(round(blocks * self.gamma_d, 6)) for blocks in (1, 2, 5, 3))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of res2 to res5, in eights; the stem's are the first."""
        return tuple(round_channels(dim * self.gamma_w) for dim in (24, 48, 96, 192))

    @property
    def inner_widths(self) -> tuple[int, ...]:
        """Channels inside the blocks of res2 to res5, rounded down; conv5's are the last."""
        return tuple(max(int(round(dim * self.gamma_b, 6)), 1) for dim in self.widths)


def _expansion(
    frames: int, stride: int, size: int, depth: float, width: float = 1.0, bottleneck: float = 2.25
) -> Expansion:
    return Expansion(stride, frames, size / 112, depth, width, bottleneck)


XS = _expansion(4, 12, 160, 2.2)
S = _expansion(13, 6, 160, 2.2)
M = _expansion(16, 5, 224, 2.2)
L = _expansion(16, 5, 312, 5.0)
XL = _expansion(16, 5, 312, 5.0, 1.45)


def _conv(dim_in: int, dim_out: int, stride: int = 1) -> nn.Conv3d:
    """Make a 1 x 1 x 1 convolution without bias."""
    return FlatConv3d(dim_in, dim_out, 1, (1, stride, stride), bias=False)


class Stem(nn.Module):
    """A convolution in space, one in time on each channel, norm, ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, dim, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        self.conv_t = FlatConv3d(dim, dim, (5, 1, 1), padding=(2, 0, 0), groups=dim, bias=False)
        self.norm = nn.BatchNorm3d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, H/2, W/2)."""
        return F.relu(self.norm(self.conv_t(self.conv(x))), inplace=True)


class Block(nn.Module):
    """An inverted bottleneck beside a shortcut.

    Args:
        dim_in: Channels that come in.
        dim_inner: Channels of the 3 x 3 x 3 convolution.
        dim_out: Channels that go out.
        stride: In space.
        excite: Whether it has squeeze and excitation, by a 16th of the inner channels.
        norm_shortcut: Whether a shortcut's convolution is normalised even where it keeps the width.
        drop: Share of samples that skip the block in training.
    """

    def __init__(
        self,
        dim_in: int,
        dim_inner: int,
        dim_out: int,
        stride: int,
        excite: bool,
        norm_shortcut: bool,
        drop: float,
    ) -> None:
        super().__init__()
        self.conv_a = _conv(dim_in, dim_inner)
        self.norm_a = nn.BatchNorm3d(dim_inner)
        self.conv_b = DepthwiseConv3d(
            dim_inner, dim_inner, 3, (1, stride, stride), 1, groups=dim_inner, bias=False
        )
        self.norm_b = nn.BatchNorm3d(dim_inner)
        self.se = nn.Identity()
        if excite:
            self.se = SqueezeExcitation(dim_inner, round_channels(dim_inner / 16), F.relu)
        self.conv_c = _conv(dim_inner, dim_out)
        self.norm_c = nn.BatchNorm3d(dim_out)
        self.drop_path = drop_path(drop)
        self.shortcut_conv, self.shortcut_norm = nn.Identity(), nn.Identity()
        if dim_in != dim_out or stride != 1:
            self.shortcut_conv = _conv(dim_in, dim_out, stride)
            if dim_in != dim_out or norm_shortcut:
                self.shortcut_norm = nn.BatchNorm3d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, h, w)."""
        y = F.relu(self.norm_a(self.conv_a(x)), inplace=True)
        y = F.silu(self.se(self.norm_b(self.conv_b(y))))
        y = self.drop_path(self.norm_c(self.conv_c(y)))
        y += self.shortcut_norm(self.shortcut_conv(x))
        return F.relu(y, inplace=True)


class X3D(nn.Module):
    """Stem, four stages, conv5, two linear layers.

    Args:
        num_classes: K; 0 for what fc1 gives.
        expansion: Of it the network has depth and widths; the clip may be any.
        dropout: Before fc2.
        norm_res2: Whether the shortcut of res2 is normalised.
        drop_path: Share of samples that skip the last block in training; earlier ones fewer.

    Raises:
        UserError: `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        expansion: Expansion,
        dropout: float,
        norm_res2: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        drops = iter(path_rates(drop_path, sum(expansion.depths)))
        dim = expansion.widths[0]
        self.stem = Stem(dim)
        stages = zip(expansion.depths, expansion.widths, expansion.inner_widths, strict=True)
        for number, (depth, dim_out, dim_inner) in enumerate(stages):
            blocks = []
            for i in range(depth):
                stride = 1 if i else 2
                drop = next(drops)
                blocks.append(Block(dim, dim_inner, dim_out, stride, i % 2 == 0, norm_res2, drop))
                dim = dim_out
            self.add_module(f"res{number + 2}", nn.Sequential(*blocks))
        self.num_features = dim_inner
        self.conv5 = _conv(dim, dim_inner)
        self.norm5 = nn.BatchNorm3d(dim_inner)
        self.fc1 = nn.Linear(dim_inner, 2048, bias=False)
        self.dropout = nn.Dropout(dropout)
        self._init_weights()
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w), conv5; h and w are a 32nd, rounded up."""
        x = self.stem(depthwise_order(x))
        x = self.res5(self.res4(self.res3(self.res2(x))))
        return F.relu(self.norm5(self.conv5(x)), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        x = F.relu(self.fc1(self.forward_features(x).mean((2, 3, 4))))
        return self.fc2(self.dropout(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace fc2; 0 takes it away."""
        self.fc2 = linear(2048, num_classes)

    def _init_weights(self) -> None:
        """He et al.'s convolutions by fan out, fc1 with 0.01; the last norm of each block at 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block):
                nn.init.zeros_(module.norm_c.weight)
        nn.init.normal_(self.fc1.weight, std=0.01)


def x3d_xs(
    num_classes: int,
    gamma_d: float = 2.2,
    gamma_w: float = 1.0,
    gamma_b: float = 2.25,
    dropout: float = 0.5,
    norm_res2: bool = False,
    drop_path: float = 0.0,
) -> X3D:
    """Build X3D-XS: 4 frames, 12 apart, of 160 pixels; 182 at test time."""
    expansion = replace(XS, gamma_d=gamma_d, gamma_w=gamma_w, gamma_b=gamma_b)
    return X3D(num_classes, expansion, dropout, norm_res2, drop_path)


def x3d_s(
    num_classes: int,
    gamma_d: float = 2.2,
    gamma_w: float = 1.0,
    gamma_b: float = 2.25,
    dropout: float = 0.5,
    norm_res2: bool = False,
    drop_path: float = 0.0,
) -> X3D:
    """Build X3D-S: 13 frames, 6 apart, of 160 pixels; 182 at test time."""
    expansion = replace(S, gamma_d=gamma_d, gamma_w=gamma_w, gamma_b=gamma_b)
    return X3D(num_classes, expansion, dropout, norm_res2, drop_path)


def x3d_m(
    num_classes: int,
    gamma_d: float = 2.2,
    gamma_w: float = 1.0,
    gamma_b: float = 2.25,
    dropout: float = 0.5,
    norm_res2: bool = False,
    drop_path: float = 0.0,
) -> X3D:
    """Build X3D-M: 16 frames, 5 apart, of 224 pixels; 256 at test time."""
    expansion = replace(M, gamma_d=gamma_d, gamma_w=gamma_w, gamma_b=gamma_b)
    return X3D(num_classes, expansion, dropout, norm_res2, drop_path)


def x3d_l(
    num_classes: int,
    gamma_d: float = 5.0,
    gamma_w: float = 1.0,
    gamma_b: float = 2.25,
    dropout: float = 0.5,
    norm_res2: bool = False,
    drop_path: float = 0.0,
) -> X3D:
    """Build X3D-L: 16 frames, 5 apart, of 312 pixels; 356 at test time."""
    expansion = replace(L, gamma_d=gamma_d, gamma_w=gamma_w, gamma_b=gamma_b)
    return X3D(num_classes, expansion, dropout, norm_res2, drop_path)


def x3d_xl(
    num_classes: int,
    gamma_d: float = 5.0,
    gamma_w: float = 1.45,
    gamma_b: float = 2.25,
    dropout: float = 0.5,
    norm_res2: bool = False,
    drop_path: float = 0.0,
) -> X3D:
    """Build X3D-XL: 16 frames, 5 apart, of 312 pixels; 356 at test time. Wider than L by 1.45."""
    expansion = replace(XL, gamma_d=gamma_d, gamma_w=gamma_w, gamma_b=gamma_b)
    return X3D(num_classes, expansion, dropout, norm_res2, drop_path)
