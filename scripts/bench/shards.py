"""Time random reads of videos from tar shards against the same videos as files of their own.

    python scripts/bench/shards.py VIDEO [VIDEO ...] --copies 200 --rounds 5 [--cold] [--folder DIR]

The videos are copied into DIR so many times and packed there. Every round reads all of them in one
random order, first from one, then from the other. Printed is the median over rounds of the time a
video takes, as a ratio to the files: reading its bytes, and training clips of it (16 frames x stride
4, opening included). With --cold the disk is read: the system forgets the files before each pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vidtrain.data import manifest, pack, sampling
from vidtrain.data.decode import open_video
from vidtrain.data.manifest import Annotations, Manifest, Row, make_rows
from vidtrain.data.prepare import packed
from vidtrain.data.shards import Shards

FRAMES, STRIDE = 16, 4


def build(videos: list[str], copies: int, folder: Path) -> tuple[Manifest, Manifest]:
    """Copy the videos and pack them: the manifest of the files, and that of the shards."""
    paths = [f"{i:05d}{Path(video).suffix}" for i, video in enumerate(videos * copies)]
    files, shards = folder / "files", folder / "shards"
    files.mkdir()
    for video, path in zip(videos * copies, paths, strict=True):
        shutil.copy(video, files / path)
    rows = make_rows(paths, [[0]] * len(paths), ["train"] * len(paths))
    manifest.save(Annotations(rows, ["any"]), folder / "files.arrow", "files", files)
    source = Manifest(folder / "files.arrow")
    pack.pack(source, pack.plan(source), shards)
    manifest.save(packed.prepare(shards), folder / "shards.arrow", "shards", shards)
    return source, Manifest(folder / "shards.arrow")


def forget(folder: Path) -> None:
    """Let the system drop what it holds of the files below a folder."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def clip(source: Path | bytes, row: Row) -> torch.Tensor:
    """Decode a training clip: of one row always the same."""
    rng = np.random.default_rng(int(Path(row.path).stem))
    with open_video(source) as reader:
        (indices,) = sampling.random_clips(len(reader), FRAMES, STRIDE, 1, rng).tolist()
        return reader.frames(indices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        files, packed_files = build(args.videos, args.copies, Path(folder))
        shards = Shards(packed_files.root)

        def from_file(row: Row) -> bytes:
            return files.absolute_path(row).read_bytes()

        def from_shard(row: Row) -> bytes:
            return shards.read(row.place)

        ways: dict[str, dict[str, Callable[[Row], object]]] = {
            "bytes": {"files": from_file, "shards": from_shard},
            "clips": {
                "files": lambda row: clip(files.absolute_path(row), row),
                "shards": lambda row: clip(shards.read(row.place), row),
            },
        }
        sources = {"files": files, "shards": packed_files}
        for i in range(len(files)):
            assert from_file(files.row(i)) == from_shard(packed_files.row(i))
        print(f"{len(files)} videos, {'cold' if args.cold else 'warm'}")
        print(f"{'':<8}{'files, ms':>12}{'shards':>12}{'shards, CPU':>14}")
        for what, readers in ways.items():
            wall: dict[str, list[float]] = {name: [] for name in readers}
            cpu: dict[str, list[float]] = {name: [] for name in readers}
            count = len(files) if what == "bytes" else min(len(files), 40)
            for _ in range(args.rounds):
                order = rng.permutation(len(files))[:count].tolist()
                for name, read in readers.items():
                    if args.cold:
                        forget(Path(folder))
                    rows = [sources[name].row(i) for i in order]
                    began, worked = time.perf_counter(), time.process_time()
                    for row in rows:
                        read(row)
                    wall[name].append((time.perf_counter() - began) / count)
                    cpu[name].append((time.process_time() - worked) / count)
            median = {
                name: (statistics.median(wall[name]), statistics.median(cpu[name]))
                for name in readers
            }
            (slow, work), (one, other) = median["files"], median["shards"]
            print(f"{what:<8}{1000 * slow:>12.3f}{one / slow:>12.2f}{other / work:>14.2f}")


if __name__ == "__main__":
    main()
