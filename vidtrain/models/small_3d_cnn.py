"""A small 3D CNN: the network to start with, made to learn from scratch on a CPU.

Of this house, after no paper: four 3 x 3 x 3 convolutions, each with batch norm and ReLU, that
stride where others pool, and a linear classifier on the mean over time and space.

    stage   kernel   stride (t, h, w)   out, from 3 x 16 x 56 x 56
    0       3        1, 2, 2             16 x 16 x 28 x 28
    1       3        2, 2, 2             32 x  8 x 14 x 14
    2       3        2, 2, 2             64 x  4 x  7 x  7
    3       3        1, 2, 2            128 x  4 x  4 x  4

Full 3 x 3 x 3 kernels: taken apart into space and time they are slower on a CPU, where a layer costs
its reading and writing more than its multiply-adds. Space is halved at once and time one layer
later, so that motion is first seen at the clip's own frame rate. Maps are padded to keep their
length, so that any clip will do, down to one pixel of one frame.

Parameters with 8 classes: 293,112; multiply-adds at 16 x 56: 62.9 M, as
tests/models/test_small_3d_cnn.py asserts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vidtrain.layers.flat import dense_order

STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))  # of the stages, in t, h, w


class ConvNormReLU(nn.Sequential):
    """A 3 x 3 x 3 convolution, batch norm and ReLU."""

    def __init__(self, dim_in: int, dim_out: int, stride: tuple[int, int, int]) -> None:
        super().__init__(
            nn.Conv3d(dim_in, dim_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm3d(dim_out),
            nn.ReLU(inplace=True),
        )


class Small3DCNN(nn.Module):
    """Four convolutions, the mean of what they find, and a linear classifier.

    Args:
        num_classes: K; 0 for the mean itself.
        widths: Channels of the four stages.
        dropout: Before the classifier.
    """

    inputs = ("video",)

    def __init__(self, num_classes: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        dims = (3, *widths)
        self.stages = nn.Sequential(
            *(
                ConvNormReLU(dim_in, dim_out, stride)
                for dim_in, dim_out, stride in zip(dims[:-1], dims[1:], STRIDES, strict=True)
            )
        )
        self.num_features = dims[-1]
        self.dropout = nn.Dropout(dropout)
        self.reset_classifier(num_classes)
        self._init_weights()

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): T / 4, H / 16, W / 16, rounded up."""
        return self.stages(dense_order(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        x = self.forward_features(x).mean((2, 3, 4))  # (B, D)
        return self.classifier(self.dropout(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = (
            nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        )

    def _init_weights(self) -> None:
        """He et al. 2015 for convolutions, whose ReLUs pass on half; the rest as in PyTorch."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def small_3d_cnn(
    num_classes: int, widths: Sequence[int] = (16, 32, 64, 128), dropout: float = 0.2
) -> Small3DCNN:
    """Build the small 3D CNN."""
    return Small3DCNN(num_classes, widths, dropout)
