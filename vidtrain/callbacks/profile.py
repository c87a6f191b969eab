"""`profile=true`: a few steps of training that say where the time of a step goes.

Two passes, one after the other. In the first the clock alone runs: Lightning tells its profiler when an
action begins and ends, and the device is waited for at each of these, so that what it does counts where it
was asked for. In the second torch writes down every operation, which takes time itself.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.profilers import Profiler
from rich.console import Console
from rich.table import Table

from vidtrain.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vidtrain.data.module import VideoDataModule

WARM_UP, MEASURED, TRACED = 5, 20, 3  # batches, at least
OPERATIONS = 10  # that are listed
WORTH_SAYING = 0.1  # of a step

DATA, MOVE, FORWARD, BACKWARD = "waiting for data", "moving and transforming", "forward", "backward"
OPTIMIZER, CALLBACKS, LOGGING, LOOP = "optimizer", "callbacks", "logging", "the loop between"
SECTIONS = (DATA, MOVE, FORWARD, BACKWARD, OPTIMIZER, CALLBACKS, LOGGING, LOOP)
PARTS = {  # what the verdict names
    "data": (DATA,),
    "device": (MOVE, FORWARD, BACKWARD, OPTIMIZER),
    "logging and callbacks": (CALLBACKS, LOGGING),
    "loop": (LOOP,),
}

FETCH, LAST = "train_dataloader_next", "on_train_epoch_end"
HOOKS = {
    FETCH: DATA,
    "batch_to_device": MOVE,
    "on_before_batch_transfer": MOVE,
    "transfer_batch_to_device": MOVE,
    "on_after_batch_transfer": MOVE,
    "training_step": FORWARD,
    "backward": BACKWARD,
    "optimizer_step": OPTIMIZER,
    "optimizer_zero_grad": OPTIMIZER,
    "configure_gradient_clipping": OPTIMIZER,
    "lr_scheduler_step": OPTIMIZER,
}
KINDS = {"Callback": CALLBACKS, "Logger": LOGGING}


def section_of(action: str) -> str | None:
    """Say what an action of Lightning's, `[Kind]Class.hook`, counts as; None: as what it is in."""
    kind = action[1:].partition("]")[0]
    return KINDS.get(kind) or HOOKS.get(action.rpartition(".")[2])


def check(cfg: DictConfig) -> None:
    """Make of a run's config that of a short one.

    Raises:
        UserError: there is a run to go on with.
    """
    if cfg.profile is not True:
        raise UserError(f"profile is {cfg.profile!r}; it is true or false")
    if cfg.resume is not None:
        raise UserError("profile=true times a few steps from the start; leave resume out")
    cfg.test = False
    for name in ("checkpoint", "fusion"):  # what saves, and what goes through all videos in the end
        if name in cfg.callbacks:
            cfg.callbacks[name] = None
    if cfg.get("multigrid") is not None:
        raise UserError(
            "profile=true times clips of one shape; add multigrid=none, and to time another shape clip.size=..."
        )
    cfg.trainer.max_epochs, cfg.trainer.max_steps, cfg.trainer.max_time = 1, -1, None
    cfg.trainer.limit_train_batches, cfg.trainer.limit_val_batches = 1.0, 0


