"""Geometry, drawn once per view before decoding, applied in the worker while pixels are uint8.

A `Geometry` is a box in the video's own pixels and a flip: scale jitter, random resized crops and
plain crops all come down to it, and whatever belongs to the frames (flow, boxes) moves with it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vidtrain.types import Box, UserError


class Geometry(NamedTuple):
    """A box in source pixels that becomes the crop, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def moved(self, down: int, right: int) -> Geometry:
        """Give the same box seen from elsewhere."""
        return self._replace(top=self.top + down, left=self.left + right)

    def scaled(self, down: float, across: float) -> Geometry:
        """Give the same part of a picture so many times as high and as wide, in whole pixels of it."""
        bottom = max(1, round((self.top + self.height) * down))
        right = max(1, round((self.left + self.width) * across))
        top = min(round(self.top * down), bottom - 1)
        left = min(round(self.left * across), right - 1)
        return Geometry(top, left, bottom - top, right - left, self.flip)


# Quarters of the way down and right: corners, middles of the edges, the middle, and a place off each corner.
PLACES = [(i, j) for i in range(5) for j in range(5) if i % 2 == 0 and j % 2 == 0]
PLACES += [(i, j) for i in (1, 3) for j in (1, 3)]


def is_number(value: object) -> bool:
    """Tell a number from what else a setting may be."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Augment:
    """How strongly to disturb a training clip: the knobs of conf/augment/."""

    scale: Sequence[float] | None = None
    area: Sequence[float] | None = None
    sides: Sequence[float] | None = None
    ratio: Sequence[float] = (0.75, 4 / 3)
    hflip: float = 0.0
    color: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    rand_augment: int = 0
    rand_magnitude: int = 9
    erase: float = 0.0
    erase_area: Sequence[float] = (0.02, 1 / 3)

    def __post_init__(self) -> None:
        """Refuse knobs that cannot be turned that way."""
        crops = [name for name in ("scale", "area", "sides") if getattr(self, name) is not None]
        if len(crops) > 1:
            raise UserError(
                f"augment.{crops[0]} and augment.{crops[1]} exclude each other; set one to null"
            )
        if self.sides is not None and not (
            isinstance(self.sides, Sequence)
            and not isinstance(self.sides, str)
            and len(self.sides) > 0
            and all(is_number(side) and 0 < side <= 1 for side in self.sides)
        ):
            raise UserError(
                f"augment.sides is {self.sides!r}; it takes numbers above 0, at most 1: [1, 0.875, 0.75, 0.66]"
            )
        for name, low, high in (
            ("scale", 1.0, math.inf),
            ("area", 0.0, 1.0),
            ("ratio", 0.0, math.inf),
            ("erase_area", 0.0, 1.0),
        ):
            span = getattr(self, name)
            right = span is None or (
                isinstance(span, Sequence)
                and len(span) == 2
                and all(map(is_number, span))
                and low <= span[0] <= span[1] <= high
            )
            if not right:
                raise UserError(
                    f"augment.{name} is {span!r}; it must be [from, to] within [{low}, {high}]"
                )
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise UserError(f"augment.{name} is {value!r}; it must be a number, at least 0")
        for name, least, most in (
            ("repeats", 1, math.inf),
            ("rand_augment", 0, math.inf),
            ("rand_magnitude", 0, 30),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                limit = f", at most {most}" if most < math.inf else ""
                raise UserError(
                    f"augment.{name} is {value!r}; it must be a whole number, at least {least}{limit}"
                )
        for name in ("hflip", "color", "erase"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise UserError(f"augment.{name} is {value!r}; it must be between 0 and 1")


def region_box(region: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Turn [left, top, width, height], relative, into pixels: top, left, height, width.

    Raises:
        UserError: the region is not inside the frame.
    """
    if not isinstance(region, Sequence) or len(region) != 4:
        raise UserError(
            f"data.region is {region!r}; it must be [left, top, width, height], inside 0 to 1"
        )
    left, top, w, h = region
    if min(left, top) < 0 or min(w, h) <= 0 or left + w > 1 + 1e-9 or top + h > 1 + 1e-9:
        raise UserError(
            f"data.region is {list(region)}; it must be [left, top, width, height] inside 0 to 1"
        )
    box_top, box_left = round(top * height), round(left * width)
    box_height = max(1, min(round(h * height), height - box_top))
    box_width = max(1, min(round(w * width), width - box_left))
    return box_top, box_left, box_height, box_width


