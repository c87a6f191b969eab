"""Time a manifest of Sports-1M's size: write, open, split, send to a worker, read rows.

    python scripts/bench/manifest.py --rows 1133158

"cold" is opened after the file's pages were dropped from the page cache.
"""

from __future__ import annotations

import argparse
import os
import pickle
import tempfile
import time
from pathlib import Path

import numpy as np

from vidtrain.data.manifest import Annotations, Manifest, make_rows, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_133_158)
    rows = parser.parse_args().rows
    rng = np.random.default_rng(0)
    table = make_rows(
        [f"videos/{number:011d}.mp4" for number in range(rows)],
        [[int(label)] for label in rng.integers(487, size=rows)],
        np.where(rng.random(rows) < 0.82, "train", "test").tolist(),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.arrow"
        annotations = Annotations(table, [f"class {k}" for k in range(487)])
        print(f"{rows:,} rows")
        took("written", lambda: save(annotations, path, "bench", Path(folder)))
        print(f"{'size':<28}{path.stat().st_size / 1e6:.1f} MB")
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        took("opened and split, cold", lambda: Manifest(path).split("train"))
        took("opened and split, warm", lambda: Manifest(path).split("train"))
        manifest = Manifest(path)
        print(f"{'sent to a worker':<28}{len(pickle.dumps(manifest))} bytes")
        picks = rng.integers(rows, size=20_000).tolist()
        seconds = took("20,000 random rows", lambda: [manifest.row(i) for i in picks])
        print(f"{'rows a second':<28}{20_000 / seconds:,.0f}")


def took(name: str, work) -> float:
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    print(f"{name:<28}{1000 * seconds:.1f} ms")
    return seconds


if __name__ == "__main__":
    main()
