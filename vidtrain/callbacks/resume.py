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
    """Start the data where a checkpoint stood, and each batch with random numbers of its own."""

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
