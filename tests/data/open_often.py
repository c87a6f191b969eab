"""Open good and bad files many times and say what that leaves behind; run in a process of its own.

    python tests/data/open_often.py DECODERS START COUNT FILE [FILE ...]

DECODERS take turns. START is where the files are opened: `here`, or in a process started by `spawn`, or by `fork` after
this one had opened some itself. Prints bytes of memory and open files, after a warm-up and after
each of ROUNDS times COUNT more opens: memory may jump, but what leaks grows every time.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from vidtrain.data.decode import open_video
from vidtrain.types import DecodeError

WARM_UP = 200
ROUNDS = 5


def open_all(files: list[str], decoders: str, count: int) -> None:
    """Open so many, one after the other, and take frames of each that can be read."""
    turns = itertools.cycle(itertools.product(files, decoders.split(",")))
    for number, (file, decoder) in enumerate(itertools.islice(turns, count)):
        try:
            with open_video(file, decoder) as reader:
                reader.frames([len(reader) // 2, number % len(reader)])
        except DecodeError:
            pass


def held() -> dict[str, int]:
    """Bytes of memory that are in use, and open files."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # so that what was given back does not count
        trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"memory": resident, "files": len(os.listdir("/proc/self/fd"))}


def measure(files: list[str], decoders: str, count: int, pipe: Connection | None = None) -> list:
    """Return what is held before, and after each round."""
    import torch  # here: the process that only starts another does without

    torch.set_num_threads(1)  # as every loader does: a fork has none of the threads of before
    open_all(files, decoders, WARM_UP)
    found = [held()]
    for _ in range(ROUNDS):
        open_all(files, decoders, count)
        found.append(held())
    if pipe is not None:
        pipe.send(found)
    return found


if __name__ == "__main__":
    decoders, start, count, *files = sys.argv[1:]
    if start == "here":
        found = measure(files, decoders, int(count))
    else:
        if start == "fork":
            open_all(files, decoders, 3 * len(files))
        context = multiprocessing.get_context(start)
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(files, decoders, int(count), theirs))
        process.start()
        theirs.close()
        found = ours.recv()
        process.join()
    print(json.dumps(found))
