"""Count the videos that cannot be read, say which, and stop when they are too many."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from vidtrain.types import Failure, UserError

SHOWN = 5  # failures printed in full; the rest is counted


class CountFailures(L.Callback):
    """In training another video stands in for one that cannot be read; in testing none does.

    Args:
        max_share: of the videos asked for in an epoch. Past it training stops.

    Attributes:
        found: every failure of training, by path.
    """

    def __init__(self, max_share: float = 0.1) -> None:
        self.max_share = max_share
        self.found: dict[str, str] = {}
        self._asked = self._failed = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count anew."""
        self._asked = self._failed = 0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note a batch's failures.

        Raises:
            UserError: more than `max_share` of this epoch's videos could not be read.
        """
        failures: list[Failure] = batch["failures"]
        self._asked += len(batch["index"]) + len(failures)
        self._failed += len(failures)
        for failure in failures:
            self._say(failure)
        # Ten videos, so that one bad file at the start does not end a run.
        if self._asked >= 10 and self._failed > self.max_share * self._asked:
            raise UserError(
                f"{self._failed} of the {self._asked} videos read so far in this epoch cannot be"
                f" read (the limit is data.max_failures={self.max_share}), the last one"
                f" {failures[-1].path if failures else ''}: `vidtrain data action=check` lists them"
            )

    @rank_zero_only
    def _say(self, failure: Failure) -> None:
        if failure.path in self.found:
            return
        self.found[failure.path] = failure.reason
        if len(self.found) <= SHOWN:
            Console(stderr=True).print(
                f"skipped {failure.path}: {failure.reason}", style="yellow", markup=False
            )
        if len(self.found) == SHOWN:
            Console(stderr=True).print("further skipped videos are counted in data/failures")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Name the validation videos that the epoch's score does not rest on."""
        for failure in batch["failures"]:
            self._say(failure)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log how many of this epoch's videos failed, over all ranks."""
        if not self._asked:
            return
        count = torch.tensor(float(self._failed), device=pl_module.device)
        pl_module.log("data/failures", count, reduce_fx="sum", sync_dist=trainer.world_size > 1)
