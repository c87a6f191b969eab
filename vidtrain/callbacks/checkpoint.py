"""Keep the best and the last state, and stop at a step's end when asked to."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint


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
    Ctrl-C stops at once. A state saved in the middle of a step could not be gone on with.

    Args:
        monitor: the metric that decides which epoch is best (highest); `auto`: val/top1, with many
            labels val/mAP. Without validation videos the last epoch counts as the best.
        every_n_steps: save `last.ckpt` this often, besides at the end of each epoch.
    """

    def __init__(self, monitor: str = "auto", every_n_steps: int | None = None) -> None:
        super().__init__(
            filename="epoch_{epoch:03d}",
            auto_insert_metric_name=False,
            monitor=None if monitor == "auto" else monitor,
            mode="max",
            save_last=True,
            save_top_k=1,
            enable_version_counter=False,
        )
        self.wanted_monitor = monitor
        self.every_n_steps = every_n_steps
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose what to monitor before a resumed run's state is loaded."""
        if stage == "fit":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            validated = trainer.limit_val_batches != 0 and data.has_split("val")
            if not validated:
                self.monitor = None
            elif self.wanted_monitor == "auto":
                self.monitor = "val/mAP" if data.multi_label else "val/top1"
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen for Ctrl-C and SIGTERM."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop here when asked to; every callback has seen the step, and all of it is counted."""
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.save_now(trainer)
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop in the middle of a validation when asked to."""
        if not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best, and the latest whether it is the best or not (Lightning saves only then)."""
        super().on_train_epoch_end(trainer, pl_module)
        self.save_now(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        if self._signal is not None:
            self.save_now(trainer)
            name = signal.Signals(self._signal).name
            raise Stopped(f"stopped by {name} after step {trainer.global_step}", 128 + self._signal)

    def save_now(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt` as things stand."""
        if trainer.global_step > self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
