"""Time the decoders on the same clips: CPU time of one training clip, opening the file included.

    python scripts/bench/decoders.py VIDEO [VIDEO ...] --rounds 5

Every round takes the same random clips of every video through each decoder in turn. Printed is the
median over rounds, as a ratio to the plain way: PyAV decoding every frame up to the clip's last one.
A decoder that refuses a file, or gives other frames than the plain way, is named and not timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import av
import numpy as np
import torch

from vidtrain.data import sampling
from vidtrain.data.decode import open_video
from vidtrain.types import DecodeError, UserError

FRAMES, STRIDE = 16, 4


def plain(path: str, indices: list[int]) -> torch.Tensor:
    """Decode from the start and keep the wanted frames: right wherever libav's order is."""
    wanted, kept = set(indices), {}
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                kept[number] = frame.to_ndarray(format="rgb24")
            if number >= indices[-1]:
                break
    return torch.from_numpy(np.stack([kept[i] for i in indices])).permute(0, 3, 1, 2)


def ours(decoder: str):
    """Decode as the training data path does."""

    def decode(path: str, indices: list[int]) -> torch.Tensor:
        with open_video(path, decoder) as reader:
            return reader.frames(indices)

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clips", type=int, default=4, help="random clips of each video")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"plain": plain, **{name: ours(name) for name in ("pyav", "decord", "torchcodec")}}
    rng = np.random.default_rng(0)
    print(f"{'video':<34}" + "".join(f"{name:>12}" for name in ways))
    for video in args.videos:
        with open_video(video) as reader:
            clips = sampling.random_clips(len(reader), FRAMES, STRIDE, args.clips, rng).tolist()
        truth = [plain(video, clip) for clip in clips]
        times: dict[str, list[float]] = {}
        said: dict[str, str] = {}
        for name, decode in ways.items():
            try:
                same = all(
                    torch.equal(decode(video, clip), frames)
                    or (decode(video, clip).int() - frames.int()).abs().float().mean() < 2
                    for clip, frames in zip(clips, truth, strict=True)
                )
                times[name] = []
                said[name] = "" if same else "other frames"
            except (DecodeError, UserError):
                said[name] = "refused"
        for _ in range(args.rounds):
            for name in times:
                began = time.process_time()
                for clip in clips:
                    ways[name](video, clip)
                times[name].append((time.process_time() - began) / len(clips))
        base = statistics.median(times["plain"])
        cells = [said[name] or f"{statistics.median(times[name]) / base:.2f}" for name in ways]
        cells[0] = f"{1000 * base:.1f} ms"
        print(f"{Path(video).name:<34}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
