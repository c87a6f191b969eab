"""`vidtrain bench`: where the time of a training clip goes, which part limits, what to change.

Each part is measured by itself on the user's data and machine, then all of them together. Nothing
is written but the caches that training would write.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import open_dict
from rich.console import Console
from rich.table import Table

from vidtrain import build, config
from vidtrain.callbacks import largest_batch
from vidtrain.commands.train import quieten
from vidtrain.data.cache import SHARE_OF_DISK, SHARE_OF_MEMORY
from vidtrain.data.crew import cores
from vidtrain.data.sources import Sources
from vidtrain.data.timing import (
    Endless,
    Read,
    Watched,
    clips_of,
    consume,
    decoded_frames,
    decoded_frames_at,
    fill,
    time_samples,
)
from vidtrain.data.transforms.sample import region_box, short_side_size
from vidtrain.types import Failure, UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vidtrain.data.module import VideoDataModule
    from vidtrain.tasks.base import VideoTask

FORMATS = ("table", "json")
KEYINT = 32  # frames from keyframe to keyframe in a file made for training
WORTH_IT = 1.05  # times the clips a second; two runs differ by as much


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured, and on what; times are milliseconds a clip."""

    decode_ms: float  # CPU time of one thread: open, decode and convert the wanted frames
    storage_ms: float  # that this thread waits for files
    worker_ms: float  # CPU time of one thread: the whole sample
    auto_worker_ms: float | None  # the same with decoder=auto, where it is another
    loader_ms: float  # time, with all workers and nobody to wait for
    transfer_ms: float | None  # None: there is no device to move to
    device_ms: float  # device transform
    model_ms: float  # forward, backward, optimizer
    together_ms: float  # loader to optimizer, as in training
    data_wait: float  # share of that in which there was no batch
    batch_clips: int
    workers: int
    cores: int  # for the workers of one device
    repeats: int  # clips of a video for one decode
    decoder: str
    cache: str
    samples: int  # that decode_ms and worker_ms are means of
    index_known: float  # share of them whose frame index was known
    from_cache: float  # share of them that came out of the cache of frames
    short_side: float  # pixels
    frames_wanted: float  # of a video
    frames_decoded: float  # for them; 0: none, or not known
    frames_decoded_resized: float  # the same, were there a keyframe every KEYINT frames
    needed_side: int  # pixels that training needs the short side to have
    set_gb: float  # of all frames for training and validation at that size, about
    cache_gb: float  # that a cache may take
    ram_gb: float  # that there is room for in memory
    disk_gb: float  # ... and on disk, no more than memory can hold
    failures: list[Failure]

    @property
    def step_ms(self) -> float:
        """What the device takes for one clip."""
        return (self.transfer_ms or 0.0) + self.device_ms + self.model_ms

    @property
    def limits(self) -> str:
        """`data` or `model`."""
        return "data" if self.loader_ms > self.step_ms else "model"

    @property
    def efficiency(self) -> float:
        """What the loader delivers, as a share of what its workers would with a core each."""
        return (self.worker_ms + self.storage_ms) / (self.loader_ms * max(1, self.workers))

    def report(self) -> dict[str, Any]:
        """Give all of it as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["failures"] = [failure._asdict() for failure in self.failures]
        derived = {name: getattr(self, name) for name in ("step_ms", "efficiency", "limits")}
        return {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in {**values, **derived}.items()
        }


class Advice(NamedTuple):
    """A change, why, and how many times the clips a second to expect of it (None: not known)."""

    change: str
    why: str
    gain: float | None


def main(cfg: DictConfig) -> None:
    """Measure; print a table with advice, or everything as one JSON object.

    Raises:
        UserError: a wrong setting, or no training videos; or these have no labels, and the task needs them.
    """
    seconds = cfg.seconds
    if cfg.format not in FORMATS:
        raise UserError(f"format is '{cfg.format}'; it must be one of {', '.join(FORMATS)}")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds > 0:
        raise UserError(f"seconds is {seconds!r}; it must be a number, more than 0")
    quieten()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    build.check_optim(cfg)
    for key, off in (("multigrid", None), ("profile", False)):
        if cfg.get(key) != off:
            raise UserError(f"bench times clips of one shape, without {key}; leave it out")
    if cfg.data.batch_size == largest_batch.AUTO:
        largest_batch.check_accelerator(cfg.trainer.accelerator)
    data = build.data(cfg)
    if cfg.data.num_classes is None:
        with open_dict(cfg):
            cfg.data.num_classes = len(data.label_names)
    if data.has_features:
        raise UserError(f"bench times videos, and data={data.name} has features")
    network = build.model(cfg)
    task = build.task(cfg, network)
    data.split_for("train", task.uses_labels)
    data.feed(network.inputs)  # type: ignore[arg-type]
    build.checkpointing(cfg, network)
    trainer = build.trainer(cfg, Path("."), [], [])
    if cfg.data.batch_size == largest_batch.AUTO:
        tell("batch size")
        data.batch_size = largest_batch.fitting_batch(trainer, task, data).size
        largest_batch.refuse_none(data.batch_size)
    try:
        found = measure(data, task, trainer, float(seconds))
    finally:
        data.teardown("bench")
    device = trainer.strategy.root_device
    head = {
        "dataset": data.name,
        "model": config.choices().get("model", cfg.model._target_),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": str(trainer.precision),
    }
    if cfg.format == "json":
        print(
            json.dumps({**head, **found.report(), "advice": [a._asdict() for a in advise(found)]})
        )
    else:
        show(head, found)


def measure(data: VideoDataModule, task: VideoTask, trainer: L.Trainer, seconds: float) -> Measured:
    """Measure every part for about `seconds`."""
    loader = data.train_dataloader()
    rows: Sequence[int] = range(len(loader.dataset))
    size = min(data.batch_size, len(loader.dataset))
    loader.order = Endless(rows, size, data.seed)
    if data.cache != "none":  # the first epoch fills it; measured is every epoch after
        tell("cache")
        rows = fill(loader, seconds)
        loader.order = Endless(rows, size, data.seed)

    tell("decode and worker")
    dataset, sources = data.dataset("train", training=True), data.sources
    keys = Endless(rows, size, data.seed + 1).keys()
    alone = time_samples(dataset, sources, keys, seconds)
    auto = None
    if data.decoder != "auto":
        keys = Endless(rows, size, data.seed + 1).keys()  # the same again
        sources = Sources("auto", sources.indices, sources.cache, sources.shards)
        auto = time_samples(dataset, sources, keys, seconds)

    tell("loader")
    crew = max(1, data.workers)
    drained = consume(iter(loader), lambda batch: None, seconds, crew)
    step = Step(data, task, trainer)
    parts = step.time_parts(drained.batch, seconds)
    tell("together")
    bursts = drained.ms > sum(filter(None, parts.values()))
    # where batches lie ready, it does not matter when the clock starts
    together = consume(iter(loader), step, seconds, crew if bursts else 1)

    failures = [*alone.failures, *drained.failures, *together.failures]
    return Measured(
        decode_ms=alone.decode[0] / alone.clips * 1e3,
        storage_ms=alone.storage() / alone.clips * 1e3,
        worker_ms=alone.total[0] / alone.clips * 1e3,
        auto_worker_ms=None if auto is None else auto.total[0] / auto.clips * 1e3,
        loader_ms=drained.ms,
        **parts,
        together_ms=together.ms,
        data_wait=together.wait,
        batch_clips=clips_of(drained.batch),
        workers=data.workers,
        cores=max(1, cores() // trainer.num_devices),
        repeats=data.augment.repeats,
        decoder=data.decoder,
        cache=data.cache,
        **look_at(alone, data),
        failures=list({failure.path: failure for failure in failures}.values()),
    )


def tell(part: str) -> None:
    """Say what is being measured; results alone go to stdout."""
    print(f"measuring: {part}", file=sys.stderr)


class Step:
    """A step of training, from the loader's batch on, in the trainer's precision."""

    def __init__(self, data: VideoDataModule, task: VideoTask, trainer: L.Trainer) -> None:
        self.device = trainer.strategy.root_device
        self.precision = trainer.precision_plugin
        scaler = getattr(self.precision, "scaler", None)  # of 16-mixed
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)
        self.transform = data.transform.train()
        self.task: Any = self.precision.convert_module(task).to(self.device).train()
        self.optimizer = task.optimizer(task.model, 1000)["optimizer"]

    def __call__(self, batch: dict[str, Any]) -> None:
        """Do all of it, and wait for the device."""
        self.learn(self.transform(self.move(batch)))
        self.synchronize()

    def move(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Copy a batch to the device, as Lightning does."""
        return dict(move_data_to_device(batch, self.device))

    def learn(self, batch: dict[str, Any]) -> None:
        """Go forward and back, and change the weights."""
        with self.precision.train_step_context():
            loss = self.task.step(self.precision.convert_input(batch)).loss
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def mean_ms(self, call: Callable[[], Any], seconds: float) -> float:
        """Call something for some seconds; milliseconds of a call, until the device is done."""
        for _ in range(1 if self.device.type == "cpu" else 3):  # kernels are chosen, or compiled
            call()
        self.synchronize()
        calls = 0
        began = time.perf_counter()
        while not calls or time.perf_counter() - began < seconds:
            call()
            self.synchronize()
            calls += 1
        return (time.perf_counter() - began) / calls * 1e3

    def time_parts(self, batch: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Time the parts on one batch: milliseconds a clip."""
        clips = clips_of(batch)
        moved = self.move(batch)
        ready = self.transform(dict(moved))
        tell("transfer, device and model")
        on_cpu = self.device.type == "cpu"
        move = None if on_cpu else self.mean_ms(lambda: self.move(batch), seconds) / clips
        return {
            "transfer_ms": move,
            "device_ms": self.mean_ms(lambda: self.transform(dict(moved)), seconds) / clips,
            "model_ms": self.mean_ms(lambda: self.learn(ready), seconds) / clips,
        }


def look_at(alone: Watched, data: VideoDataModule) -> dict[str, Any]:
    """Say what the videos are like that were read, and what room there is for all their frames."""
    side = data.cached_short_side()

    def facts(one: Read) -> tuple[float, ...]:
        size = one.height, one.width
        kept = size if min(size) <= side else short_side_size(*size, side)
        if data.region is not None:
            kept = region_box(data.region, *kept)[2:]
        decoded = 0 if one.frame_index is None else decoded_frames(one.frame_index, one.wanted)
        resized = decoded_frames_at(KEYINT, one.wanted) if decoded else 0
        return (
            one.cached,
            min(size),
            len(one.wanted),
            decoded,
            resized,
            one.length * math.prod(kept),
        )

    cached, short, wanted, decoded, resized, pixels = np.mean([*map(facts, alone.read)], 0).tolist()
    rows = sum(data.manifest.splits.get(split, 0) for split in ("train", "val"))
    cache, shm = data.sources.cache, Path("/dev/shm")
    in_ram = shutil.disk_usage(shm).free if shm.is_dir() else 0
    # of a disk, what is more than memory is read from it again each time: slower than decoding
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on_disk = min(SHARE_OF_DISK * shutil.disk_usage(data.cache_dir).free, SHARE_OF_MEMORY * memory)
    return {
        "samples": len(alone.read),
        "index_known": 1 - len(alone.new) / len(alone.read),
        "from_cache": cached,
        "short_side": short,
        "frames_wanted": wanted,
        "frames_decoded": decoded,
        "frames_decoded_resized": resized,
        "needed_side": side,
        "set_gb": rows * pixels * 3 / 1e9,
        "cache_gb": data.cache_gb if cache is None else cache.report().limit / 1e9,
        "ram_gb": SHARE_OF_MEMORY * in_ram / 1e9,
        "disk_gb": on_disk / 1e9,
    }


def advise(found: Measured) -> list[Advice]:
    """Say what to change, most useful first, and only what would be felt."""
    advice: list[Advice] = []
    loader, step = found.loader_ms, found.step_ms
    clip = found.worker_ms + found.storage_ms  # what passes in a worker

    def pace(loader_ms: float, workers: int) -> float:
        return max(loader_ms, step) if workers else loader_ms + step  # 0: one after the other

    def add(change: str, loader_ms: float, why: str, workers: int = found.workers) -> None:
        gain = pace(loader, found.workers) / pace(loader_ms, workers)
        if gain > WORTH_IT:
            advice.append(Advice(change, why, round(gain, 2)))

    def without(saved: float) -> float:
        return loader * max(0.0, clip - saved) / clip

    need = math.ceil(max(1, found.workers) * loader / step)
    most = max(1, int(found.cores * clip / found.worker_ms))  # who waits for a file needs no core
    more = min(need, most)
    if more > found.workers:
        add(
            f"data.workers={more}",
            loader * max(1, found.workers) / more,
            f"{need} would keep up with the model; there are {found.cores} cores",
            more,
        )
    if found.auto_worker_ms is not None:
        add(
            "data.decoder=auto",
            without(found.worker_ms - found.auto_worker_ms),
            f"the same clips took it {found.auto_worker_ms:.3g} ms each,"
            f" {found.decoder} {found.worker_ms:.3g} ms",
        )
    ways = (("ram", found.ram_gb), ("disk", found.disk_gb)) if found.cache == "none" else ()
    kind = next((kind for kind, room in ways if found.set_gb < room), None)
    if kind:
        large = found.set_gb > found.cache_gb
        budget = f" data.cache_gb={math.ceil(found.set_gb * 1.1)}" if large else ""
        add(
            f"data.cache={kind}{budget}",
            without(found.decode_ms + found.storage_ms),
            f"at most, as decoding is {found.decode_ms / found.worker_ms:.0%} of a worker's time;"
            f" all frames take about {found.set_gb:.2g} GB, and the first epoch decodes them",
        )
    if found.cache != "none" and found.set_gb > found.cache_gb:
        why = f"all frames take about {found.set_gb:.2g} GB; what does not fit is decoded each time"
        advice.append(Advice(f"raise data.cache_gb, {found.cache_gb:.2g} now", why, None))
    side = min(found.short_side, found.needed_side)
    # A frame of half the height and width takes about half the time: measured, not a quarter.
    now, then = found.frames_decoded * found.short_side, found.frames_decoded_resized * side
    if then < now / 1.5:
        add(
            "vidtrain data action=resize",
            without(found.decode_ms * (1 - then / now)),
            f"{found.frames_decoded:.0f} frames of {found.short_side:.0f} pixels are decoded for"
            f" {found.frames_wanted:.0f}; with a keyframe every {KEYINT} it would be"
            f" {found.frames_decoded_resized:.0f}, and {side:.0f} pixels are enough",
        )
    if found.storage_ms > found.worker_ms / 2:
        add(
            "a local disk, or fewer and larger files (vidtrain data action=pack)",
            without(found.storage_ms),
            f"a worker waits {found.storage_ms:.3g} ms a clip for files",
        )
    if found.repeats == 1 and need > most:
        add(
            "augment.repeats=2",
            without((found.decode_ms + found.storage_ms) / 2),
            "at most: one decode serves two clips; batches vary less",
        )
    if found.failures:
        why = f"cannot be read: {len(found.failures)}, among them {found.failures[0].path}"
        advice.append(Advice("vidtrain data action=check", why, None))
    return sorted(advice, key=lambda one: -(one.gain or math.inf))


def show(head: dict[str, str], found: Measured) -> None:
    """Print the table, what limits, and the advice."""
    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(width=200, emoji=False)  # in a file or a pipe nothing is cut
    line = f"{', '.join(head.values())}, {found.batch_clips} clips a batch"
    console.print(line, markup=False, highlight=False)
    table = Table("part")
    for column in ("ms per clip", "clips/s"):
        table.add_column(column, justify="right")
    table.add_column("of what", overflow="fold")
    known = f"frame index known of {found.index_known:.0%}"
    if found.cache != "none":
        known += f", {found.from_cache:.0%} out of the cache"
    if found.storage_ms > found.worker_ms / 10:
        known += f", {found.storage_ms:.3g} ms more of waiting for files"
    crew = f"{found.workers} workers on {found.cores} cores, nobody to wait for"
    crew += f": {found.efficiency:.0%} of {found.workers} times one thread"
    if not found.workers:
        crew = "the main process, as data.workers is 0"
    shared = ", on the same cores" if head["device"] == "cpu" else ""
    for part, ms, what in (
        ("decode", found.decode_ms, f"CPU, one thread, {found.samples} videos; {known}"),
        ("worker", found.worker_ms, "CPU, one thread: decode, crop, resize"),
        ("loader", found.loader_ms, crew),
        ("transfer", found.transfer_ms, "a batch to the device"),
        ("device", found.device_ms, "device transform: float, normalise, mix"),
        ("model", found.model_ms, "forward, backward, optimizer"),
        (
            "together",
            found.together_ms,
            f"all at once{shared}; {found.data_wait:.0%} waiting for a batch",
        ),
    ):
        numbers = ("-", "-") if ms is None else (f"{ms:.3g}", f"{1e3 / ms:,.0f}")
        table.add_row(part, *numbers, what)
    console.print(table)
    slow, fast = max(found.loader_ms, found.step_ms), min(found.loader_ms, found.step_ms)
    console.print(
        f"limits: {found.limits}; {found.loader_ms:.3g} ms a clip in the loader,"
        f" {found.step_ms:.3g} ms in transfer, device and model ({slow / fast:.1f}x)",
        style="bold",
        highlight=False,
    )
    advice = advise(found)
    if found.limits == "model" and not any(one.gain for one in advice):
        console.print("nothing to gain on the side of the data", highlight=False)
    for one in advice:
        gain = f" (about {one.gain:.3g}x the clips/s)" if one.gain else ""
        console.print(f"{one.change}{gain}: {one.why}", markup=False, highlight=False)
    for failure in found.failures[:5]:
        line = f"cannot be read: {failure.path}: {failure.reason}"
        console.print(line, style="yellow", markup=False, highlight=False)