def random_geometry(
    height: int, width: int, size: int, augment: Augment, rng: np.random.Generator
) -> Geometry:
    """Draw a training view's box.

    - `augment.scale`: the shorter side becomes `size` times a number drawn from it, then a random
      `size` x `size` crop (Simonyan & Zisserman 2015, 3.1);
    - `augment.area`: a box of that share of the frame and of `augment.ratio`, squeezed to a square
      (Szegedy et al. 2015); the middle where ten draws do not fit;
    - `augment.sides`: height and width are two of these shares of the shorter side, the same or neighbours in
      the list, at one of thirteen places of a grid of five by five (Wang et al. 2016, TSN, 4.1, and more of
      them in VideoMAE), squeezed to a square;
    - none of them: the middle square.
    """
    flip = bool(rng.random() < augment.hflip)
    if augment.area is not None:
        for _ in range(10):
            area = height * width * rng.uniform(augment.area[0], augment.area[1])
            ratio = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(rng.integers(height - h + 1))
                left = int(rng.integers(width - w + 1))
                return Geometry(top, left, h, w, flip)
    side = min(height, width)
    if augment.sides is not None:
        count = len(augment.sides)
        pairs = [(i, j) for i in range(count) for j in range(count) if abs(i - j) <= 1]
        first, second = pairs[int(rng.integers(len(pairs)))]
        h = max(1, int(side * augment.sides[first]))
        w = max(1, int(side * augment.sides[second]))
        down, right = PLACES[int(rng.integers(len(PLACES)))]
        return Geometry(down * ((height - h) // 4), right * ((width - w) // 4), h, w, flip)
    if augment.scale is not None:
        side = max(1, round(side / rng.uniform(augment.scale[0], augment.scale[1])))
        top = int(rng.integers(height - side + 1))
        left = int(rng.integers(width - side + 1))
        return Geometry(top, left, side, side, flip)
    return Geometry((height - side) // 2, (width - side) // 2, side, side, flip)


def around(boxes: Sequence[Geometry]) -> Box:
    """Give the smallest box that holds them all: top, left, height, width."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom = max(box.top + box.height for box in boxes)
    right = max(box.left + box.width for box in boxes)
    return top, left, bottom - top, right - left


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize `(N, C, H, W)` uint8, bilinear with antialiasing, in channels-last memory.

    Channels last is three times faster than planes, and uint8 ten times faster than float.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    frames = channels_last(frames)
    if (
        frames.shape[-2] > height
    ):  # fewer rows first: columns take longer, and torch does them first
        frames = F.interpolate(frames, (height, frames.shape[-1]), mode="bilinear", antialias=True)
    return F.interpolate(frames, (height, width), mode="bilinear", antialias=True)


_scratch = threading.local()


def channels_last(frames: Tensor) -> Tensor:
    """Put frames into channels-last memory, which lasts until the next call in this thread.

    The same memory each time: new memory takes three times as long to be written as what a
    processor has just used.
    """
    if frames.is_contiguous(memory_format=torch.channels_last):
        return frames
    count, colors, height, width = frames.shape
    memory: Tensor | None = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < frames.numel():
        memory = _scratch.memory = torch.empty(frames.numel(), dtype=torch.uint8)
    copy = memory[: frames.numel()].view(count, height, width, colors).permute(0, 3, 1, 2)
    return copy.copy_(frames)


def crop(frames: Tensor, box: Geometry, size: int) -> Tensor:
    """Cut a box out of `(T, C, H, W)` uint8 frames and make it `size` x `size`."""
    view = frames[..., box.top : box.top + box.height, box.left : box.left + box.width]
    view = resize(view, size, size)
    return view.flip(-1) if box.flip else view


def resize_fields(fields: Tensor, height: int, width: int) -> Tensor:
    """Resize `(N, 2, H, W)` uint8 flow; its values stay, only what they are worth changes."""
    if fields.shape[-2:] == (height, width):
        return fields
    return F.interpolate(fields.contiguous(), (height, width), mode="bilinear", antialias=True)


def crop_fields(fields: Tensor, box: Geometry, size: int) -> tuple[Tensor, float, float]:
    """Cut a box out of `(T, 2, H, W)` uint8 flow and make it `size` x `size`.

    Returns:
        The bytes, and how many pixels of the crop a pixel across and a pixel down have become:
        displacements grow with the picture, and in the mirror those across turn round.
    """
    view = fields[..., box.top : box.top + box.height, box.left : box.left + box.width]
    view = resize_fields(view, size, size)
    across, down = size / box.width, size / box.height
    return (view.flip(-1), -across, down) if box.flip else (view, across, down)


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Scale so that the shorter side has `short_side` pixels, the other in proportion."""
    if height <= width:
        return short_side, max(short_side, round(width * short_side / height))
    return max(short_side, round(height * short_side / width)), short_side


def spread_crops(height: int, width: int, size: int, crops: int) -> list[tuple[int, int]]:
    """Spread square crops evenly over the longer side: (top, left) of each.

    One is the middle; three are left, middle, right (or top, middle, bottom).
    """
    if size > min(height, width):
        raise UserError(
            f"views.size is {size}, more than the {min(height, width)} of views.short_side"
        )
    places = np.linspace(0, 1, crops) if crops > 1 else np.array([0.5])
    tops = np.rint((places if height > width else np.full(crops, 0.5)) * (height - size))
    lefts = np.rint((places if width >= height else np.full(crops, 0.5)) * (width - size))
    return [(int(top), int(left)) for top, left in zip(tops, lefts, strict=True)]
