"""What a person sees while it runs: a bar in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar

from vidtrain.callbacks.throughput import Throughput


def measured(trainer: L.Trainer) -> dict[str, str]:
    """Read the throughput callback, where there is one, for display."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput) and callback.clips_per_second:
            shown = {
                "clips/s": f"{callback.clips_per_second:.1f}",
                "data wait": f"{callback.data_wait:.0%}",
            }
            if "gpu_memory" in callback.latest:
                shown["GPU"] = f"{callback.latest['gpu_memory']:.1f} GB"
            if "mfu" in callback.latest:
                shown["MFU"] = f"{callback.latest['mfu']:.0%}"
            return shown
    return {}


class Bar(RichProgressBar):
    """Lightning's Rich bar, with clips per second and the share of time spent waiting for data."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Add the throughput to the logged metrics."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {**shown, **(measured(trainer) if trainer.training else {})}


class Lines(ProgressBar):
    """One line an epoch: for logs, pipes and clusters."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True

    def enable(self) -> None:
        """Print."""
        self._enabled = True

    def disable(self) -> None:
        """Be quiet: Lightning asks it of every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the time; a run that goes on in the middle of an epoch starts none."""
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's metrics."""
        if not self._enabled or not measured(trainer):
            return
        metrics = {
            key: value.item()
            for key, value in trainer.callback_metrics.items()
            if key in ("train/loss", "val/loss", "val/top1", "val/mAP")
        }
        words = [f"{key} {value:.4f}" for key, value in metrics.items()]
        words += [f"{key} {value}" for key, value in measured(trainer).items()]
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {'  '.join(words)}"
            f"  {seconds:.1f} s",
            flush=True,
        )


def progress() -> Callback:
    """Choose by whether somebody is looking."""
    return Bar(leave=False) if sys.stdout.isatty() else Lines()
