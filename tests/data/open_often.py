"""Open good and bad files many times and say what that leaves behind; run in a process of its own.

    python tests/data/open_often.py DECODER START COUNT FILE [FILE ...]

START is where the files are opened: `here`, or in a process that was started by `fork` or `spawn`
after this one had opened some itself. Prints bytes of memory and open files, after a warm-up and
after COUNT more opens.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from vidtrain.data.decode import open_video
from vidtrain.types import DecodeError

WARM_UP = 200


def open_all(files: list[str], decoder: str, count: int) -> None:
    """Open so many, one after the other, and take frames of each that can be read."""
    for number in range(count):
        try:
            with open_video(files[number % len(files)], decoder) as reader:
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


def measure(files: list[str], decoder: str, count: int, pipe: Connection | None = None) -> list:
    """Return what is held before and after."""
    torch.set_num_threads(1)  # as every loader does: a fork has none of the threads of before
    open_all(files, decoder, WARM_UP)
    before = held()
    open_all(files, decoder, count)
    found = [before, held()]
    if pipe is not None:
        pipe.send(found)
    return found


if __name__ == "__main__":
    decoder, start, count, *files = sys.argv[1:]
    if start == "here":
        found = measure(files, decoder, int(count))
    else:
        open_all(files, decoder, len(files))
        context = multiprocessing.get_context(start)
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(files, decoder, int(count), theirs))
        process.start()
        theirs.close()
        found = ours.recv()
        process.join()
    print(json.dumps(found))
