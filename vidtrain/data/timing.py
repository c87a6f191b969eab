"""Time what goes on between a file and a batch: what `vidtrain bench` measures of the data."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vidtrain.data.cache import CachedReader
from vidtrain.data.sources import Sources
from vidtrain.types import Failure

if TYPE_CHECKING:
    from vidtrain.data.dataset import VideoDataset
    from vidtrain.data.loader import Loader
    from vidtrain.data.readers.index import FrameIndex


class Endless:
    """Training batches without end: some rows, in a new order each epoch, every batch full."""

    def __init__(self, rows: Sequence[int], size: int, seed: int) -> None:
        self.rows, self.size, self.rng = rows, size, np.random.default_rng(seed)

    def keys(self) -> Iterator[tuple[int, int]]:
        """Give rows, each with a seed."""
        while True:
            for row in self.rng.permutation(self.rows):
                yield int(row), int(self.rng.integers(2**62))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        keys = self.keys()
        while True:
            yield list(itertools.islice(keys, self.size))


def fill(loader: Loader, seconds: float) -> list[int]:
    """Run the loader to fill its cache; return the rows that it came by."""
    rows: set[int] = set()
    lost: set[int] = set()
    began = time.perf_counter()
    for batch in loader:
        rows.update(batch["index"].tolist())
        lost.update(failure.row for failure in batch["failures"])
        if time.perf_counter() - began > seconds or len(rows | lost) == len(loader.dataset):
            break
    return sorted(rows)


@contextmanager
def clocked(spent: np.ndarray) -> Iterator[None]:
    """Add the seconds that pass inside: of the CPU, and of the wall."""
    before = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        spent += (time.process_time() - before[0], time.perf_counter() - before[1])


class Read(NamedTuple):
    """What was read of a video."""

    frame_index: FrameIndex | None
    wanted: Sequence[int]
    length: int  # frames
    height: int
    width: int
    cached: bool


class Watched(Sources):
    """Sources that clock opening and decoding, and note what was read."""

    def __init__(self, inner: Sources) -> None:
        super().__init__(inner.decoder, inner.indices, inner.cache, inner.shards)
        store: Any = inner.indices
        if store is not None:
            self.indices: Any = SimpleNamespace(
                get=store.get, put=lambda *facts: self.new.append(store.put(*facts))
            )
        self.new: list[bool] = []  # for each frame index that was not known
        self.read: list[Read] = []
        self.failures: list[Failure] = []
        self.clips = 0
        self.decode, self.total = np.zeros(2), np.zeros(2)  # seconds: CPU, wall

    @contextmanager
    def open(self, name: str, row: Any) -> Iterator[Any]:
        """Open a row's video."""
        wanted: list[int] = []

        def watch(indices: Sequence[int], choose: Any = None) -> Iterator[torch.Tensor]:
            wanted[:] = indices
            made = pieces(indices, choose)
            while True:
                with clocked(self.decode):
                    piece = next(made, None)
                if piece is None:
                    return
                yield piece

        with ExitStack() as stack:
            with clocked(self.decode):
                reader: Any = stack.enter_context(super().open(name, row))
            pieces, reader.pieces = reader.pieces, watch
            yield reader
            seen = len(reader), reader.height, reader.width, isinstance(reader, CachedReader)
            self.read.append(Read(getattr(reader, "index", None), wanted, *seen))
            with clocked(self.decode):
                stack.close()

    def storage(self) -> float:
        """Estimate the seconds of waiting for files.

        Decoding takes longer than its CPU time because of files, or because others use the core.
        Those slow down the rest of the work as well, which needs no file: so much is allowed for.
        """
        cpu, wall = self.total - self.decode
        slowed = max(1.0, wall / max(cpu, 1e-9))
        return max(0.0, float(self.decode[1] - self.decode[0] * slowed))


def time_samples(
    dataset: VideoDataset, sources: Sources, keys: Iterator[tuple[int, int]], seconds: float
) -> Watched:
    """Make samples in this process for some seconds, as a worker does, in one thread."""
    dataset.sources = sources
    watched = Watched(sources)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for key in itertools.islice(keys, 2):  # what is slow once: imports, the codec's tables
            dataset[key]
        dataset.sources = watched
        while watched.total[1] < seconds:
            with clocked(watched.total):
                sample = dataset[next(keys)]
            watched.clips += len(sample["video"] if "video" in sample else sample["flow"])
            watched.failures += sample["failures"]
    finally:
        torch.set_num_threads(threads)
    return watched


class Consumed(NamedTuple):
    """What came of taking batches for some time."""

    ms: float  # a clip
    wait: float  # share of the time
    failures: list[Failure]
    batch: Any  # the last


def consume(
    batches: Iterator[Any], use: Callable[[Any], None], seconds: float, crew: int
) -> Consumed:
    """Take batches and use them for some seconds.

    Workers that began together are done together: batches come in bursts of `crew`. So the clock
    starts after one burst and stops after another.
    """
    failures: list[Failure] = []
    taken = clips = 0
    waited = began = now = 0.0
    while taken <= crew or taken % crew or now - began < seconds:
        batch = next(batches)
        failures += batch["failures"]
        if taken >= crew:
            waited += time.perf_counter() - now
            clips += clips_of(batch)
        use(batch)
        taken += 1
        now = time.perf_counter()
        began = now if taken == crew else began
    return Consumed((now - began) / clips * 1e3, waited / (now - began), failures, batch)


def clips_of(batch: dict[str, Any]) -> int:
    """Count the clips of a batch that the loader made, `(B, V, T, C, H, W)`."""
    return math.prod(batch["video" if "video" in batch else "flow"].shape[:2])


def decoded_frames(index: Any, wanted: Sequence[int]) -> int:
    """Count what is decoded for some frames: from the keyframe before, less what none needs."""
    places = index.order[list(wanted)]
    needed = np.zeros(len(index.pos), bool)
    for rank, place in zip(wanted, places, strict=True):
        needed[index.start_for(rank)[0] : place + 1] = True
    useful = ~index.skippable
    useful[places] = True
    return int((needed & useful).sum())


def decoded_frames_at(keyint: int, wanted: Sequence[int]) -> int:
    """Count what would be decoded for some frames with a keyframe every `keyint` frames."""
    return len({rank for last in wanted for rank in range(last - last % keyint, last + 1)})
