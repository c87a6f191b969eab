"""How many clips a second, and how much of the time goes into waiting for data."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as L


class Throughput(L.Callback):
    """Measure clips per second and the share of the time spent waiting for the next batch.

    Attributes:
        clips_per_second: over all devices, over the epoch so far.
        data_wait: between 0 and 1, over the epoch so far.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._clips = 0
        self._waited = 0.0
        self._began = self._batch_ended = time.perf_counter()
        self._skip = True  # the first batch of an epoch waits for the workers to start

    @property
    def clips_per_second(self) -> float:
        """Clips of this epoch over its time so far; 0 before the second batch."""
        return self._clips / max(1e-9, self._batch_ended - self._began) if self._clips else 0.0

    @property
    def data_wait(self) -> float:
        """Share of this epoch's time so far in which no batch was there to work on."""
        return self._waited / max(1e-9, self._batch_ended - self._began) if self._clips else 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the last batch as waiting."""
        now = time.perf_counter()
        if self._skip:
            self._began = self._batch_ended = now
        else:
            self._waited += now - self._batch_ended

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the batch's clips."""
        self._skip = False
        first = pl_module.model.inputs[0]  # type: ignore[union-attr,index]
        if first in batch:  # (B, V, ...): each view is a sample of its own
            self._clips += math.prod(batch[first].shape[:2]) * trainer.world_size
        self._batch_ended = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log both, once an epoch: each `log` of a step costs a quarter of a millisecond."""
        if not self._clips:  # a run that goes on at an epoch's end passes it once more
            return
        pl_module.log("train/clips_per_second", self.clips_per_second)
        pl_module.log("train/data_wait", self.data_wait)
