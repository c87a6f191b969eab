"""Measure how well a GPU is fed: the share of training time in which it waits for a batch.

    python scripts/bench/sets.py SETS VIDEO ...
    python scripts/bench/feed.py SETS/k250 --network slowfast_r50
    python scripts/bench/feed.py SETS/k250 --network mvit_v2_s --repeats 2

Trains SlowFast-R50 8x8 (32 frames x stride 2, batch 8) or MViTv2-S (16 frames x stride 4, batch 16) in
bf16 at 224 pixels on random resized crops of the videos, through vidtrain's loader and device
transform. First the loader alone and the network alone are timed, then both together; waiting is what
passes between the end of a step on the device and the next batch. Printed is milliseconds of a batch.
`--compile` compiles the network, `--channels-last` has its weights in that order.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from vidtrain.data.manifest import Annotations, make_rows, single_labels
from vidtrain.data.module import VideoDataModule
from vidtrain.models.slowfast import slowfast_r50_8x8
from vidtrain.types import Clip

CLASSES = 400
ROWS = 20_000  # each names one of the videos


def slowfast_r50() -> nn.Module:
    return slowfast_r50_8x8(CLASSES)


def mvit_v2_s() -> nn.Module:
    from torchvision.models.video import mvit_v2_s

    return mvit_v2_s(num_classes=CLASSES)


NETWORKS = {  # network, frames, stride, batch of one GPU as in the paper's recipe
    "slowfast_r50": (slowfast_r50, 32, 2, 8),
    "mvit_v2_s": (mvit_v2_s, 16, 4, 16),
}


def annotations(names: list[str]) -> Annotations:
    rng = np.random.default_rng(0)
    labels = single_labels(pa.array(rng.integers(0, CLASSES, ROWS)))
    paths = pa.array(names).take(pa.array(rng.integers(0, len(names), ROWS)))
    return Annotations(make_rows(paths, labels, ["train"] * ROWS), [str(k) for k in range(CLASSES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1, help="clips of a video for one decode")
    parser.add_argument("--cache", default="none", help="none, ram or disk")
    parser.add_argument("--batch", type=int, help="videos a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true", help="memory of the network")
    args = parser.parse_args()
    build, frames, stride, batch_size = NETWORKS[args.network]
    batch_size = (args.batch or batch_size) // args.repeats
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as cache:
        data = VideoDataModule(
            "feed",
            str(args.folder),
            partial(annotations, sorted(file.name for file in args.folder.iterdir())),
            CLASSES,
            Clip(frames, stride, 224, [0.45] * 3, [0.225] * 3),
            {"area": [0.08, 1.0], "hflip": 0.5, "repeats": args.repeats},
            {"clips": 1, "crops": 1, "short_side": None, "size": None, "memory": 512},
            batch_size=batch_size,
            workers=args.workers,
            cache=args.cache,
            cache_dir=cache,
        )
        network = build().to(device).train()
        if args.channels_last:
            network = network.to(memory_format=torch.channels_last_3d)
        optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
        step = torch.compile(network) if args.compile else network
        try:
            measure(data, step, optimizer, device, args)
        finally:
            data.teardown("fit")


def measure(data, network, optimizer, device, args) -> None:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def move(batch):
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def learn(batch) -> None:
        video = data.transform(dict(batch))["video"].flatten(0, 1)
        labels = batch["label"].repeat_interleave(len(video) // len(batch["label"]))
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(network(video).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    data.transform.train()
    batches = iter(data.train_dataloader())
    warm = max(10, args.workers)
    for _ in range(warm):
        batch = next(batches)
    began = time.perf_counter()
    for _ in range(args.steps):
        batch = next(batches)
    loader = (time.perf_counter() - began) / args.steps
    held = move(batch)
    for _ in range(5):
        learn(held)
    wait()
    began = time.perf_counter()
    for _ in range(args.steps // 2):
        learn(held)
    wait()
    alone = (time.perf_counter() - began) / (args.steps // 2)
    transform = 0.0
    wait()
    began = time.perf_counter()
    for _ in range(args.steps):
        data.transform(dict(held))
    wait()
    transform = (time.perf_counter() - began) / args.steps
    for _ in range(warm):  # what lay ready while the network was timed
        batch = next(batches)
    waited = 0.0
    began = time.perf_counter()
    for _ in range(args.steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        learn(move(batch))
        wait()
    together = time.perf_counter() - began
    clips = batch["video"].shape[0] * batch["video"].shape[1]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    count = sum(parameter.numel() for parameter in network.parameters())
    print(
        f"{args.folder.name}, {args.network} ({count:,}), {name}, {clips} clips a step,"
        f" {args.workers} workers, {args.repeats} clips a decode, cache {args.cache}"
        f"{', compiled' if args.compile else ''}{', channels last' if args.channels_last else ''}:"
    )
    print(
        f"  loader alone {1000 * loader:.1f} ms, network alone {1000 * alone:.1f} ms (device"
        f" transform {1000 * transform:.2f}), together {1000 * together / args.steps:.1f} ms,"
        f" {clips * args.steps / together:.0f} clips/s, waiting {waited / together:.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
