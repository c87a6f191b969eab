"""Recurrent convolutional networks: states are maps, and products with them are convolutions.

Ballas, Yao, Pal, Courville. "Delving Deeper into Convolutional Networks for Learning Video
Representations." ICLR 2016. https://arxiv.org/abs/1511.06432

`gru_rcn` reads an image network at five depths. Frame by frame, a gated recurrent unit at each depth
takes the map that it finds there (in it all products are convolutions); its state after the last
frame is averaged over space and goes into a classifier of its own.

    level   x of VGG-16   state       kernel   parameters
    pool2   128 x 56^2     64 x 56^2   3 x 3       331,968
    pool3   256 x 28^2    128 x 28^2   3 x 3     1,327,488
    pool4   512 x 14^2    256 x 14^2   3 x 3     5,309,184
    pool5   512 x  7^2    256 x  7^2   3 x 3     5,309,184
    fc7    4096           512          1 x 1     7,079,424
                                                19,357,248

The answers are (B, 5, K), one of each classifier: each has its loss, and a video's score is the mean
of their five softmaxes. `stacked`: a unit also sees the new state of the one below, max-pooled to its
size. `bidirectional`: a second set of units goes from the last frame to the first, and both last
states go into the classifier.

`rcn` is the form of CS231n's lecture on video understanding (Gao, 2025), slides 57 to 63: layers of
`h_t = tanh(W_h * h_{t-1} + W_x * x_t)`, each of which reads the states of the one below.

Any 2D network of torchvision, or `small`, goes in the place of VGG-16: its levels are the maps right
after it shrinks them, the last four times, and what its last layer is fed with.

Departs from the paper: VGG-16's own dropout is off, so that a frozen one gives the same features
every time; first weights are those that torch gives to convolutions. The lecture has no numbers:
`rcn` has three layers of stride 2 over frames, with the mean of the last state into one linear layer.

Multiply-adds of the five units 3.387 G a frame at 224 x 224, beside VGG-16's 15.466, as
tests/models/test_gru_rcn.py asserts (and the parameters above, and 221,312 of a tanh layer of
3 x 3 from 64 to 128).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtrain.layers.image import image_net, run_stages, stage_shapes
from vidtrain.layers.recurrent import ConvGRU, ConvRNN
from vidtrain.types import UserError

LEVELS = 4  # of maps; with the embedding there are five


def _linear(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


class Percepts(nn.Module):
    """An image network that gives its maps at four depths, and its embedding.

    Args:
        name: Of a 2D network of torchvision, or small.
        size: Height and width of the frames.

    Attributes:
        dims: Channels of the five.

    Raises:
        UserError: the network has no four sizes of maps, or no such order of channels.
    """

    def __init__(self, name: str, size: int) -> None:
        super().__init__()
        self.net = image_net(name, 0, size)
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        shapes = stage_shapes(self.net, size)[:-1]
        sides = [size, *(shape[-1] for shape in shapes)]
        shrinks = [at for at in range(len(shapes)) if sides[at + 1] < sides[at]]
        if self.net.channels_last or len(shrinks) < LEVELS:
            raise UserError(
                f"model.backbone={name}: gru_rcn reads maps of {LEVELS} sizes, which it does not have"
                f" for frames of {size} pixels; take vgg16, as in the paper, or a ResNet"
            )
        self.taps = shrinks[-LEVELS:]
        self.dims = [*(shapes[at][1] for at in self.taps), self.net.num_embedding]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> four maps (N, C, h, w), and (N, E, 1, 1)."""
        percepts = []
        for at, stage in enumerate(self.net.stages()):
            x = stage(x)
            if at in self.taps:
                percepts.append(x)
        return [*percepts, self.net.head(x)[:, :, None, None]]


