"""Compare the methods of optical flow: what a field costs, and how well it leads to the next frame.

    python scripts/bench/flow.py VIDEO ... --sizes 256 112 --fields 6

A row is a method at a size of the shorter side: CPU milliseconds of a field, one thread, and by how much
the next frame, warped with it, is nearer to its frame than the next frame as it is: mean absolute
differences of grey values, the ratio of their means over all videos. Methods take turns on each pair.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import cv2
import numpy as np
import torch

from vidtrain.data.decode import open_video
from vidtrain.data.flow import estimator
from vidtrain.data.transforms.sample import resize, short_side_size


def differences(first: np.ndarray, other: np.ndarray, field: np.ndarray) -> tuple[float, float]:
    """Say how far two frames are from each other, as they are and warped."""
    first, other = (
        cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in (first, other)
    )
    y, x = np.mgrid[: first.shape[0], : first.shape[1]].astype(np.float32)
    warped = cv2.remap(
        other,
        x + field[..., 0],
        y + field[..., 1],
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return float(np.abs(other - first).mean()), float(np.abs(warped - first).mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 112])
    parser.add_argument(
        "--fields", type=int, default=6, help="of each video, spread over its length"
    )
    parser.add_argument("--methods", nargs="+", default=["tvl1", "dis", "farneback"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in args.sizes:
        spent: dict[str, list[float]] = defaultdict(list)
        still: dict[str, list[float]] = defaultdict(list)
        moved: dict[str, list[float]] = defaultdict(list)
        for video in args.videos:
            with open_video(video) as reader:
                starts = np.linspace(0, len(reader) - 2, args.fields).astype(int).tolist()
                frames = reader.frames([n for start in starts for n in (start, start + 1)])
            height, width = short_side_size(*frames.shape[-2:], size)
            rows = np.ascontiguousarray(resize(frames, height, width).permute(0, 2, 3, 1).numpy())
            for k in range(args.fields):
                pair = rows[2 * k : 2 * k + 2]
                for method in args.methods:
                    began = time.process_time()
                    field = estimator(method)(pair, [(0, 1)])[0]
                    spent[method].append(time.process_time() - began)
                    before, after = differences(pair[0], pair[1], field)
                    still[method].append(before)
                    moved[method].append(after)
        for method in args.methods:
            print(
                f"{size:4} {method:10} {1e3 * np.median(spent[method]):8.1f} ms"
                f"   {np.mean(still[method]) / np.mean(moved[method]):.2f} times nearer"
            )


if __name__ == "__main__":
    main()
