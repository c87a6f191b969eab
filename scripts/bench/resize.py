"""Measure what re-encoding gains: bytes, and CPU time of one training clip, before and after.

    python scripts/bench/resize.py VIDEO [VIDEO ...] --clips 4 --rounds 5

Every video is re-encoded in each of several ways. Then the same random clips (16 frames, 4 apart,
cropped at random as in training, the frame index known) are taken from the video and from its copy
in turn; of the rounds the quickest counts. Printed are, per way, the copies' bytes and CPU as a
ratio to the videos', over all videos, and the CPU seconds that encoding ten seconds of video took.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

from vidtrain.data.decode import open_video
from vidtrain.data.encode import Settings, encode
from vidtrain.data.resize import cpu_per_clip

WAYS = {
    "as it is by default": {},
    "keyframe_every=12": {"keyframe_every": 12},
    "tune=null": {"tune": None},
    "preset=veryfast": {"preset": "veryfast"},
    "short_side=128": {"short_side": 128},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--clips", type=int, default=4, help="random clips of each video")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    seconds = 0.0
    for path in args.videos:
        with open_video(path) as reader:
            seconds += len(reader) / reader.fps
    before = sum(map(os.path.getsize, args.videos))
    print(f"{'':<22}{'bytes':>8}{'CPU':>8}{'less':>8}{'before':>11}{'encoding':>11}")
    for name, options in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            pairs = [(path, f"{folder}/{n}.mp4") for n, path in enumerate(args.videos)]
            began = time.process_time()
            for pair in pairs:
                encode(*pair, Settings(**options))
            spent = (time.process_time() - began) / seconds * 10
            size = sum(os.path.getsize(copy) for _, copy in pairs) / before
            base, after = cpu_per_clip(pairs, args.clips, args.rounds)
        print(
            f"{name:<22}{size:>8.2f}{after / base:>8.2f}{base / after:>7.1f}x"
            f"{1e3 * base:>8.1f} ms{spent:>9.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