class GRURCN(nn.Module):
    """Five recurrent units on an image network, and five classifiers.

    Args:
        num_classes: K; 0 for the means of the five last states, one behind the other.
        size: Height and width of the frames.
        backbone: A 2D network of torchvision, or small.
        dims: Channels of the five states.
        dropout: Before each classifier.
        stacked: Units see the state of the one below as well.
        bidirectional: A second set of units goes backwards.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        size: int,
        backbone: str,
        dims: Sequence[int],
        dropout: float,
        stacked: bool,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        if len(dims) != LEVELS + 1:
            raise UserError(f"model.dims is {list(dims)}; gru_rcn has {LEVELS + 1} levels")
        self.backbone = Percepts(backbone, size)
        self.stacked = stacked
        below = [0, *dims[:-1]] if stacked else [0] * len(dims)
        kernels = [3] * LEVELS + [1]
        parts = list(zip(self.backbone.dims, below, dims, kernels, strict=True))
        self.units = nn.ModuleList(
            nn.ModuleList(ConvGRU(x + low, h, kernel) for x, low, h, kernel in parts)
            for _ in range(2 if bidirectional else 1)
        )
        self.widths = [dim * len(self.units) for dim in dims]
        self.num_features = self.widths[-2]
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)

    def states(self, x: Tensor) -> list[list[Tensor]]:
        """(B, 3, T, H, W) -> of each direction, in its order, five times (T, B, D, h, w)."""
        num_frames = x.shape[2]
        percepts = self.backbone(rearrange(x, "b c t h w -> (t b) c h w"))
        percepts = [percept.unflatten(0, (num_frames, -1)) for percept in percepts]
        directions = []
        for way, units in enumerate(self.units):
            states: list[Tensor] = []
            for percept, unit in zip(percepts, units, strict=True):
                seen = percept.flip(0) if way else percept
                if self.stacked and states:
                    low = F.adaptive_max_pool2d(states[-1].flatten(0, 1), seen.shape[-2:])
                    # A convolution of both together is the sum of a convolution of each.
                    seen = torch.cat([seen, low.unflatten(0, seen.shape[:2])], 2)
                states.append(unit(seen))
            directions.append(states)
        return directions

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w), the states of the deepest maps (pool5)."""
        directions = self.states(x)
        ahead, *back = [states[LEVELS - 1] for states in directions]
        both = torch.cat([ahead, *(states.flip(0) for states in back)], 2)
        return rearrange(both, "t b d h w -> b d t h w")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 5, K)."""
        levels = zip(*self.states(x), strict=True)
        lasts = [torch.cat([states[-1].mean((2, 3)) for states in level], 1) for level in levels]
        if isinstance(self.classifiers[0], nn.Identity):
            return torch.cat(lasts, 1)
        answers = [
            classifier(self.dropout(last))
            for classifier, last in zip(self.classifiers, lasts, strict=True)
        ]
        return torch.stack(answers, 1)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the five classifiers; 0 takes them away."""
        self.classifiers = nn.ModuleList(_linear(dim, num_classes) for dim in self.widths)


class RCN(nn.Module):
    """Layers of tanh recurrences over maps, and a classifier of the last state.

    Args:
        num_classes: K; 0 for the mean of the last layer's last state.
        size: Height and width of the frames.
        backbone: What the first layer reads: the map of a 2D network of torchvision, or, with None,
            the frames themselves.
        dims: Channels of each layer's state.
        kernel_size: Of both convolutions of a layer.
        stride: Of the one over what comes in.
        dropout: Before the classifier.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        size: int,
        backbone: str | None,
        dims: Sequence[int],
        kernel_size: int,
        stride: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if not dims or kernel_size % 2 == 0:
            raise UserError(
                f"model.dims is {list(dims)} and model.kernel_size {kernel_size}: an rcn has a layer"
                " or more, and an odd kernel"
            )
        self.backbone = image_net(backbone, None, size) if backbone else None
        dim = self.backbone.num_features if self.backbone is not None else 3
        self.layers = nn.Sequential()
        for width in dims:
            self.layers.append(ConvRNN(dim, width, kernel_size, stride))
            dim = width
        self.num_features = dim
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)

    def states(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (T, B, D, h, w), the last layer's."""
        frames = rearrange(x, "b c t h w -> (t b) c h w")
        if self.backbone is not None:
            frames = self.backbone.to_map(run_stages(self.backbone, frames))
        states: Tensor = self.layers(frames.unflatten(0, (x.shape[2], -1)))
        return states

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w)."""
        return rearrange(self.states(x), "t b d h w -> b d t h w")

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.classifier(self.dropout(self.states(x)[-1].mean((2, 3))))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = _linear(self.num_features, num_classes)


def gru_rcn(
    num_classes: int,
    size: int = 224,
    backbone: str = "vgg16",
    dims: Sequence[int] = (64, 128, 256, 256, 512),
    dropout: float = 0.7,
    stacked: bool = False,
    bidirectional: bool = False,
) -> GRURCN:
    """Build GRU-RCN; `stacked` and `bidirectional` are the paper's two other forms."""
    return GRURCN(num_classes, size, backbone, dims, dropout, stacked, bidirectional)


def rcn(
    num_classes: int,
    size: int = 112,
    backbone: str | None = None,
    dims: Sequence[int] = (32, 64, 128),
    kernel_size: int = 3,
    stride: int = 2,
    dropout: float = 0.5,
) -> RCN:
    """Build the lecture's recurrent convolutional network, on frames or on a backbone's map."""
    return RCN(num_classes, size, backbone, dims, kernel_size, stride, dropout)
