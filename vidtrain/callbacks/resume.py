"""Go on in the middle of an epoch with the rows and the random numbers that were still to come.

Lightning restores weights, optimizer and counters; what it lacks is where in the epoch the data
stood and the state of the random generators. Neither is stored: the order of the rows is a pure
function of seed, epoch and rank (`data/order.py`), and so are a step's random numbers here. So a
rank that fails needs nothing from the others for the state to be whole.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch


def seed_step(*numbers: int) -> None:
    """Seed every global generator from these numbers.

    Not by `torch.manual_seed`, which spends 0.3 ms on devices that are not there.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "big") >> 1  # as an int64
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class ExactResume(L.Callback):
    """Start the data where a checkpoint stood, and each batch with random numbers of its own.

    The optimizer's settings are those of the run that goes on, where they are others than before: Lightning
    takes them from the checkpoint, and a lower rate after a loss that went to infinity would not be one.
    """

    def __init__(self) -> None:
        self._settings: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the settings, before the checkpoint's take their place."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                self._settings.append({k: v for k, v in group.items() if k != "params"})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put them back; how far the schedule has come stays."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, wanted in zip(groups, self._settings, strict=True):
            group["lr"] *= wanted["initial_lr"] / group["initial_lr"]
            # One cycle moves these two against the rate, between bounds that are settings as well.
            moving = {"lr", "momentum", "betas"} if "max_momentum" in wanted else {"lr"}
            group.update({key: value for key, value in wanted.items() if key not in moving})
        for config in trainer.lr_scheduler_configs:
            optimizer = config.scheduler.optimizer
            config.scheduler.base_lrs = [g["initial_lr"] for g in optimizer.param_groups]
        self._settings.clear()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell the data where the checkpoint stood."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        # "completed" is one short inside on_train_batch_end, where a stopped run is saved.
        epoch, start = checkpoint["epoch"], progress["current"]["processed"]
        if progress["is_last_batch"]:
            epoch, start = epoch + 1, 0
        trainer.datamodule.start_at = (epoch, start)  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw what this batch draws in every run of this seed: dropout, stochastic depth."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        seed_step(data.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
