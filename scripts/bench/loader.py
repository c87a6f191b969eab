"""Time the loader against torch's DataLoader on the same batches, without any decoding.

    python scripts/bench/loader.py --rounds 7

Each sample is copied out of a ready clip, channels last, so what is timed is how batches come from
the workers to the main process, which copies them once, as to a device. Each way has its own
workers, which stay; every round takes the same number of batches from each in turn. Printed are
medians over the rounds, in milliseconds a batch: the time that passes, and the CPU time of the main
process and of the workers; and the CPU time of both as a ratio to ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from vidtrain.data.loader import Loader
from vidtrain.data.order import EvaluationOrder


class Clips:
    """Clips that cost one copy each: `(T, C, H, W)` uint8 whose memory is `T H W C`."""

    def __init__(self, frames: int, size: int) -> None:
        clip = torch.randint(256, (frames, size, size, 3), dtype=torch.uint8)
        self.clip = clip.permute(0, 3, 1, 2)

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        return self.clip.clone()


def stack(samples: list[torch.Tensor]) -> torch.Tensor:
    """Stack as torch does by itself: the batch is no longer channels last."""
    return torch.stack(samples)


def stack_as_is(samples: list[torch.Tensor]) -> torch.Tensor:
    """Stack what lies in memory: quicker, and the batch is channels last."""
    return torch.stack([sample.permute(0, 2, 3, 1) for sample in samples]).permute(0, 1, 4, 2, 3)


def stack_shared(samples: list[torch.Tensor], empty: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Stack what lies in memory, into the memory that the main process reads."""
    frames, channels, height, width = samples[0].shape
    batch = empty((len(samples), frames, height, width, channels), torch.uint8)
    torch.stack([sample.permute(0, 2, 3, 1) for sample in samples], out=batch)
    return batch.permute(0, 1, 4, 2, 3)


def cpu_seconds(pid: int) -> float:
    """Return what a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=60, help="of each way in a round")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    torch.set_num_threads(1)
    clips = Clips(args.frames, args.size)
    order = EvaluationOrder(args.batches * args.batch_size, args.batch_size, 0, 1)

    def torchs(collate: Callable[..., Any]) -> Iterable[torch.Tensor]:
        return DataLoader(
            clips,  # type: ignore[arg-type]
            batch_sampler=order,
            num_workers=args.workers,
            collate_fn=collate,
            persistent_workers=True,
        )

    ways = {
        "DataLoader, torch.stack": torchs(stack),
        "DataLoader, channels last": torchs(stack_as_is),
        "Loader": Loader(clips, order, stack_shared, workers=args.workers),
    }
    pids: dict[str, set[int]] = {}
    copies: dict[str, torch.Tensor] = {}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            others = children()
            worker_cpu = sum(map(cpu_seconds, pids.get(name, ())))
            wall, main_cpu = time.perf_counter(), time.process_time()
            for batch in way:
                if name not in copies:
                    copies[name] = torch.empty_like(batch)
                copies[name].copy_(batch)
            wall, main_cpu = time.perf_counter() - wall, time.process_time() - main_cpu
            if not number:  # the workers start, and the memory is new
                pids[name] = children() - others
                continue
            worker_cpu = sum(map(cpu_seconds, pids[name])) - worker_cpu
            times[name].append((wall, main_cpu, worker_cpu))
    print(f"{'ms per batch':<28}{'wall':>9}{'main':>9}{'workers':>9}{'CPU, ratio':>12}")
    medians = {
        name: [
            1000 * statistics.median(column) / args.batches for column in zip(*rows, strict=True)
        ]
        for name, rows in times.items()
    }
    base = sum(medians["Loader"][1:])
    for name, (wall, main_cpu, worker_cpu) in medians.items():
        ratio = (main_cpu + worker_cpu) / base
        print(f"{name:<28}{wall:>9.1f}{main_cpu:>9.1f}{worker_cpu:>9.1f}{ratio:>12.2f}")


if __name__ == "__main__":
    main()
