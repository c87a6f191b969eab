"""Read a folder of pictures, one a frame."""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vidtrain.data.readers.pieces import by_frames
from vidtrain.types import DecodeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vidtrain.data.readers.pieces import ChooseBox

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: `img_2.jpg` before `img_10.jpg`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


class FolderReader:
    """Frames extracted to `img_00001.jpg` and so on. See `vidtrain.types.VideoReader`.

    Pictures are taken in the order of their names, numbers counted as numbers. Optical flow that
    lies among them (`flow_x_00001.jpg`) is left aside. Pictures of another size than the first are
    scaled to it.
    """

    def __init__(self, folder: str, name: str | None = None, fps: float = 30.0) -> None:
        """List the folder.

        Raises:
            DecodeError: it holds no picture, or may not be read.
        """
        self.path = name or folder
        self.fps = fps
        try:
            names = [
                entry.name
                for entry in Path(folder).iterdir()
                if entry.suffix.lower() in ENDINGS and not entry.name.startswith((".", "flow_"))
            ]
        except OSError as error:
            raise DecodeError(
                self.path, f"a folder that cannot be read ({error.strerror})"
            ) from None
        if not names:
            raise DecodeError(self.path, "a folder without images")
        self._files = [Path(folder, name) for name in sorted(names, key=_natural)]
        self._size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._files)

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open."""

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self._first_size()[0]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self._first_size()[1]

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Read pictures by number, in any order, repeats allowed; each is read once.

        Returns:
            `(N, C, H, W)` uint8 RGB, whose memory is `N H W C` (channels last).

        Raises:
            DecodeError: a picture that cannot be read.
            IndexError: an index outside `0 <= i < len(self)`.
        """
        import torch

        indices = [operator.index(index) for index in indices]
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"{self.path}: frame {index} asked of {len(self)}")
        width, height = self._first_size()
        pictures = np.empty((len(indices), height, width, 3), np.uint8)
        first_row: dict[int, int] = {}
        for row, index in enumerate(indices):
            if index in first_row:
                pictures[row] = pictures[first_row[index]]
                continue
            first_row[index] = row
            pictures[row] = self._read(index, (width, height))
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def pieces(self, indices: Sequence[int], choose: ChooseBox | None = None) -> Iterator[Tensor]:
        """Hand frames over a piece at a time. See `vidtrain.types.VideoReader`."""
        return by_frames(self, indices, choose)

    def _first_size(self) -> tuple[int, int]:
        if self._size is None:
            height, width, _ = self._read(0).shape
            self._size = width, height
        return self._size

    def _read(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return the (H, W, 3) picture, scaled to `size` (width, height) if given."""
        file = self._files[index]
        try:
            with Image.open(file) as image:
                picture = image.convert("RGB")
                if size is not None and picture.size != size:
                    picture = picture.resize(size, Image.Resampling.BILINEAR)
                return np.asarray(picture)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = f"cannot decode frame {index} of {len(self)} ({file.name}): {error}"
            raise DecodeError(self.path, reason) from None
