"""Measure what the trainer costs over a bare PyTorch loop, on the same batches.

    python scripts/bench/overhead.py
    python scripts/bench/overhead.py --cpu-time data.batch_size=12
    python scripts/bench/overhead.py model=r3d_18 trainer=gpu --steps 200

A run of `vidtrain train`, with its callbacks, its CSV logger and its progress line, and a bare loop (device
transform, forward, backward, step of optimizer and schedule) train the same network on the same batches,
which lie in memory. They take turns, round by round. Printed is the median time of a step of both, and
the share that the trainer adds. Words are those of `vidtrain train`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra import compose, initialize_config_dir
from lightning.fabric.utilities import move_data_to_device

from vidtrain import build
from vidtrain.commands.train import quieten
from vidtrain.config import conf_dir

WORDS = ["model=small_3d_cnn", "data=demo", "trainer=cpu", "logger=csv", "data.batch_size=8"]
CLOCK = time.perf_counter
BATCHES = 8  # that are made, and then used again


class Again:
    """A few batches, over and over."""

    def __init__(self, batches: list[dict[str, Any]], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self.steps):
            yield dict(self.batches[step % len(self.batches)])


class Clock(L.Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(CLOCK())


def steps_of(ends: list[float]) -> list[float]:
    """Give the milliseconds between ends, without the first steps."""
    return [1000 * (b - a) for a, b in pairwise(ends[4:])]


def with_trainer(cfg: Any, task: Any, data: Any, steps: int, folder: Path) -> list[float]:
    clock = Clock()
    loggers = build.loggers(cfg, folder)
    trainer = build.trainer(cfg, folder, [*build.callbacks(cfg, folder), clock], loggers)
    trainer.fit(task, datamodule=data)
    return steps_of(clock.ends)


def bare(task: Any, data: Any, steps: int, device: torch.device, precision: str) -> list[float]:
    task.to(device).train()
    made = task.optimizer(task.model, steps)
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    half = torch.bfloat16 if precision == "bf16-mixed" else None
    ends = []
    transform = data.transform.train()
    for batch in data.train_dataloader():
        batch = transform(move_data_to_device(batch, device))
        with torch.autocast(device.type, half, enabled=half is not None):
            loss = task.step(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(CLOCK())
    return steps_of(ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of vidtrain train, over the ones above")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, for a machine that others use too"
    )
    args = parser.parse_args()
    if args.cpu_time:
        globals()["CLOCK"] = time.process_time
    quieten()
    words = [*WORDS, "trainer.max_epochs=1", "trainer.limit_val_batches=0", *args.words]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", list({w.partition("=")[0]: w for w in words}.values()))
    cfg.paths.runs = tempfile.mkdtemp()
    L.seed_everything(0, verbose=False)
    data: Any = build.data(cfg)
    network: Any = build.model(cfg)
    data.feed(network.inputs)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(BATCHES), strict=False)]
    data.teardown("fit")
    data.train_dataloader = lambda: Again(copy.deepcopy(batches), args.steps)
    found: dict[str, list[float]] = {"bare": [], "trainer": []}
    for number in range(args.rounds):
        for name in found:
            task = build.task(cfg, copy.deepcopy(network))
            if name == "bare":
                gpu = torch.cuda.is_available() and cfg.trainer.accelerator != "cpu"
                device = torch.device("cuda" if gpu else "cpu")
                times = bare(task, data, args.steps, device, str(cfg.trainer.precision))
            else:
                folder = Path(cfg.paths.runs) / str(number)
                folder.mkdir()
                times = with_trainer(cfg, task, data, args.steps, folder)
            found[name].append(statistics.median(times))
    plain, ours = (statistics.median(times) for times in found.values())
    print(
        f"\nbare loop {plain:.2f} ms a step, trainer {ours:.2f} ms: {100 * (ours / plain - 1):+.1f} %"
    )


if __name__ == "__main__":
    main()
