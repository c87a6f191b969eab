"""Read stored flow: H.264 whose grey pictures hold dx on the left and dy beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from vidtrain.data.readers.pieces import PIECE
from vidtrain.data.readers.pyav import PyAVReader
from vidtrain.types import DecodeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vidtrain.data.readers.index import FrameIndex
    from vidtrain.data.readers.pieces import ChooseBox

FORMAT = 1  # raised when files written before can no longer be read
KEY = "comment"  # of the container's metadata, where a file says what it holds


class FlowReader(PyAVReader):
    """A file of flow, as `vidtrain data action=flow` writes it.

    Attributes:
        method: that computed it.
        bound: pixels that the largest byte stands for.

    Raises:
        DecodeError: it cannot be read, or is no file of flow.
    """

    def __init__(self, source: str, name: str | None = None, index: FrameIndex | None = None):
        super().__init__(source, name, index)
        try:
            facts = json.loads(self._container.metadata[KEY])
            if facts["vidtrain flow"] != FORMAT:
                raise ValueError("its format is another version's")
            self.method, self.bound = str(facts["method"]), float(facts["bound"])
        except (KeyError, TypeError, ValueError):
            self.close()
            raise DecodeError(self.path, "not a file of flow that vidtrain wrote") from None

    def __enter__(self) -> FlowReader:
        return self

    @property
    def width(self) -> int:
        """Width of a field in pixels."""
        return super().width // 2

    def fields(self, numbers: Sequence[int], choose: ChooseBox | None = None) -> Iterator[Tensor]:
        """Decode fields in one pass and hand them over a piece at a time.

        Args:
            numbers: ascending, each once.
            choose: told height and width, it says which part is wanted: top, left, height, width.

        Yields:
            `(n, 2, h, w)` uint8, dx and dy, as many fields as fit in 4 MiB; see `data/flow.py`.

        Raises:
            DecodeError: a field that cannot be had, and why.
        """
        import torch

        pictures: np.ndarray | None = None
        taken = 0
        for done, frame in enumerate(self._in_order(list(numbers))):
            self._note_frame(frame)
            if pictures is None:
                width = frame.width // 2
                box = choose(frame.height, width) if choose else (0, 0, frame.height, width)
                top, left, h, w = box
                count = min(max(1, PIECE // (2 * h * w)), len(numbers) - done)
                pictures, taken = np.empty((count, 2, h, w), np.uint8), 0
            plane = frame.planes[0]
            line = plane.line_size
            for component in (0, 1):
                start = top * line + component * width + left
                pictures[taken, component] = np.ndarray((h, w), np.uint8, plane, start, (line, 1))
            taken += 1
            if taken == len(pictures):
                yield torch.from_numpy(pictures)
                pictures = None
