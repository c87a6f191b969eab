"""What happens to a batch after it has moved: gather its views, jitter colours, mix, become float.

The batch travels as uint8, each wanted frame once; everything that makes it larger happens here.
The one permute from `T C` to `C T` of the whole house is in `to_float`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidtrain.data.flow import ZERO
from vidtrain.data.spill import Spill
from vidtrain.data.transforms import mixing, strong
from vidtrain.data.transforms.sample import Augment


def gather_views(frames: Tensor, view_frames: Tensor, view_crops: np.ndarray) -> Tensor:
    """Make a video's views of its frames, in one step.

    Args:
        frames: `(N, C, H, W)`, each wanted frame once.
        view_frames: `(V, T)`, which of them make a view.
        view_crops: `(V, 3)`, the view's top, left and size in pixels; all of one size.

    Returns:
        `(V, T, C, size, size)`.
    """
    size = int(view_crops[0, 2])
    # All crops that there could be, as a view of the same memory; then one of them for each frame.
    crops = frames.unfold(-2, size, 1).unfold(-2, size, 1)  # (N, C, tops, lefts, size, size)
    places = torch.from_numpy(view_crops[:, :2].T.copy()).to(frames.device, non_blocking=True)
    top, left = places[:, :, None]
    return crops[view_frames, :, top, left]


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def mean_grey(video: Tensor) -> Tensor:
    """Average the luma of each view: `(B, V, T, C, H, W)` uint8 -> `(B, V)`, 0 to 255."""
    colors = video.mean((2, 4, 5), dtype=torch.float32)  # (B, V, C)
    return (colors * colors.new_tensor(LUMA)).sum(-1)


def jitter_colors(video: Tensor, factors: Tensor, grey: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of each view, all its frames alike.

    Args:
        video: `(B, V, C, T, H, W)` float in 0 to 255.
        factors: `(3, B, V)`, of brightness, contrast and saturation; 1 leaves them.
        grey: `(B, V)`, what contrast is stretched around, see `mean_grey`.
    """
    brightness, contrast, saturation = factors[..., None, None, None, None]
    middle = grey[..., None, None, None, None] * brightness
    video = middle + (video * brightness - middle) * contrast
    luma = video.new_tensor(LUMA).view(3, 1, 1, 1)
    own = (video * luma).sum(2, keepdim=True)
    jittered: Tensor = (own + (video - own) * saturation).clamp(0, 255)
    return jittered


def to_float(
    video: Tensor,
    scale: Tensor,
    shift: Tensor,
    colors: tuple[Tensor, Tensor] | None,
    weight: Tensor | None,
) -> Tensor:
    """Do all that changes pixels; a GPU does it in one pass, compiled.

    Args:
        video: `(B, V, T, C, H, W)` uint8.
        scale: `(C, 1, 1, 1)`, what pixels are multiplied by ...
        shift: `(C, 1, 1, 1)`, ... and what is added.
        colors: factors and mean grey for `jitter_colors`; None leaves them.
        weight: `(H, W)`, what a clip keeps of itself, see `mixing`; None mixes nothing.

    Returns:
        `(B, V, C, T, H, W)` float.
    """
    # Bytes are moved, not floats, and what follows is done in place: on a CPU, a sixteenth of the time.
    pixels = video.transpose(2, 3).contiguous().float()
    if colors is not None:
        pixels = jitter_colors(pixels, *colors)
    if weight is not None:
        pixels = pixels * weight + pixels.flip(0) * (1 - weight)
    return pixels.mul_(scale).add_(shift)


def flow_to_float(flow: Tensor, steps: Tensor, mean: bool, weight: Tensor | None) -> Tensor:
    """Turn bytes of flow into displacements; what is farther than the bound stops there.

    Args:
        flow: `(B, V, T, 2, H, W)` uint8, 128 for no motion.
        steps: `(B, V, T, 2)`, what a byte's step is worth, in bounds; below 0 in a mirrored view.
        mean: subtract each field's own mean vector, much of which is the camera's motion (Simonyan &
            Zisserman 2014, 3.1). Fields may then go beyond 1.
        weight: `(H, W)`, what a clip keeps of itself, see `mixing`; None mixes nothing.

    Returns:
        `(B, V, 2, T, H, W)` float from -1 to 1; 128 is exactly 0.
    """
    moves = flow.transpose(2, 3).contiguous().float()
    moves = moves.sub_(ZERO).mul_(steps.transpose(2, 3)[..., None, None]).clamp_(-1, 1)
    if mean:
        moves = moves - moves.mean((-2, -1), keepdim=True)
    if weight is not None:
        moves = moves * weight + moves.flip(0) * (1 - weight)
    return moves


