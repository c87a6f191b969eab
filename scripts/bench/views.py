"""Time what a test sample of many views costs a worker: 10 clips x 3 crops of 16 frames x stride 4.

    python scripts/bench/sets.py SETS VIDEO ...
    python scripts/bench/views.py SETS/k250

Printed is CPU time of a video, median over interleaved rounds, as a ratio to decoding the video once
from end to end with its colours converted, which is all that a player does. "A decode a view" opens
and decodes anew for each of the 30 views, as frameworks do that make a view a sample; ours knows the
frame index from an earlier run; "the device's
share" is what gathering the views and making them float takes afterwards, here on the CPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch

from vidtrain.data.collate import collate
from vidtrain.data.dataset import Files, VideoDataset
from vidtrain.data.decode import open_video
from vidtrain.data.indices import IndexStore
from vidtrain.data.sources import Sources
from vidtrain.data.transforms import sample as geometry
from vidtrain.data.transforms.device import DeviceTransform
from vidtrain.types import Clip

CLIP = Clip(num_frames=16, stride=4, size=224, mean=[0.45] * 3, std=[0.225] * 3)
CLIPS, CROPS, SHORT_SIDE = 10, 3, 256


def whole(file: str) -> None:
    """Decode and convert every frame."""
    with av.open(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            frame.reformat(format="rgb24", threads=1)


def a_decode_a_view(dataset: VideoDataset, file: str) -> None:
    """Make each view from the file."""
    with open_video(file) as reader:
        clips = dataset.choose(len(reader), reader.fps, CLIPS, None)
    for indices in clips:
        for crop in range(CROPS):
            with open_video(file) as reader:
                frames = reader.frames(indices.tolist())
                height, width = geometry.short_side_size(*frames.shape[-2:], SHORT_SIDE)
                frames = geometry.resize(frames, height, width)
                top, left = geometry.spread_crops(height, width, CLIP.size, CROPS)[crop]
                frames[..., top : top + CLIP.size, left : left + CLIP.size].contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(str(file) for file in args.folder.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        store = IndexStore(Path(folder, "indices"), len(files))
        measure(args, files, Sources(indices=store))


def measure(args: argparse.Namespace, files: list[str], sources: Sources) -> None:
    dataset = VideoDataset(
        Files(files),
        CLIP,
        clips=CLIPS,
        crops=CROPS,
        short_side=SHORT_SIDE,
        size=CLIP.size,
        sources=sources,
    )
    memory = torch.zeros(1 << 28, dtype=torch.uint8)  # used again and again, as a worker's slot is

    def again(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return memory[: math.prod(shape)].view(*shape)

    transform = DeviceTransform(CLIP.mean, CLIP.std).eval()
    samples = [dataset[number, 0] for number in range(len(files))]
    dataset.empty = again
    ways = {
        "one decode, nothing else": lambda number: whole(files[number]),
        "ours, in the worker": lambda number: dataset[number, 0],
        "ours, the device's share": lambda number: transform(collate([samples[number]])),
        "a decode a view": lambda number: a_decode_a_view(dataset, files[number]),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.process_time()
            for number in range(len(files)):
                way(number)
            times[name].append((time.process_time() - began) / len(files))
    base = statistics.median(times["one decode, nothing else"])
    frames = np.mean([len(sample["frames"]) for sample in samples])
    print(f"{args.folder.name}: {len(files)} files, {frames:.0f} frames wanted of each")
    for name, measured in times.items():
        print(
            f"  {name:<28}{1000 * statistics.median(measured):8.1f} ms"
            f"{statistics.median(measured) / base:8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
