"""From decoded frames to RGB: only the part that is wanted, and many frames in one call.

Frames are laid under each other in one tall frame before their colours are converted: one call of
swscale for a whole clip instead of one for each frame, on the wanted part alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import av
import numpy as np
from av.video.reformatter import VideoReformatter

if TYPE_CHECKING:
    from vidtrain.types import Box

UNTURNED = (False, False, False)
# Four luma samples share a pair of chroma samples: rows and columns are taken by twos. Other formats
# go frame by frame, and so do odd sizes, since swscale converts them in another way.
BY_TWOS = {"yuv420p", "yuvj420p"}

_reformatter = VideoReformatter()  # keeps its tables from frame to frame


def to_rgb(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Convert a frame to `(height, width, 3)` RGB, scaled where it has another size.

    Raises:
        av.error.FFmpegError, ValueError: swscale cannot.
    """
    # one thread: waking others takes longer than converting
    plane = _reformatter.reformat(frame, width, height, "rgb24", threads=1).planes[0]
    rows = np.frombuffer(plane, np.uint8)[: plane.line_size * height]
    return rows.reshape(height, plane.line_size)[:, : width * 3].reshape(height, width, 3)


class Sheet:
    """Room for the wanted part of some frames.

    Args:
        count: frames.
        box: the part, in pixels of the frames as shown.
        like: a frame that all are expected to be like; None when they have to be turned.
    """

    def __init__(self, count: int, box: Box, like: av.VideoFrame | None) -> None:
        self.count, self.box = count, box
        self.taken = 0
        self.odd: dict[int, np.ndarray] = {}  # pictures that came in another way
        self.tall: av.VideoFrame | None = None
        if like is None or like.format.name not in BY_TWOS or like.width % 2 or like.height % 2:
            return
        top, left, height, width = box
        self.rows = slice(top // 2 * 2, (top + height + 1) // 2 * 2)
        self.columns = slice(left // 2 * 2, (left + width + 1) // 2 * 2)
        self.height = self.rows.stop - self.rows.start
        self.width = self.columns.stop - self.columns.start
        self.like = _kind(like)
        self.tall = av.VideoFrame(self.width, self.height * count, like.format.name)
        self.tall.colorspace, self.tall.color_range = like.colorspace, like.color_range
        shapes = [(count, self.height >> s, -1) for s in (0, 1, 1)]
        self.planes = [
            plane.reshape(shape)[..., : self.width >> s]
            for plane, shape, s in zip(_planes(self.tall), shapes, (0, 1, 1), strict=True)
        ]
        # of a plane: the part's first row and column, its rows, its bytes of a row
        self.cuts = [
            (self.rows.start >> s, self.columns.start >> s, self.height >> s, self.width >> s)
            for s in (0, 1, 1)
        ]

    def is_full(self) -> bool:
        """Tell whether all frames are in."""
        return self.taken == self.count

    def take(self, frame: av.VideoFrame) -> bool:
        """Copy the wanted part of a frame; False where it is not like the others."""
        if self.tall is None or _kind(frame) != self.like:
            return False
        for to, plane, cut in zip(self.planes, frame.planes, self.cuts, strict=True):
            top, left, height, width = cut
            line = plane.line_size
            to[self.taken] = np.ndarray(
                (height, width), np.uint8, plane, top * line + left, (line, 1)
            )
        self.taken += 1
        return True

    def take_picture(self, picture: np.ndarray) -> None:
        """Take a frame as an `(H, W, 3)` RGB picture, as shown."""
        top, left, height, width = self.box
        self.odd[self.taken] = picture[top : top + height, left : left + width]
        self.taken += 1

    def pictures(self) -> np.ndarray:
        """Give the wanted part of all frames as `(count, height, width, 3)` RGB.

        Raises:
            av.error.FFmpegError, ValueError: swscale cannot convert them.
        """
        top, left, height, width = self.box
        if len(self.odd) == self.count:
            return np.stack([self.odd[place] for place in range(self.count)])
        assert self.tall is not None
        plane = _reformatter.reformat(self.tall, format="rgb24", threads=1).planes[0]
        line = plane.line_size
        pictures = np.lib.stride_tricks.as_strided(
            np.frombuffer(plane, np.uint8),
            (self.count, self.height, self.width, 3),
            (self.height * line, line, 3, 1),
        )
        above, before = top - self.rows.start, left - self.columns.start
        pictures = pictures[:, above : above + height, before : before + width]
        for place, picture in self.odd.items():
            pictures[place] = picture
        return pictures


def _kind(frame: av.VideoFrame) -> tuple[object, ...]:
    """Give what frames must have in common to be converted together."""
    return frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    """View a planar frame's planes as `(rows, bytes of a row)`."""
    return [np.ndarray((p.height, p.line_size), np.uint8, p) for p in frame.planes]
