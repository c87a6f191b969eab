"""Time a training clip's way through a worker: open, choose 16 frames x stride 4, decode, crop, resize.

    python scripts/bench/sets.py SETS VIDEO ...
    python scripts/bench/data_path.py SETS/k250 --size 224
    python scripts/bench/data_path.py SETS/ucf --size 112

Every round takes the same random clips and crops of every file, each clip through every way in turn, in
one thread. Printed is the CPU time of a clip, its median over rounds, mean over clips, as a ratio to the
limit: libav decoding, without converting colours, the frames from the keyframe before the clip to its
last frame.
decord and torchcodec are used plainly: opened, asked for the frames, cropped and resized as ours are.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

from vidtrain.data import sampling
from vidtrain.data.decode import open_video
from vidtrain.data.readers.index import FrameIndex
from vidtrain.data.transforms import sample as geometry

FRAMES, STRIDE = 16, 4
AUGMENT = geometry.Augment(area=(0.08, 1.0), hflip=0.5)


class Job(NamedTuple):
    path: str
    index: FrameIndex
    indices: list[int]
    box: geometry.Geometry
    size: int

    def fit(self, frames: torch.Tensor) -> torch.Tensor:
        return geometry.crop(frames, self.box, self.size)


def limit(job: Job) -> None:
    """Decode from the keyframe before the clip to its last frame, and do nothing with it."""
    with av.open(job.path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        start, rank = job.index.start_for(job.indices[0])
        last = job.indices[-1]
        if start:
            container.seek(int(job.index.seek[start]), stream=stream)
        for _frame in container.decode(stream):
            if rank >= last:
                return
            rank += 1


def ours(job: Job, *, anew: bool = False) -> torch.Tensor:
    box = job.box
    cut = geometry.Geometry(0, 0, box.height, box.width, box.flip)
    with open_video(job.path, index=None if anew else job.index) as reader:
        (frames,) = reader.pieces(job.indices, lambda height, width: box[:4])
        return geometry.crop(frames, cut, job.size)


def ours_anew(job: Job) -> torch.Tensor:
    return ours(job, anew=True)


def decord(job: Job) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(job.path, num_threads=1)
    return job.fit(torch.from_numpy(reader.get_batch(job.indices).asnumpy()).permute(0, 3, 1, 2))


def torchcodec(job: Job) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(job.path, dimension_order="NHWC", num_ffmpeg_threads=1)
    return job.fit(decoder.get_frames_at(job.indices).data.permute(0, 3, 1, 2))


WAYS: dict[str, Callable[[Job], object]] = {
    "limit": limit,
    "ours, index kept": ours,
    "ours, index read anew": ours_anew,
    "decord": decord,
    "torchcodec": torchcodec,
}


def jobs_of(files: list[str], clips: int, size: int, rng: np.random.Generator) -> list[Job]:
    jobs = []
    for file in files:
        with open_video(file) as reader:
            boxes = [
                geometry.random_geometry(reader.height, reader.width, size, AUGMENT, rng)
                for _ in range(clips)
            ]
            chosen = sampling.random_clips(len(reader), FRAMES, STRIDE, clips, rng)
            jobs += [
                Job(file, reader.index, indices.tolist(), box, size)
                for indices, box in zip(chosen, boxes, strict=True)
            ]
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clips", type=int, default=3, help="random clips of each video")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folder:
        files = sorted(str(file) for file in folder.iterdir())
        jobs = jobs_of(files, args.clips, args.size, np.random.default_rng(0))
        decoded = [job.indices[-1] - job.index.start_for(job.indices[0])[1] + 1 for job in jobs]
        times: dict[str, list[list[float]]] = {name: [[] for _ in jobs] for name in WAYS}
        said = {}
        for _ in range(args.rounds):
            for number, job in enumerate(jobs):
                for name in list(times):
                    began = time.process_time()
                    try:
                        WAYS[name](job)
                    except (ImportError, RuntimeError) as error:
                        said[name] = str(error).splitlines()[0][:80]
                        del times[name]
                        continue
                    times[name][number].append(time.process_time() - began)
        took = {
            name: statistics.fmean(map(statistics.median, clips)) for name, clips in times.items()
        }
        base = took["limit"]
        print(
            f"{folder.name} -> {args.size}: {len(files)} files, {len(jobs)} clips,"
            f" {np.mean(decoded):.0f} frames to decode for each, limit {1000 * base:.1f} ms"
        )
        for name, seconds in took.items():
            print(f"  {name:<24}{seconds / base:6.2f}", flush=True)
        for name, words in said.items():
            print(f"  {name:<24}  not run: {words}")


if __name__ == "__main__":
    main()
