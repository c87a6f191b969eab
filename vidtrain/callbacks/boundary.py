"""What a step changes before its end, kept so that an error in it can be followed by a whole state.

Weights, optimizer and schedule change only in the optimizer's step. From one step's end to there only
buffers (the running statistics of batch norm) and the loops' counters do; they are copied at each step's
end. Random numbers need no copy (`resume.py`).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor


def can_be_saved_alone(trainer: L.Trainer) -> bool:
    """Tell whether a rank has the whole state by itself, which sharding strategies do not."""
    return isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))


class Boundary:
    """The end of the last whole step, told of by the `Checkpoint` callback, the last one to be called.

    Args:
        trainer: at the start of training.
        pl_module: whose buffers are copied, in place.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer, self.module = trainer, pl_module
        self.buffers = list(pl_module.buffers())
        self.copies: list[Tensor] = []
        self.step = 0  # optimizer steps at the boundary; 0: none yet in this process
        self.loops: dict[str, Any] = {}
        self.update_from = -1  # the step that an update began at
        self.before_validation: list[Tensor] | None = None

    def passed(self) -> None:
        """Take a step's end."""
        if not self.copies:
            self.copies = [buffer.detach().clone() for buffer in self.buffers]
        elif self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)
        self.step, self.loops = self.trainer.global_step, self.trainer.fit_loop.state_dict()

    def updating(self) -> None:
        """Take the start of an update of the weights; what begins it has to finish it."""
        self.update_from = self.trainer.global_step

    def validating(self) -> None:
        """Take the start of a validation, for which an average may take the place of the weights."""
        if self._averages():
            self.before_validation = self._sums()

    def validated(self) -> None:
        """Take the end of a validation."""
        self.before_validation = None

    def state(self) -> dict[str, Any] | None:
        """Make the checkpoint of the last whole step; None where there is none.

        After the last step of an epoch that is not validated yet, validation comes first in a run that
        goes on.
        """
        trainer = self.trainer
        step = trainer.global_step
        if step == self.update_from or not self.step:  # in the middle of an update, or too early
            return None
        if step == self.step:
            self._put_back()
            loops = self.loops
        else:  # an error between the update and this step's end: in a callback
            loops = trainer.fit_loop.state_dict()
        epochs = trainer.fit_loop.epoch_progress.total.processed
        if epochs != loops["epoch_progress"]["total"]["processed"]:  # at an epoch's end
            loops = trainer.fit_loop.state_dict()
        elif (
            loops["epoch_loop.batch_progress"]["is_last_batch"]
            and trainer.fit_loop.epoch_loop._should_check_val_epoch()
        ):
            loops = to_be_validated(loops)
        state: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(False)
        state["loops"]["fit_loop"] = loops
        return state

    def _put_back(self) -> None:
        """Undo what has begun to change since the boundary."""
        now = self._sums() if self.before_validation is not None else []
        swapped = self.before_validation is not None and not all(
            torch.equal(a, b) for a, b in zip(now, self.before_validation, strict=True)
        )
        if swapped:
            for average in self._averages():
                average.on_validation_epoch_end(self.trainer, self.module)
        if self.buffers:
            with torch.no_grad():
                torch._foreach_copy_(self.buffers, self.copies)

    def _averages(self) -> list[WeightAveraging]:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]

    def _sums(self) -> list[Tensor]:
        return [weight.detach().sum() for weight in self.module.parameters()]


def to_be_validated(loops: dict[str, Any]) -> dict[str, Any]:
    """Set the counters of an epoch's last step so that Lightning comes back to the validation.

    It does where all batches are complete and one batch of the validation was begun.
    """
    batches = loops["epoch_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["is_last_batch"] = False
    return loops
