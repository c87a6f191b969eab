"""Three small networks that see time late, early, or all along.

The table of receptive fields on slides 24-31 of CS231n's lecture on video understanding (Gao,
2025), which compares them layer by layer on clips of 20 frames of 64 x 64 pixels. Between the
slides' convolutions and poolings stands a ReLU, after them a linear classifier.

    late fusion    2D convolutions on each frame; time is averaged away at the end
    early fusion   the first 2D convolution takes all frames as channels; no time after it
    3D CNN         time shrinks as slowly as space

`vidtrain summary model=toy_3d_cnn` prints its column of the table.

Parameters with 10 classes: 3,202 / 9,358 / 9,034, as tests/models/test_toy.py asserts.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtrain.layers.frames import check_clip, fold_time, unfold_time
from vidtrain.layers.pool import GlobalAvgPool


class ToyLateFusion(nn.Module):
    """2D convolutions on each frame, then the mean over time and space."""

    inputs = ("video",)
    num_features = 24

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.pool1 = nn.MaxPool2d(4)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.pool2 = GlobalAvgPool()
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 24, T, h, w)."""
        num_frames = x.shape[2]
        x = self.pool1(F.relu(self.conv1(fold_time(x))))
        return unfold_time(F.relu(self.conv2(x)), num_frames)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.classifier(self.pool2(self.forward_features(x)).flatten(1))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = nn.Linear(24, num_classes) if num_classes else nn.Identity()


class ToyEarlyFusion(nn.Module):
    """One 2D convolution over all frames at once, then an image network."""

    inputs = ("video",)
    num_features = 24

    def __init__(self, num_classes: int, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.conv1 = nn.Conv2d(3 * num_frames, 12, 3, padding=1)
        self.pool1 = nn.MaxPool2d(4)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.pool2 = nn.AdaptiveAvgPool2d(1)
        self.reset_classifier(num_classes)

    def _map(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 24, h, w)."""
        check_clip(x, self.num_frames)
        x = rearrange(x, "b c t h w -> b (t c) h w")
        return F.relu(self.conv2(self.pool1(F.relu(self.conv1(x)))))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 24, 1, h, w)."""
        return self._map(x).unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.classifier(self.pool2(self._map(x)).flatten(1))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = nn.Linear(24, num_classes) if num_classes else nn.Identity()


class Toy3dCnn(nn.Module):
    """3D convolutions and 3D pooling."""

    inputs = ("video",)
    num_features = 24

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 12, 3, padding=1)
        self.pool1 = nn.MaxPool3d(4)
        self.conv2 = nn.Conv3d(12, 24, 3, padding=1)
        self.pool2 = GlobalAvgPool(keep_time=False)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 24, t, h, w)."""
        return F.relu(self.conv2(self.pool1(F.relu(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.classifier(self.pool2(self.forward_features(x)).flatten(1))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = nn.Linear(24, num_classes) if num_classes else nn.Identity()


def toy_late_fusion(num_classes: int) -> ToyLateFusion:
    """Build the late fusion column of the table."""
    return ToyLateFusion(num_classes)


def toy_early_fusion(num_classes: int, num_frames: int) -> ToyEarlyFusion:
    """Build the early fusion column of the table."""
    return ToyEarlyFusion(num_classes, num_frames)


def toy_3d_cnn(num_classes: int) -> Toy3dCnn:
    """Build the 3D CNN column of the table."""
    return Toy3dCnn(num_classes)
