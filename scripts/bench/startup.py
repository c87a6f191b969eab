"""Start training from a manifest of the size of Sports-1M: time to the first batch, memory of workers.

    python scripts/bench/startup.py VIDEO [VIDEO ...] --rows 1133158

The same loaders are started once with as many rows as asked for and once with a thousand, each in a
process of its own; all rows name the videos given. Printed are the seconds from the end of the imports
to the first batch, what of it opening the manifest took, and by how much the memory that a worker has
to itself (Private_Dirty in /proc/PID/smaps, after 50 batches) is larger with many rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

BATCHES = 50
FEW = 1000


def annotations(rows: int, names: list[str]):
    import numpy as np
    import pyarrow as pa

    from vidtrain.data.manifest import Annotations, make_rows, single_labels

    rng = np.random.default_rng(0)
    labels = single_labels(pa.array(rng.integers(0, 487, rows)))
    paths = pa.array(names).take(pa.array(rng.integers(0, len(names), rows)))
    return Annotations(make_rows(paths, labels, ["train"] * rows), [str(k) for k in range(487)])


def module(root: str, rows: int, workers: int, names: list[str]):
    from vidtrain.data.module import VideoDataModule
    from vidtrain.types import Clip

    return VideoDataModule(
        "many",
        root,
        partial(annotations, rows, names),
        487,
        Clip(16, 4, 112, [0.45] * 3, [0.225] * 3),
        {"area": [0.3, 1.0]},
        {"clips": 1, "crops": 1, "short_side": None, "size": None, "memory": 512},
        workers=workers,
        cache_dir=f"{root}-cache",
    )


def own_memory(process: int) -> int:
    """Count the bytes that only this process has; batches on their way are not counted."""
    total, counts = 0, True
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = "/memfd:" not in line
        elif counts and line.startswith("Private_Dirty:"):
            total += 1024 * int(line.split()[1])
    return total


def start(root: str, rows: int, workers: int, names: list[str]) -> None:
    """Run in a process of its own; print what was measured as JSON."""
    # What malloc keeps for later grows with the largest block it ever gave back: alike in both.
    bytearray(31 << 20)
    module(root, rows, workers, names).write_manifest()
    data = module(root, rows, workers, names)
    began = time.perf_counter()
    assert len(data.manifest) == rows
    opened = time.perf_counter()
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    for _ in itertools.islice(batches, BATCHES):
        pass
    children = Path(f"/proc/self/task/{Path('/proc/self').resolve().name}/children")
    sizes = [own_memory(int(child)) for child in children.read_text().split()]
    print(
        json.dumps(
            {"open": opened - began, "first": first - began, "worker": sum(sizes) / len(sizes)}
        )
    )
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=1_133_158)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        start(str(args.start), args.rows, args.workers, [video.name for video in args.videos])
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "videos")
        root.mkdir()
        for video in args.videos:
            shutil.copy(video, root)
        told = {}
        for rows in (FEW, args.rows):
            command = [sys.executable, __file__, *map(str, args.videos), "--rows", str(rows)]
            command += ["--workers", str(args.workers), "--start", str(root)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            told[rows] = json.loads(out)
            print(
                f"{rows:>9,} rows: opened in {1000 * told[rows]['open']:.1f} ms, first batch after"
                f" {told[rows]['first']:.2f} s, {told[rows]['worker'] / 1e6:.1f} MB of a worker's own",
                flush=True,
            )
        more = (told[args.rows]["worker"] - told[FEW]["worker"]) / 1e6
        print(f"a worker's share of the manifest: {more:.1f} MB")


if __name__ == "__main__":
    main()
