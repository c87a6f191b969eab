"""Frames a piece at a time, for readers that have no better way than `frames`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vidtrain.types import Box

if TYPE_CHECKING:
    from torch import Tensor

    from vidtrain.types import VideoReader

ChooseBox = Callable[[int, int], Box]  # told height and width
# Bytes of frames that are converted, or handed over, at a time. Where these are more, the processor's
# cache does not hold them, and every one goes into memory that was never touched: four times slower.
PIECE = 4 << 20


def room(height: int, width: int) -> int:
    """Count the frames of a piece."""
    return max(1, PIECE // (3 * height * width))


def by_frames(
    reader: VideoReader, indices: Sequence[int], choose: ChooseBox | None
) -> Iterator[Tensor]:
    """Yield `(n, C, h, w)` of what `VideoReader.pieces` is asked for."""
    if not len(indices):
        return
    height, width = reader.height, reader.width
    top, left, h, w = choose(height, width) if choose else (0, 0, height, width)
    step = room(height, width)
    for start in range(0, len(indices), step):
        frames = reader.frames(indices[start : start + step])
        yield frames[..., top : top + h, left : left + w]
