"""Keep the best and the last state, and stop at a step's end when asked to, or after an error."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from vidtrain.callbacks.boundary import Boundary, can_be_saved_alone
from vidtrain.callbacks.saving import LAST, CannotSave, WholeFiles, remove_parts
from vidtrain.types import UserError


class Stopped(Exception):
    """Training was asked to stop, and did so between two steps.

    Attributes:
        code: the exit code: 128 + the signal's number, or 1 for a reason of our own.
    """

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class Checkpoint(ModelCheckpoint):
    """Save `epoch_NNN.ckpt` for the best epoch and `last.ckpt` for the latest state.

    Ctrl-C and SIGTERM end training after the step under way and save `last.ckpt` first; a second
    Ctrl-C stops at once. A state saved in the middle of a step could not be gone on with. After an
    error the state of the last whole step is saved. Under Slurm, the signal that announces the end of
    the job's time (`--signal=USR1@90`) saves and has the job queued again.

    Args:
        monitor: the metric that decides which epoch is best: the lowest of one named `loss`, the
            highest of any other; `auto`: the task's own, val/top1, with many labels val/mAP, in
            pretraining val/loss. Without validation videos the last epoch counts as the best.
        every_n_steps: save `last.ckpt` this often, besides at the end of each epoch.

    Attributes:
        kept: after an error, which step `last.ckpt` is of; None where nothing was trained.
    """

    def __init__(self, monitor: str = "auto", every_n_steps: int | None = None) -> None:
        super().__init__(
            filename="epoch_{epoch:03d}",
            auto_insert_metric_name=False,
            monitor=None if monitor == "auto" else monitor,
            mode="min" if "loss" in monitor else "max",
            save_last=True,
            save_top_k=1,
            enable_version_counter=False,
        )
        self.wanted_monitor = monitor
        self.every_n_steps = every_n_steps
        self._written = 0  # the step of the last `last.ckpt` that we wrote ourselves
        self.kept: int | None = None
        self._boundary: Boundary | None = None
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose what to monitor before a resumed run's state is loaded."""
        if stage == "fit":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if trainer.limit_val_batches == 0 or not data.has_split("val"):
                self.monitor = None
            elif self.wanted_monitor == "auto":
                self.monitor = str(pl_module.monitor)
                if "loss" in self.monitor:
                    self.mode, self.kth_value = "min", torch.tensor(torch.inf)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                trainer.strategy.checkpoint_io = WholeFiles()
            if trainer.is_global_zero:
                remove_parts(Path(str(self.dirpath)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for Ctrl-C, SIGTERM and Slurm's signal."""
        super().on_train_start(trainer, pl_module)
        self._boundary = Boundary(trainer, pl_module)
        numbers = [signal.SIGINT, signal.SIGTERM]
        if (number := requeue_signal(trainer)) is not None:
            numbers.append(number)
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._previous[number] = signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back, where Lightning has not: its own handlers would keep the whole run."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._ask_to_stop:
                signal.signal(number, handler)
        self._previous.clear()

    def on_before_optimizer_step(self, trainer: L.Trainer, *args: Any) -> None:
        """Note that the weights are about to change."""
        if self._boundary is not None:
            self._boundary.updating()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the weights that an average may take the place of."""
        if self._boundary is not None:
            self._boundary.validating()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that they are back."""
        super().on_validation_end(trainer, pl_module)
        if self._boundary is not None:
            self._boundary.validated()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop here when asked to; every callback has seen the step, and all of it is counted.

        The last step of an epoch is followed by its validation first: a run that goes on would
        not come back to it. So is a step whose gradients are still being accumulated by the next.
        """
        super().on_train_batch_end(trainer, *args, **kwargs)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if not progress.is_last_batch and progress.current.ready % trainer.accumulate_grad_batches:
            return
        if self._boundary is not None:
            self._boundary.passed()
        if progress.is_last_batch:
            return
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save_now(trainer)
        self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best, and the latest whether it is the best or not (Lightning saves only then)."""
        if self.monitor is None or self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)
        elif validated(trainer):
            measured = sorted(key for key in trainer.callback_metrics if key.startswith("val/"))
            raise UserError(
                f"callbacks.checkpoint.monitor is '{self.monitor}', which was not measured;"
                + (
                    f" there are {', '.join(measured)}"
                    if measured
                    else " no validation video can be read"
                )
            )
        self.save_now(trainer)
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        # All ranks stop at the same step: saving gathers from each of them.
        asked = self._signal is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            number = int(self._signal or 0)
            if trainer.world_size > 1:  # not every rank has been sent it
                number = int(trainer.strategy.reduce(torch.tensor(number), reduce_op="max"))
            self.save_now(trainer)
            reason = f"stopped by {signal.Signals(number).name} after step {trainer.global_step}"
            if number == requeue_signal(trainer) and trainer.is_global_zero:
                reason += requeue()
            raise Stopped(reason, 128 + number)

    def save_now(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt` as things stand."""
        if trainer.global_step > max(self._written, self._last_global_step_saved):
            # Lightning would take this for the epoch's checkpoint and not look for the best.
            kept = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved, self._written = kept, trainer.global_step

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last whole step as `last.ckpt`; the error itself goes its way.

        Without a word to the other ranks, which may be waiting for this one in the middle of a step.
        """
        boundary, self._boundary = self._boundary, None
        if boundary is None or isinstance(exception, (Stopped, KeyboardInterrupt, SystemExit)):
            return
        self.kept = max(self._written, self._last_global_step_saved) or None
        if isinstance(exception, CannotSave) or not can_be_saved_alone(trainer):
            return
        try:
            state = boundary.state()
            if state is not None and state["global_step"] > (self.kept or 0):
                if trainer.is_global_zero:
                    trainer.strategy.checkpoint_io.save_checkpoint(
                        state, Path(str(self.dirpath)) / LAST
                    )
                self.kept = state["global_step"]
        except Exception as error:  # a device that answers no more, weights that are not finite
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"the state of the last step cannot be kept: {reason}", file=sys.stderr)


def requeue_signal(trainer: L.Trainer) -> signal.Signals | None:
    """Give the signal with which Slurm announces the end of the job's time; None outside of Slurm."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def requeue() -> str:
    """Have Slurm queue this job again; the end of a sentence says what became of it."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    program = shutil.which("scontrol")
    if program is None:
        return f"; job {job} is not queued again: there is no scontrol here"
    done = subprocess.run([program, "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"; job {job} is not queued again: {' '.join(done.stderr.split())}"
    return f"; job {job} is queued again"


def validated(trainer: L.Trainer) -> bool:
    """Say whether this epoch was to be validated: not where `trainer.max_steps` has cut it short."""
    every = trainer.check_val_every_n_epoch or 1
    whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return bool(trainer.limit_val_batches) and whole and (trainer.current_epoch + 1) % every == 0
