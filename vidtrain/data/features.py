"""Sequences of features as samples: what `vidtrain extract` wrote of each video."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from vidtrain.data.dataset import VideoDataset, stretch
from vidtrain.types import DecodeError, UserError

if TYPE_CHECKING:
    from vidtrain.data.manifest import Row
    from vidtrain.types import Sample


class FeatureFile:
    """A .npy file of `(N, D)` numbers, one feature behind the other; only what is asked for is read.

    Attributes:
        path: for messages.
        fps: features per second; 1 where nobody says.

    Raises:
        DecodeError: it cannot be read, or holds something else.
    """

    def __init__(self, path: str, rate: float | None = None) -> None:
        self.path, self.fps = path, rate or 1.0
        try:
            self.rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DecodeError(path, str(error).splitlines()[0]) from None
        if not isinstance(self.rows, np.ndarray) or self.rows.ndim != 2:
            shape = getattr(self.rows, "shape", None)
            raise DecodeError(
                path,
                f"it holds {shape}, not a feature a row; extract with pool=window or pool=step",
            )

    def __len__(self) -> int:
        return len(self.rows)


class FeatureDataset(VideoDataset):
    """Features of videos as samples, chosen as frames are: T of them, `clip.stride` apart.

    `how="random"` takes a stretch anywhere in the video, `segments` one feature of each of T equal
    parts of it, random in training and the middle one otherwise. There is nothing to crop or to flip.
    Its arguments, its failures and the rows that stand in for them are those of `VideoDataset`.
    """

    _dim: int | None = None

    @property
    def dim(self) -> int | None:
        """D of the first row that can be read; None where there is no such one among the first ten."""
        if self._dim is None:
            for index in range(min(10, len(self.rows))):
                with contextlib.suppress(DecodeError):
                    first = FeatureFile(self.rows.location(self.rows.row(index)))
                    self._dim = first.rows.shape[1]
                    break
        return self._dim

    def load(self, row: Row, name: str, rng: np.random.Generator) -> Sample:
        """Open, choose, read: `features` (V, D, T) float32.

        Raises:
            DecodeError: naming the file and the reason.
        """
        if self.clip.fps is not None and row.rate is None:
            raise UserError(
                f"clip.fps is {self.clip.fps}, but nothing says how many features a second"
                f" {name} has (the column 'rate' of data.annotations); set clip.fps=null"
            )
        file = FeatureFile(name, row.rate)
        if (dim := file.rows.shape[1]) != self.dim:
            raise DecodeError(name, f"a feature of it has {dim} numbers, of the others {self.dim}")
        first, length = stretch(file, row, self.span)  # type: ignore[arg-type]  # as of a video
        training = self.augment is not None
        views = self.augment.repeats if self.augment is not None else self.clips
        indices = first + self.choose(length, file.fps, views, rng if training else None)
        chosen = np.ascontiguousarray(file.rows[indices].transpose(0, 2, 1), dtype=np.float32)
        if not np.isfinite(chosen).all():
            raise DecodeError(name, "it holds numbers that are not finite")
        return {
            "features": torch.from_numpy(chosen),
            "fps": self.seen_rate(file.fps, length),
        }
