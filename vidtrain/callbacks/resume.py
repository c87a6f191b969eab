"""Go on in the middle of an epoch with the rows and the random numbers that were still to come.

Lightning restores weights, optimizer and counters; what it lacks is where in the epoch the data
stood and the state of the random generators of every rank.
"""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Take the state of every generator, in types that `torch.load(weights_only=True)` reads."""
    version, state, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": [version, list(state), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back where they were."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


class ExactResume(L.Callback):
    """Store and restore the place in the epoch and the random state of each rank."""

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gather every rank's random state; without the gather the ranks would drift apart."""
        states: list[Any] = [random_state()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, random_state())
        checkpoint["random_state"] = states

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
        self._states = checkpoint.get("random_state")

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Restore once the loader has drawn its own base seed, before the first step draws any."""
        if self._states is not None:
            if len(self._states) == trainer.world_size:
                set_random_state(self._states[trainer.global_rank])
            self._states = None
