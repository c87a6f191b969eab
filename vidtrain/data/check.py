"""Check the files of a dataset: decode every frame of each, and look for leaks between splits."""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import signal
import time
from collections import defaultdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vidtrain.data.decode import check_decoder, open_video
from vidtrain.types import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator
    from multiprocessing.connection import Connection

    from vidtrain.types import VideoReader

AT_ONCE = 32  # frames in memory, where a decoder can be checked only by taking its frames


class Probe(NamedTuple):
    """What decoding a whole file brought to light: a row of the table."""

    path: str
    ok: bool
    frames: int | None = None  # as `len` of its reader
    fps: float | None = None
    width: int | None = None  # pixels, as shown
    height: int | None = None
    duration: float | None = None  # seconds
    error: str | None = None


def probe(path: str | Path, decoder: str = "auto") -> Probe:
    """Decode every frame of one file and say what is wrong with it; never raises.

    Damage is looked for with PyAV whatever the decoder, for the others do not tell. Then the one
    asked for has to deliver every frame.
    """
    path = os.fspath(path)
    facts: dict[str, int | float] = {}
    try:
        check_decoder(decoder)
        with open_video(path) as reader:
            facts["frames"] = len(reader)
            facts["fps"] = round(reader.fps, 3)
            facts["duration"] = round(len(reader) / reader.fps, 3)
            # a folder of pictures has no way but to read them
            reason = reader.check().reason if hasattr(reader, "check") else _take_all(reader)
            facts["width"], facts["height"] = reader.width, reader.height
        if reason is None and decoder not in ("auto", "pyav"):
            with open_video(path, decoder) as reader:
                _take_all(reader)
    except DecodeError as error:
        reason = error.reason
    except Exception as error:  # whatever it is, it is one file's, and the others are to go on
        reason = f"{type(error).__name__}: {error}"
    return Probe(path, ok=reason is None, error=reason, **facts)


def _take_all(reader: VideoReader) -> None:
    for start in range(0, len(reader), AT_ONCE):
        reader.frames(range(start, min(start + AT_ONCE, len(reader))))


def check_files(
    paths: Iterable[str | Path],
    workers: int = 0,
    time_limit: float = 60.0,
    progress: Callable[[Probe], None] | None = None,
    decoder: str = "auto",
    look: Callable[[str, str], Probe] = probe,
) -> Iterator[Probe]:
    """Probe many files at once, each in a process that may hang or crash without harm.

    A process that takes too long or dies is replaced, and the file it was at is named. Memory does
    not grow with the number of files. Leaving the loop, or Ctrl-C, ends all processes.

    Args:
        paths: the files; read as needed.
        workers: how many processes; 0: one for each core.
        time_limit: seconds that one file may take.
        progress: called with each result as soon as it is there.
        decoder: see `vidtrain.data.decode.open_video`.
        look: what is done with each path and the decoder, a function at the top of its module.

    Yields:
        A `Probe` for each path, in the order of the paths.

    Raises:
        UserError: a decoder that is not known.
    """
    check_decoder(decoder)
    return _check_files(paths, workers or _cores(), time_limit, progress, decoder, look)


def _check_files(
    paths: Iterable[str | Path],
    workers: int,
    time_limit: float,
    progress: Callable[[Probe], None] | None,
    decoder: str,
    look: Callable[[str, str], Probe],
) -> Iterator[Probe]:
    todo = enumerate(os.fspath(path) for path in paths)
    crew: list[_Worker] = []
    done: dict[int, Probe] = {}
    given = yielded = 0
    try:
        while True:
            while (worker := _idle(crew)) or len(crew) < workers:
                job = next(todo, None)
                if job is None:
                    break
                if worker is None:
                    worker = _Worker(look, decoder)
                    crew.append(worker)
                worker.give(*job, time_limit)
                given += 1
            busy = [worker for worker in crew if worker.job is not None]
            if not busy:
                return
            _wait_for(busy)
            for worker in busy:
                result = worker.result(time_limit)
                if result is None:
                    continue
                done[worker.job], worker.job = result, None
                if not worker.process.is_alive():
                    crew.remove(worker)
                if progress is not None:
                    progress(result)
            while yielded in done:
                yield done.pop(yielded)
                yielded += 1
    finally:
        for worker in crew:
            worker.end()
