"""How many clips a second, how much of the time goes into waiting for data, how busy the GPU is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as L
import torch

from vidtrain.callbacks.mfu import OPERATIONS, MultiplyAdds, peak_here


@dataclass
class _Tally:
    """What has been done since an epoch began."""

    batches: int = 0
    clips: int = 0  # on all devices
    multiply_adds: float = 0.0  # of their forward passes
    waited: float = 0.0  # seconds
    now: float = 0.0  # seconds of a clock, when the last batch was done


class Throughput(L.Callback):
    """Measure clips per second, the share of the time spent waiting, GPU memory and MFU, and log them.

    Logged every `trainer.log_every_n_steps` steps, in one call past Lightning's `log`, which is slow;
    of an epoch that has fewer steps, at its end. Each value is over
    the steps since the one before: `train/clips_per_second`, over all devices; `train/data_wait`,
    between 0 and 1; `train/gpu_memory`, the most that tensors took up since the epoch began, in GB
    (10^9 bytes) on the first rank's device; `train/mfu`, between 0 and 1, the model FLOPs utilisation
    (`callbacks/mfu.py`). The last two are there on CUDA devices alone, MFU only on those whose
    peak is known and for networks whose multiply-adds can be counted. A frozen part counts as if it
    were trained, so that MFU is too high there.

    Attributes:
        clips_per_second: over all devices, over the epoch so far.
        data_wait: between 0 and 1, over the epoch so far.
        latest: what was logged last, by the names above without `train/`.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self._peak: float | None = None  # operations a second of one device
        self._multiply_adds: MultiplyAdds | None = None
        self._reset()

    def _reset(self) -> None:
        self._done = _Tally(now=time.perf_counter())
        self._logged = replace(self._done)  # what had been done when values were logged last
        self._began = self._paused = self._done.now
        self._skip = True  # the first batch of an epoch waits for the workers to start

    @property
    def clips_per_second(self) -> float:
        """Clips of this epoch over its time so far; 0 before the second batch."""
        done = self._done
        return done.clips / max(1e-9, done.now - self._began) if done.clips else 0.0

    @property
    def data_wait(self) -> float:
        """Share of this epoch's time so far in which no batch was there to work on."""
        done = self._done
        return done.waited / max(1e-9, done.now - self._began) if done.clips else 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look up the device, and copy the network while it is whole."""
        if stage == "fit":
            self._peak = peak_here(trainer.strategy.root_device, str(trainer.precision))
            network: Any = pl_module.model if self._peak else None
            self._multiply_adds = MultiplyAdds(network) if self._peak else None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._reset()
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: an epoch may be validated in its middle."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the clock go on."""
        pause = time.perf_counter() - self._paused
        self._began += pause
        self._done = replace(self._done, now=self._done.now + pause)
        self._logged = replace(self._logged, now=self._logged.now + pause)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the last batch as waiting."""
        now = time.perf_counter()
        if self._skip:
            self._began = self._done.now = self._logged.now = now
        else:
            self._done.waited += now - self._done.now

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
        done = self._done
        inputs: Any = pl_module.model.inputs  # type: ignore[union-attr]
        if inputs[0] in batch:  # (B, V, ...): each view is a sample of its own
            clips = math.prod(batch[inputs[0]].shape[:2]) * trainer.world_size
            done.clips += clips
            if self._multiply_adds is not None:
                sizes = (batch[key].shape[2:] for key in inputs)
                done.multiply_adds += clips * self._multiply_adds(*sizes)
        done.batches += 1
        # As many steps as lie between two: the first one of an epoch alone would say little.
        due = done.batches - self._logged.batches >= trainer.log_every_n_steps
        due = due and trainer._logger_connector.should_update_logs
        device = trainer.strategy.root_device
        if device.type == "cuda" and (due or trainer.is_last_batch):
            torch.cuda.synchronize(
                device
            )  # as reading the loss is about to do: now is when it is done
        done.now = time.perf_counter()
        if due:
            self._log(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log an epoch of which no step was logged; one gone on with at its end has no clips."""
        if self._done.clips and not self._logged.batches:
            # The step that Lightning gives to the metrics of an epoch.
            self._log(trainer, max(0, trainer.fit_loop.epoch_loop._batches_that_stepped - 1))

    def _log(self, trainer: L.Trainer, step: int) -> None:
        device, before, done = trainer.strategy.root_device, self._logged, self._done
        seconds = max(1e-9, done.now - before.now)
        self.latest = {
            "clips_per_second": (done.clips - before.clips) / seconds,
            "data_wait": (done.waited - before.waited) / seconds,
        }
        if device.type == "cuda":
            self.latest["gpu_memory"] = torch.cuda.max_memory_allocated(device) / 1e9
        work = done.multiply_adds - before.multiply_adds
        if self._peak and math.isfinite(work):
            rate = OPERATIONS * work / seconds
            self.latest["mfu"] = rate / (self._peak * trainer.world_size)
        self._logged = replace(done)
        values = {f"train/{name}": value for name, value in self.latest.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=step)
