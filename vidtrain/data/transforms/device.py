"""What happens to a batch after it has moved: gather its views, jitter colours, become float.

The batch travels as uint8, each wanted frame once; everything that makes it larger happens here.
The one permute from `T C` to `C T` of the whole house is in `DeviceTransform.forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def gather_views(frames: Tensor, view_frames: Tensor, view_crops: Tensor) -> Tensor:
    """Make a video's views of its frames.

    Args:
        frames: `(N, C, H, W)`, each wanted frame once.
        view_frames: `(V, T)`, which of them make a view.
        view_crops: `(V, 3)`, the view's top, left and size in pixels.

    Returns:
        `(V, T, C, size, size)`.
    """
    views = []
    for picked, (top, left, size) in zip(view_frames, view_crops.tolist(), strict=True):
        views.append(frames[..., top : top + size, left : left + size][picked])
    return torch.stack(views)


def jitter_colors(video: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation of each view, all its frames alike.

    Args:
        video: `(B, V, T, C, H, W)` float in 0 to 1.
        strength: each factor is drawn from `1 - strength` to `1 + strength`.
        generator: of the CPU; what is drawn is the same on every device.
    """
    draws = torch.rand(3, *video.shape[:2], 1, 1, 1, 1, generator=generator) * 2 - 1
    brightness, contrast, saturation = (1 + draws * strength).to(video)
    video = video * brightness
    luma = video.new_tensor([0.299, 0.587, 0.114]).view(1, 1, 1, 3, 1, 1)  # ITU-R BT.601
    grey = (video * luma).sum(3, keepdim=True)
    mean = grey.mean((2, 3, 4, 5), keepdim=True)
    video = mean + (video - mean) * contrast
    grey = (video * luma).sum(3, keepdim=True)
    video = grey + (video - grey) * saturation
    return video.clamp(0, 1)


class DeviceTransform(nn.Module):
    """uint8 `(B, V, T, C, H, W)`, or frames with their views, -> float `(B, V, C, T, H, W)`."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], color: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, 1, 1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(list(std)).view(1, 1, 1, 3, 1, 1), False)
        self.color = color

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Replace the batch's uint8 frames by the float `video` that models eat."""
        if "frames" in batch:
            parts = (batch.pop("frames"), batch.pop("view_frames"), batch.pop("view_crops"))
            batch["video"] = torch.stack([gather_views(*part) for part in zip(*parts, strict=True)])
        if "video" in batch:
            self.to(batch["video"].device)
            video = batch["video"].float() / 255
            if self.training and self.color:
                # Not the global generator: a run that goes on must draw what was still to come.
                generator = torch.Generator().manual_seed(batch["seed"])
                video = jitter_colors(video, self.color, generator)
            video = (video - self.mean) / self.std
            batch["video"] = video.transpose(2, 3).contiguous()  # (B, V, C, T, H, W)
        return batch