class DeviceTransform(nn.Module):
    """uint8 `(B, V, T, C, H, W)`, or frames with their views, -> float `(B, V, C, T, H, W)`.

    Flow goes the same way, with two channels.

    Args:
        mean: of R, G and B, in 0 to 1.
        std: of R, G and B.
        augment: what is done to training clips here: its `color` (see `jitter_colors`: factors are drawn
            from `1 - color` to `1 + color`), `mixup`, `cutmix`, `rand_augment` and `erase`.
        num_classes: needed to mix labels.
        compile: fuse it all into one kernel; None: on a GPU. Where there is no compiler it is done
            one by one.
        lazily_above: bytes of a batch's views; more of them are made as they are needed.
        flow_mean: subtract each field's mean vector, see `flow_to_float`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None = None,
        num_classes: int | None = None,
        compile: bool | None = None,
        lazily_above: int = 4 << 30,
        flow_mean: bool = False,
    ) -> None:
        super().__init__()
        means, stds = (torch.tensor(list(part)).view(3, 1, 1, 1) for part in (mean, std))
        self.register_buffer("scale", 1 / (255 * stds), False)
        self.register_buffer("shift", -means / stds, False)
        self.augment = augment or Augment()
        self.fill = [round(255 * part) for part in mean]  # becomes 0
        self.num_classes, self.compile_on = num_classes, compile
        self.lazily_above = lazily_above
        self.flow_mean = flow_mean
        self.fused: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Replace the batch's uint8 frames and fields by the float `video` and `flow` of models."""
        steps = batch.pop("flow_steps", None)
        if "view_crops" in batch:
            crops = batch.pop("view_crops")
            made = {}
            if "frames" in batch:
                frames = batch.pop("frames"), batch.pop("view_frames")
                made["video"] = Views(*frames, crops, self)
            if "fields" in batch:
                fields = batch.pop("fields"), batch.pop("view_fields")
                made["flow"] = Views(*fields, crops, self, steps)
            lazily = sum(views.bytes for views in made.values()) > self.lazily_above
            batch.update({key: views if lazily else views.all() for key, views in made.items()})
            return batch
        keys = [key for key in ("video", "flow") if key in batch]
        if not keys:
            return batch
        factors = weight = None
        if self.training:
            # Not the global generator: a run that goes on must draw what was still to come.
            rng = np.random.default_rng([batch["seed"], 1])
            augment, shape = self.augment, batch[keys[0]].shape
            if augment.color:
                draws = rng.uniform(-augment.color, augment.color, (3, *shape[:2]))
                factors = torch.from_numpy(1 + draws).float()
            height, width = shape[-2:]
            mix = mixing.draw(height, width, augment.mixup, augment.cutmix, rng)
            if mix is not None:
                assert self.num_classes is not None
                weight = mix.weight
                batch["label"] = mixing.mix_labels(batch["label"], mix.share, self.num_classes)
            if augment.rand_augment:
                ops, magnitude = augment.rand_augment, augment.rand_magnitude
                batch["video"] = strong.rand_augment(batch["video"], ops, magnitude, self.fill, rng)
        if "video" in batch:
            batch["video"] = self.to_float(batch["video"], factors, weight)
            if self.training and self.augment.erase:
                strong.erase(batch["video"], self.augment.erase, self.augment.erase_area, rng)
        if "flow" in batch:
            batch["flow"] = self.flow_to_float(batch["flow"], steps, weight)
        return batch

    def to_float(
        self, video: Tensor, factors: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Run `to_float` on the video's device, compiled where that works."""
        if self.scale.device != video.device:
            self.to(video.device)
        colors = None
        if (
            factors is not None
        ):  # a sum over pixels first: fused with the rest it costs all the gain
            colors = factors.to(video.device, non_blocking=True), mean_grey(video)
        if weight is not None:
            weight = weight.to(video.device, non_blocking=True)
        return self._run(to_float, video, self.scale, self.shift, colors, weight)

    def flow_to_float(self, flow: Tensor, steps: Tensor, weight: Tensor | None = None) -> Tensor:
        """Run `flow_to_float` on the flow's device, compiled where that works."""
        steps = steps.to(flow.device, non_blocking=True)
        if weight is not None:
            weight = weight.to(flow.device, non_blocking=True)
        return self._run(flow_to_float, flow, steps, self.flow_mean, weight)

    def _run(self, function: Callable[..., Tensor], pixels: Tensor, *others: Any) -> Tensor:
        if not self.wants_compiling(pixels.device):
            return function(pixels, *others)
        if function not in self.fused:
            self.fused[function] = torch.compile(function, dynamic=True)
        try:
            return self.fused[function](pixels, *others)
        except Exception:  # no compiler, an old driver: whatever it is, there is another way
            if self.compile_on:
                raise
            self.compile_on = False
            return function(pixels, *others)

    def wants_compiling(self, device: torch.device) -> bool:
        """Say whether to fuse: where it was asked for, else on a GPU, where a second pays at once."""
        return device.type == "cuda" if self.compile_on is None else self.compile_on


class Views:
    """The views of a batch of videos under test, made of their frames when they are asked for.

    Args:
        frames: `(N, C, H, W)` of each video, or its `(M, 2, H, W)` fields.
        view_frames: `(V, T)` of each, see `gather_views`.
        view_crops: `(V, 3)` of each.
        transform: what makes them float.
        steps: `(B, V, T, 2)` of fields, see `flow_to_float`; None: these are frames.

    Attributes:
        shape: `(B, V, C, T, H, W)`.
        bytes: of all of them, as float.
    """

    def __init__(
        self,
        frames: Sequence[Tensor | Spill],
        view_frames: Sequence[Tensor],
        view_crops: Sequence[np.ndarray],
        transform: DeviceTransform,
        steps: Tensor | None = None,
    ) -> None:
        self.frames, self.view_frames, self.view_crops = frames, view_frames, view_crops
        self.transform, self.steps = transform, steps
        views, length = view_frames[0].shape
        size = int(view_crops[0][0, 2])
        channels = 3 if steps is None else 2
        self.shape = torch.Size([len(frames), views, channels, length, size, size])
        self.bytes = 4 * self.shape.numel()

    def make(self, video: int, first: int, last: int) -> Tensor:
        """Make views `first` to `last` of one video: `(n, C, T, H, W)` float."""
        frames, wanted = self.frames[video], self.view_frames[video][first:last]
        if isinstance(frames, Spill):  # fetch what these views need, from the file
            device = wanted.device
            numbers, places = torch.unique(wanted, return_inverse=True)
            frames = frames.tensor[numbers.cpu()].to(device)
            wanted = places
        crops = self.view_crops[video][first:last]
        views = gather_views(frames, wanted, crops)[None]
        if self.steps is None:
            return self.transform.to_float(views)[0]
        return self.transform.flow_to_float(views, self.steps[video : video + 1, first:last])[0]

    def pieces(self, size: int | None) -> Iterator[Tensor]:
        """Yield the views of one video after another, `size` at a time: `(n, C, T, H, W)` float.

        Args:
            size: None: as many as `lazily_above` bytes hold.
        """
        views = self.shape[1]
        if size is None:
            one = self.bytes // (len(self.frames) * views)
            size = max(1, self.transform.lazily_above // one)
        for video in range(len(self.frames)):
            for first in range(0, views, size):
                yield self.make(video, first, min(views, first + size))

    def all(self) -> Tensor:
        """Make them all: `(B, V, C, T, H, W)` float."""
        made = [self.make(video, 0, self.shape[1]) for video in range(len(self.frames))]
        return made[0][None] if len(made) == 1 else torch.stack(made)

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        """Make one: video and view -> `(C, T, H, W)` float."""
        video, view = place
        return self.make(video, view, view + 1)[0]
