"""3D ResNets of 18 layers: R3D, mixed convolutions (MC3) and R(2+1)D.

Tran, Wang, Torresani, Ray, LeCun, Paluri. "A Closer Look at Spatiotemporal Convolutions for Action
Recognition." CVPR 2018. https://arxiv.org/abs/1711.11248

A stem and four stages of two basic blocks each, then the mean over time and space and one linear
layer. They differ in what stands in for a convolution of 3 x 3 in a 2D ResNet-18:

                   stem                 stage 1      stages 2 to 4   T after them, from 16
    r3d_18         3 x 7 x 7            3 x 3 x 3    3 x 3 x 3       16  8  4  2
    mc3_18         3 x 7 x 7            3 x 3 x 3    1 x 3 x 3       16 16 16 16
    r2plus1d_18    1 x 7 x 7, 3 x 1 x 1    1 x 3 x 3, 3 x 1 x 1      16  8  4  2

Space is halved in the stem and at the start of stages 2 to 4. Between the two halves of a (2+1)D
convolution lie a batch norm and a ReLU, and as many channels as make it as large as the 3D one.
Every map is padded to keep its length, so that any clip will do.

The submodules bear torchvision's names: its weights load as they are. Non-local blocks, where asked
for, are `layer2.after1` and `layer3.after1`.

Departs from the paper: where torchvision, whose weights these are made for, does. The channels inside
a (2+1)D convolution are counted once for both convolutions of a block, from the first one's widths;
the stem has 45 of them.

Parameters with 400 classes: 33,371,472, 11,695,440 and 31,505,325; multiply-adds of 16 frames of 112:
40.697, 43.343 and 40.519 G, as tests/models/test_resnet3d.py asserts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vidtrain.layers.bottleneck import conv_of
from vidtrain.layers.drop_path import drop_path, path_rates
from vidtrain.layers.flat import dense_order
from vidtrain.layers.head import linear
from vidtrain.layers.non_local import non_local_blocks

DEPTH = 2  # blocks in each of the four stages


class Conv2Plus1D(nn.Sequential):
    """A convolution over space, batch norm, ReLU, and one over time.

    Args:
        dim_in: Channels that come in.
        dim_mid: Channels between the two.
        dim_out: Channels that go out.
        extent: Side of the kernel in space; in time it is 3.
        stride: Of the two, in t, h, w.
    """

    def __init__(
        self, dim_in: int, dim_mid: int, dim_out: int, extent: int, stride: tuple[int, int, int]
    ) -> None:
        t, h, w = stride
        super().__init__(
            conv_of(dim_in, dim_mid, (1, extent, extent), (1, h, w)),
            nn.BatchNorm3d(dim_mid),
            nn.ReLU(inplace=True),
            conv_of(dim_mid, dim_out, (3, 1, 1), (t, 1, 1)),
        )


def _conv(kind: str, dims: tuple[int, int, int], stride: tuple[int, int, int]) -> nn.Module:
    """Make a convolution of 3 x 3 in space: `dims` are the channels in, between and out."""
    if kind == "2plus1d":
        return Conv2Plus1D(*dims, 3, stride)
    return conv_of(dims[0], dims[2], (3 if kind == "3d" else 1, 3, 3), stride)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut.

    Args:
        kind: Of both: 3d, 2d (of each frame by itself) or 2plus1d.
        dim_in: Channels that come in.
        dim: Channels that go out.
        stride: 2 halves space, and time as well unless the kind is 2d.
        drop: Share of samples that skip the block in training.
    """

    def __init__(self, kind: str, dim_in: int, dim: int, stride: int, drop: float) -> None:
        super().__init__()
        strides = (1 if kind == "2d" else stride, stride, stride)
        mid = 27 * dim_in * dim // (9 * dim_in + 3 * dim)  # as many weights as 3 x 3 x 3 has
        self.conv1 = nn.Sequential(
            _conv(kind, (dim_in, mid, dim), strides), nn.BatchNorm3d(dim), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(_conv(kind, (dim, mid, dim), (1, 1, 1)), nn.BatchNorm3d(dim))
        self.drop_path = drop_path(drop)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if dim_in != dim or stride != 1:
            self.downsample = nn.Sequential(
                conv_of(dim_in, dim, (1, 1, 1), strides), nn.BatchNorm3d(dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, t, h, w)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.drop_path(self.conv2(self.conv1(x))).add_(shortcut))


class ResNet3D18(nn.Module):
    """A stem, four stages of two basic blocks, the mean, and a linear classifier.

    Args:
        num_classes: K; 0 for the mean itself.
        kinds: Of the convolutions of the four stages: 3d, 2d or 2plus1d; the stem is a 3D
            convolution, or a (2+1)D one where the first stage has such.
        width: Channels of the stem and of stage 1; each later stage has twice those before.
        non_local: Pairwise function of a non-local block behind each of stages 2 and 3, where Wang et
            al. 2018 put theirs; None for no such blocks.
        drop_path: Share of samples that skip the last block in training; earlier ones fewer.

    Raises:
        UserError: there is no such pairwise function, or `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        kinds: Sequence[str],
        width: int,
        non_local: str | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.num_features = 8 * width
        stride = (1, 2, 2)
        if kinds[0] == "2plus1d":
            conv = [*Conv2Plus1D(3, max(1, 45 * width // 64), width, 7, stride)]
        else:
            conv = [conv_of(3, width, (3, 7, 7), stride)]
        self.stem = nn.Sequential(*conv, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        drops = path_rates(drop_path, 4 * DEPTH)
        self.layer1 = _stage(kinds[0], width, width, 1, None, drops[:DEPTH])
        self.layer2 = _stage(kinds[1], width, 2 * width, 2, non_local, drops[DEPTH : 2 * DEPTH])
        self.layer3 = _stage(
            kinds[2], 2 * width, 4 * width, 2, non_local, drops[2 * DEPTH : 3 * DEPTH]
        )
        self.layer4 = _stage(kinds[3], 4 * width, 8 * width, 2, None, drops[3 * DEPTH :])
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): T / 8, but T in mc3_18; H / 16, W / 16; rounded up."""
        x = self.stem(dense_order(x))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.fc(self.forward_features(x).mean((2, 3, 4)))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.fc = linear(self.num_features, num_classes)


def _stage(
    kind: str,
    dim_in: int,
    dim: int,
    stride: int,
    non_local: str | None,
    drops: Sequence[float],
) -> nn.Sequential:
    """Make a stage of as many blocks as `drops`; a non-local one after the last is called `after1`."""
    first, *rest = drops
    stage = nn.Sequential(BasicBlock(kind, dim_in, dim, stride, first))
    for drop in rest:
        stage.append(BasicBlock(kind, dim, dim, 1, drop))
    for number, block in non_local_blocks(dim, non_local, (DEPTH - 1,), (1, 2, 2)).items():
        stage.add_module(f"after{number}", block)
    return stage


def r3d_18(
    num_classes: int, width: int = 64, non_local: str | None = None, drop_path: float = 0.0
) -> ResNet3D18:
    """Build R3D-18: 3D convolutions throughout."""
    return ResNet3D18(num_classes, ("3d", "3d", "3d", "3d"), width, non_local, drop_path)


def mc3_18(
    num_classes: int, width: int = 64, non_local: str | None = None, drop_path: float = 0.0
) -> ResNet3D18:
    """Build MC3-18: 3D convolutions in the stem and stage 1, 2D ones from there on."""
    return ResNet3D18(num_classes, ("3d", "2d", "2d", "2d"), width, non_local, drop_path)


def r2plus1d_18(
    num_classes: int, width: int = 64, non_local: str | None = None, drop_path: float = 0.0
) -> ResNet3D18:
    """Build R(2+1)D-18: each 3D convolution as one over space and one over time."""
    return ResNet3D18(num_classes, ("2plus1d",) * 4, width, non_local, drop_path)
