"""The flow of a sample: which fields its frames call for, read from a store or computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidtrain.data.cache import facts_of
from vidtrain.data.flow import (
    BOUND,
    DIRECTIONS,
    METHODS,
    STEPS,
    check_method,
    estimator,
    file_of,
    to_bytes,
)
from vidtrain.data.indices import IndexStore
from vidtrain.data.readers.flow import FlowReader
from vidtrain.data.readers.pieces import ChooseBox
from vidtrain.data.transforms.sample import is_number
from vidtrain.types import DecodeError, UserError

Numbers = npt.NDArray[np.int64]
STORED = "stored"


class Wanted(NamedTuple):
    """The fields that a table of frames calls for, each once: all forward ones, then the backward ones."""

    first: Numbers  # (M,) frames that they lead from, ascending in each direction ...
    other: Numbers  # (M,) ... and to; the same where a video has a single frame
    position: Numbers  # (V, T), which of them belongs to a frame of the table


def wanted_fields(indices: Numbers, length: int, direction: str = "forward") -> Wanted:
    """Say which fields belong to frames.

    Frame i has the field that leads to frame i + 1 of the video. With direction `both` that is so in the
    second half of each clip; in its first half a frame has the field that leads to frame i - 1
    (Simonyan & Zisserman 2014, 3.1: bi-directional flow). Where there is no such frame, at the video's
    end or beginning, it has the field of its neighbour.

    Args:
        indices: `(V, T)` frames.
        length: of the video.
        direction: `forward` or `both`.
    """
    count = max(1, length - 1)  # fields of a direction
    backward = np.zeros_like(indices)
    if direction == "both" and length > 1:
        backward[:, : indices.shape[1] // 2] = 1
    between = (indices - backward).clip(0, count - 1)
    numbers, position = np.unique(between + backward * count, return_inverse=True)
    is_backward, earlier = np.divmod(numbers, count)
    later = np.minimum(earlier + 1, length - 1)
    return Wanted(
        np.where(is_backward, later, earlier),
        np.where(is_backward, earlier, later),
        position.reshape(indices.shape),
    )


@dataclass(frozen=True)
class Flow:
    """How samples come by their flow.

    Args:
        source: `stored`, or the method that computes it.
        bound: pixels of the clip that become 1.
        direction: `forward` or `both`.
        root: the folder of stored flow.
        method: that stored flow must have been made by.
        weights: RAFT's file.
        indices: of the stored files' frames, kept from run to run.

    Raises:
        UserError: a setting that cannot be used.
    """

    source: str
    bound: float = BOUND
    direction: str = "forward"
    root: Path | None = None
    method: str = "dis"
    weights: str | None = None
    indices: IndexStore | None = None

    def __post_init__(self) -> None:
        """Refuse what could not work."""
        if self.source not in (STORED, *METHODS):
            there = ", ".join(("null", STORED, *METHODS))
            raise UserError(f"data.flow is {self.source!r}; it is one of {there}")
        if self.direction not in DIRECTIONS:
            raise UserError(
                f"data.flow_direction is {self.direction!r}; it is one of {', '.join(DIRECTIONS)}"
            )
        if not is_number(self.bound) or not self.bound > 0:
            raise UserError(
                f"data.flow_bound is {self.bound!r}; it must be a number of pixels, more than 0"
            )
        if self.is_computed:
            check_method(self.source, "data.flow", self.weights)
        elif self.root is None or not (self.root / "forward").is_dir():
            raise UserError(
                f"data.flow is stored, but there is no flow in {self.root}; `vidtrain data action=flow"
                " data=...` computes it, data.flow_root says where it lies"
            )
        elif self.direction == "both" and not (self.root / "backward").is_dir():
            raise UserError(
                f"data.flow_direction is both, but {self.root} holds forward flow only; `vidtrain data"
                " action=flow data.flow_direction=both data=...` adds the other"
            )

    @property
    def is_computed(self) -> bool:
        """Tell flow that is computed from frames, as they go to the model, from flow that is read."""
        return self.source != STORED

    def wanted(self, indices: Numbers, length: int) -> Wanted:
        """Say which fields belong to frames; see `wanted_fields`."""
        return wanted_fields(indices, length, self.direction)

    def between(self, frames: Tensor, first: Numbers, other: Numbers) -> tuple[Tensor, Tensor]:
        """Compute fields and write them in bytes, each as fine as its largest displacement lets it be.

        Args:
            frames: `(n, C, H, W)` uint8.
            first: `(m,)`, which of them fields lead from ...
            other: `(m,)`, ... and to; there is no motion where it is the same.

        Returns:
            `(m, 2, H, W)` uint8, and `(m, 2)` what a step of them is worth, as a share of the bound.
        """
        height, width = frames.shape[-2:]
        pixels = np.zeros((len(first), height, width, 2), np.float32)
        moved = np.flatnonzero(first != other)
        if len(moved):
            pairs = list(zip(first[moved].tolist(), other[moved].tolist(), strict=True))
            rows = frames.permute(0, 2, 3, 1).numpy()
            pixels[moved] = estimator(self.source, self.weights)(rows, pairs)
        largest = np.abs(pixels).max((1, 2, 3), initial=0).clip(max=self.bound)
        largest = np.where(largest > 0, largest, self.bound).astype(np.float32)
        codes = to_bytes(pixels, largest[:, None, None, None]).transpose(0, 3, 1, 2)
        steps = torch.from_numpy(largest / np.float32(STEPS * self.bound))
        return torch.from_numpy(np.ascontiguousarray(codes)), steps[:, None].expand(-1, 2)

    def stored(
        self, path: str, name: str, wanted: Wanted, length: int, choose: ChooseBox
    ) -> Iterator[Piece]:
        """Read a video's fields, in their order, a piece at a time.

        Args:
            path: the row's.
            name: of the video, for messages.
            wanted: which.
            length: of the video, in frames.
            choose: told height and width of the fields, it says which part is wanted.

        Raises:
            DecodeError: there is no such file, or it is not this video's.
            UserError: it was made by another method than `method`.
        """
        assert self.root is not None
        backward, between = wanted.first > wanted.other, np.minimum(wanted.first, wanted.other)
        size: tuple[int, int] | None = None
        for side in (False, True):
            numbers = between[backward == side].tolist()
            if not numbers:
                continue
            file = self.root / file_of(path, side)
            facts = facts_of(file)
            if facts is None:
                raise DecodeError(
                    name, f"no flow of it in {file}; `vidtrain data action=flow` computes it"
                )
            known = self.indices.get(file, *facts) if self.indices is not None else None
            with FlowReader(str(file), index=known) as reader:
                self._check(reader, name, length)
                for fields in reader.fields(numbers, choose):
                    if size not in (None, (reader.height, reader.width)):
                        raise DecodeError(
                            name,
                            "its forward and its backward flow have different sizes; `vidtrain data"
                            " action=flow data.flow_direction=both` computes both anew",
                        )
                    size = reader.height, reader.width
                    yield Piece(fields, *size, reader.bound)
                if self.indices is not None and known is None:
                    self.indices.put(file, *facts, reader.index)

    def _check(self, reader: FlowReader, name: str, length: int) -> None:
        if reader.method != self.method:
            raise UserError(
                f"the flow in {self.root} was computed by {reader.method}, not by {self.method}; set"
                f" data.flow_method={reader.method}, or name another data.flow_root"
            )
        if len(reader) != max(1, length - 1):
            raise DecodeError(
                name,
                f"it has {length} frames, and its flow, {reader.path}, {len(reader)} fields; `vidtrain"
                " data action=flow` computes it anew",
            )

    def steps(self, piece: Piece) -> Tensor:
        """Say what a byte's step of dx and dy is worth in a piece, in bounds: `(n, 2)`."""
        return torch.full((len(piece.fields), 2), piece.bound / STEPS / self.bound)


class Piece(NamedTuple):
    """Fields that were read, and what is true of their file."""

    fields: Tensor  # (n, 2, h, w) uint8, the part that is wanted
    height: int  # pixels of whole fields
    width: int
    bound: float  # pixels