class Plan(NamedTuple):
    """How many batches a profile takes."""

    warm_up: int  # kernels are chosen, and batches used up that were made before the first step
    measured: int  # of each worker as many, since their batches come together
    traced: int

    @classmethod
    def of(cls, workers: int, prefetch: int, accumulated: int) -> Plan:
        """Plan whole steps of `accumulated` batches each."""

        def whole(batches: int, of: int) -> int:
            return -(-batches // of) * of

        ahead = workers * prefetch
        return cls(
            whole(WARM_UP + ahead, accumulated),
            whole(whole(MEASURED, max(1, workers)), accumulated),
            whole(TRACED, accumulated),
        )


class Again:
    """One epoch after the other, as one of so many batches."""

    def __init__(self, order: Any, batches: int) -> None:
        self.order, self.batches = order, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            self.order.set_epoch(epoch)
            yield from self.order


class Sections(Profiler):
    """Share out the time of a step among its sections: an action's time is without those inside it.

    Args:
        trainer: whose device is waited for, and whose loggers are timed; it gets this for a profiler.
        data: gives as many batches as it takes.
        trace: the file of the operations' trace; None: this rank writes none.

    Attributes:
        spent: seconds of each section and action, in all measured steps.
        steps: measured so far.
        operations: the most expensive ones, with milliseconds and calls a batch.
    """

    def __init__(self, trainer: L.Trainer, data: VideoDataModule, trace: Path | None) -> None:
        super().__init__()
        self.device, self.trace = trainer.strategy.root_device, trace
        self.workers, self.plan = 0, Plan(WARM_UP, MEASURED, TRACED)
        self.trainer, self.data = trainer, data
        self.spent: Counter[tuple[str, str]] = Counter()
        self.steps = 0
        self.operations: list[dict[str, Any]] = []
        self._begun = 0  # batches asked for
        self._open: list[tuple[str, str]] = []
        self._last = time.perf_counter()
        self._tracer: Any = None
        trainer.profiler = self  # type: ignore[assignment]
        make = data.train_dataloader
        data.train_dataloader = lambda: self._repeat(make())  # type: ignore[method-assign]
        for logger in trainer.loggers:
            for name in ("log_metrics", "save"):
                self._time(logger, name)

    def _repeat(self, loader: Any) -> Any:
        """Give a loader as many batches as the profile takes, which is known once there are ranks."""
        self.workers = self.data.workers
        self.plan = Plan.of(self.workers, self.data.prefetch, self.trainer.accumulate_grad_batches)
        loader.order = loader.batch_sampler = Again(loader.order, sum(self.plan))
        loader.order.set_epoch = lambda epoch: None  # Lightning's own count is of one
        return loader

    def _time(self, logger: Any, name: str) -> None:
        """Make a logger's method an action: Lightning tells of none."""
        call: Callable[..., Any] = getattr(logger, name)
        action = f"[Logger]{type(logger).__name__}.{name}"

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.profile(action):
                return call(*args, **kwargs)

        setattr(logger, name, timed)

    @property
    def measuring(self) -> bool:
        """Say whether the step under way counts."""
        return self.plan.warm_up < self._begun <= self.plan.warm_up + self.plan.measured

    def start(self, action_name: str) -> None:
        """Begin an action."""
        hook = action_name.rpartition(".")[2]
        if hook == LAST:
            self.close()
        section = section_of(action_name)
        if section is None:
            return
        self._tick()
        if hook == FETCH:
            self.steps += self.measuring
            self._begun += 1
            if self._begun > self.plan.warm_up + self.plan.measured:
                self._begin_trace()
        self._open.append((section, action_name))

    def stop(self, action_name: str) -> None:
        """End an action."""
        if section_of(action_name) is not None:
            self._tick()
            self._open.pop()

    def _tick(self) -> None:
        """Count the time since the last tick for the action under way."""
        if self._tracer is not None:  # which shows the device as it works by itself
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.measuring:
            self.spent[self._open[-1] if self._open else (LOOP, LOOP)] += now - self._last
        self._last = now

    def _begin_trace(self) -> None:
        if self.trace is None or self._tracer is not None:
            return
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would say that it starts and stops
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._tracer = torch.profiler.profile(activities=kinds, acc_events=True)
        self._tracer.start()

    def close(self) -> None:
        """End the trace and write it; in any case to be called in the end."""
        tracer, self._tracer, path, self.trace = self._tracer, None, self.trace, None
        if tracer is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        tracer.stop()
        tracer.export_chrome_trace(str(path))
        self.operations = expensive(tracer, self.device.type == "cuda", self.plan.traced)

    def describe(self) -> None:
        """Say nothing here: `show` does."""

    def report(self) -> dict[str, Any]:
        """Give what was measured, as plain values; times are milliseconds a batch.

        Raises:
            UserError: training ended before all was measured.
        """
        if not self.steps:
            raise UserError("profile=true: training ended before a step was measured")
        ms = Counter(dict.fromkeys(SECTIONS, 0.0))
        single: Counter[str] = Counter()
        for (section, action), seconds in self.spent.items():
            ms[section] += seconds / self.steps * 1e3
            if section in (CALLBACKS, LOGGING):
                single[plain_name(action)] += seconds / self.steps * 1e3  # type: ignore[assignment]
        step = sum(ms.values())
        found: dict[str, Any] = {
            "device": device_name(self.device),
            "precision": str(self.trainer.precision),
            "videos": self.data.batch_size,
            "workers": self.workers,
            "steps": self.steps,
            "warm_up": self.plan.warm_up,
            "step_ms": round(step, 4),
            "ms": {name: round(ms[name], 4) for name in SECTIONS},
            "shares": {name: round(ms[name] / step, 4) for name in SECTIONS},
            "callbacks_ms": {name: round(value, 4) for name, value in single.most_common()},
            "operations": self.operations,
        }
        if self.device.type == "cuda":
            found["memory_gb"] = round(torch.cuda.max_memory_reserved(self.device) / 1e9, 3)
        found["bottleneck"] = bottleneck(found)
        found["verdict"] = verdict(found)
        return found


def run(
    task: L.LightningModule, data: VideoDataModule, trainer: L.Trainer, trace: Path | None
) -> dict[str, Any]:
    """Train the few steps; say where their time went.

    Args:
        task: trained from here on.
        data: as many batches are drawn of it as it takes, epoch after epoch.
        trainer: it trains one epoch, see `check`.
        trace: the file of the operations' trace; None: this rank writes none.
    """
    sections = Sections(trainer, data, trace)
    try:
        trainer.fit(task, datamodule=data)
    finally:
        sections.close()
    return sections.report()


def expensive(tracer: Any, on_gpu: bool, batches: int) -> list[dict[str, Any]]:
    """List the operations that took most time themselves, of the device's where there is one."""

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    # A kernel's time is that of the operation that asked for it too: here it counts as the latter's.
    events = [
        event
        for event in tracer.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU and not event.is_user_annotation
    ]
    total = sum(map(own, events)) or 1.0
    return [
        {
            "name": event.key,
            "ms": round(own(event) / batches / 1e3, 4),
            "share": round(own(event) / total, 4),
            "calls": round(event.count / batches, 2),
        }
        for event in sorted(events, key=own, reverse=True)[:OPERATIONS]
    ]


def plain_name(action: str) -> str:
    """`[Callback]Early{'monitor': 'x'}.on_end` as `Early.on_end`."""
    return re.sub(r"\{.*\}", "", action.partition("]")[2])


def device_name(device: torch.device) -> str:
    """Name the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device).upper()


def bottleneck(found: dict[str, Any]) -> str:
    """Name the part that takes most of a step: a key of PARTS."""
    return max(PARTS, key=lambda part: share_of(found, part))


def share_of(found: dict[str, Any], part: str) -> float:
    """Say how much of a step a part takes."""
    return float(sum(found["shares"][section] for section in PARTS[part]))


def verdict(found: dict[str, Any]) -> str:
    """Say in a line what limits, and what to do about it."""
    part = found["bottleneck"]
    share = f"{share_of(found, part):.0%} of each step"
    if part == "data":
        return (
            f"data: the network waits {share} for its batch; more data.workers (there are"
            f" {found['workers']}), vidtrain data action=resize, or data.cache=ram or disk; vidtrain bench"
            " says what each would gain"
        )
    if part == "logging and callbacks":
        name, ms = next(iter(found["callbacks_ms"].items()))
        return (
            f"logging and callbacks: they take {share}, {name} {ms:.3g} ms of it; a larger"
            " trainer.log_every_n_steps, or callbacks.NAME=null"
        )
    if part == "loop":
        return (
            f"loop: what lies between the parts takes {share}, for these are short; a larger"
            " data.batch_size"
        )
    line = f"device: {found['device']} works {share}"
    section = max(PARTS["device"], key=lambda name: found["shares"][name])
    line += f", {found['shares'][section]:.0%} on {section}; "
    if section == MOVE:
        line += "augment=basic does less to clips"
    elif found["device"] == "CPU":
        line += "a GPU, a smaller model or a smaller clip"
    elif not found["precision"].startswith("bf16"):
        line += "trainer=gpu (bf16), compile=true"
    else:
        line += "compile=true, a smaller model or a smaller clip"
    waits = found["shares"][DATA]
    if waits >= WORTH_SAYING:
        line += f"; {waits:.0%} it waits for data, with data.workers={found['workers']}"
    return line


def show(found: dict[str, Any], folder: Path, console: Console) -> None:
    """Write `profile.json` into the run's folder, and print what is in it."""
    (folder / "profile.json").write_text(json.dumps(found, indent=1))
    memory = f", {found['memory_gb']:.3g} GB of its memory taken" if "memory_gb" in found else ""
    console.print(
        f"\n{found['steps']} batches of {found['videos']} videos on {found['device']},"
        f" {found['step_ms']:.4g} ms each{memory}, after {found['warm_up']} that do not count;"
        " nothing was validated, tested or saved",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("part of a step")
    table.add_column("ms a batch", justify="right")
    table.add_column("share", justify="right")
    for name in SECTIONS:
        table.add_row(name, f"{found['ms'][name]:.2f}", f"{found['shares'][name]:.1%}")
    console.print(table, highlight=False)
    console.print(f"\n{found['verdict']}\n", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("operation, without those inside it", overflow="fold")
    for title in ("ms a batch", "share", "calls a batch"):
        table.add_column(title, justify="right")
    for one in found["operations"]:
        row = (f"{one['ms']:.2f}", f"{one['share']:.1%}", f"{one['calls']:g}")
        table.add_row(one["name"], *row)
    console.print(table, highlight=False)
    console.print(
        f"\n{folder / 'trace.json'} shows every operation (chrome://tracing, ui.perfetto.dev);"
        " profile.json beside it holds these numbers",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
