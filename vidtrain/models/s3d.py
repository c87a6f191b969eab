"""S3D: I3D with each 3D convolution taken apart into space and time.

Xie, Sun, Huang, Tu, Murphy. "Rethinking Spatiotemporal Feature Learning: Speed-Accuracy Trade-offs in
Video Classification." ECCV 2018. https://arxiv.org/abs/1712.04851

Inception v1 with a time axis, where a kernel of k x k is one of 1 x k x k and then one of k x 1 x 1,
each with batch norm and ReLU. From 16 frames of 224:

    0        apart 7, stride 2                  64 x  8 x 112 x 112
    1        max 1 x 3 x 3, stride 1, 2, 2      64 x  8 x  56 x  56
    2, 3     1 x 1 x 1; apart 3                192 x  8 x  56 x  56
    4        max 1 x 3 x 3, stride 1, 2, 2     192 x  8 x  28 x  28
    5, 6     mixed 3b, 3c                      480 x  8 x  28 x  28
    7        max 3, stride 2                   480 x  4 x  14 x  14
    8 to 12  mixed 4b ... 4f                   832 x  4 x  14 x  14
    13       max 2, stride 2                   832 x  2 x   7 x   7
    14, 15   mixed 5b, 5c                     1024 x  2 x   7 x   7
    means over windows of 2 x 7 x 7, dropout, 1 x 1 x 1, averaged over time and space

Clips of at least 5 frames of 17 pixels; a map smaller than the last window is averaged whole.

The submodules bear torchvision's names: its weights load as they are.

Departs from the paper: where torchvision does. Maps are padded by the same amount on both sides,
where TensorFlow's would be uneven. Gating (S3D-G) is left out.

Parameters with 400 classes: 8,320,048; multiply-adds of 16 frames of 224: 17.979 G, as
tests/models/test_s3d.py asserts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidtrain.layers.flat import dense_order
from vidtrain.layers.inception import WIDTHS, out_channels, window_means
from vidtrain.types import UserError


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the length of its axes, or strides; batch norm and ReLU."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel: tuple[int, int, int] = (1, 1, 1),
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        padding = tuple(k // 2 for k in kernel)
        super().__init__(
            nn.Conv3d(dim_in, dim_out, kernel, stride, padding, bias=False),
            nn.BatchNorm3d(dim_out, eps=1e-3, momentum=1e-3),
            nn.ReLU(inplace=True),
        )


class SeparableConv(nn.Sequential):
    """A convolution over space, then one over time, both with batch norm and ReLU.

    Args:
        dim_in: Channels that come in.
        dim_out: Channels that go out, of both.
        extent: Of the kernels.
        stride: In t, h and w.
    """

    def __init__(self, dim_in: int, dim_out: int, extent: int, stride: int = 1) -> None:
        super().__init__(
            ConvNormReLU(dim_in, dim_out, (1, extent, extent), (1, stride, stride)),
            ConvNormReLU(dim_out, dim_out, (extent, 1, 1), (stride, 1, 1)),
        )


class Mixed(nn.Module):
    """Four branches side by side: 1; 1 and 3 apart; 1 and 3 apart; a pool of 3 and 1.

    Args:
        name: Which module of Inception it is: 3b, 3c, 4b, ...
        dim_in: Channels that come in.
    """

    def __init__(self, name: str, dim_in: int) -> None:
        super().__init__()
        alone, (first, second), (third, fourth), pooled = WIDTHS[name]
        self.branch0 = ConvNormReLU(dim_in, alone)
        self.branch1 = nn.Sequential(ConvNormReLU(dim_in, first), SeparableConv(first, second, 3))
        self.branch2 = nn.Sequential(ConvNormReLU(dim_in, third), SeparableConv(third, fourth, 3))
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), ConvNormReLU(dim_in, pooled))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, H, W)."""
        branches = [self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)]
        return torch.cat(branches, dim=1)


class S3D(nn.Module):
    """Separable Inception v1.

    Args:
        num_classes: K; 0 for the mean before the classifier.
        dropout: Before the classifier.
    """

    inputs = ("video",)
    num_features = 1024

    def __init__(self, num_classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            SeparableConv(3, 64, 7, stride=2),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            ConvNormReLU(64, 64),
            SeparableConv(64, 192, 3),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        ]
        dim = 192
        for name in WIDTHS:
            if name == "4b":
                layers.append(nn.MaxPool3d(3, 2, 1))
            elif name == "5b":
                layers.append(nn.MaxPool3d(2))
            layers.append(Mixed(name, dim))
            dim = out_channels(name)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Identity())
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 1024, t, h, w): T / 8, H / 32, W / 32.

        Raises:
            UserError: the clip is too small for the pools.
        """
        if x.shape[2] < 5 or min(x.shape[3:]) < 17:
            raise UserError(
                f"s3d halves time three times and space five times: {x.shape[2]} frames of"
                f" {x.shape[3]} x {x.shape[4]} pixels leave nothing; clip.num_frames must be at"
                " least 5 and clip.size at least 17"
            )
        return self.features(dense_order(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.classifier(window_means(self.forward_features(x))).mean((2, 3, 4))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        last = nn.Conv3d(self.num_features, num_classes, 1) if num_classes else nn.Identity()
        self.classifier[1] = last


def s3d(num_classes: int, dropout: float = 0.2) -> S3D:
    """Build S3D."""
    return S3D(num_classes, dropout)
