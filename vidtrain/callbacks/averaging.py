"""Averages of the weights of many steps: validated, saved and tested in place of the last ones.

Lightning's `WeightAveraging` keeps the second set of weights, swaps it in for validation and puts both
into checkpoints: `state_dict` is the average, `current_model_state` what training goes on with. Added
here: as long as nothing is averaged yet, the average follows the weights, where Lightning's would stay
what the network began as.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from vidtrain.types import UserError


class _Average(WeightAveraging):
    """An average, of what `blend` does with each new set of weights."""

    def __init__(self) -> None:
        super().__init__(multi_avg_fn=self._blend_all)
        self.updates = 0  # sets of weights in the average

    def blend(self) -> float:
        """Give the share of the new weights in the average."""
        raise NotImplementedError

    def _blend_all(self, averages: list[Tensor], new: list[Tensor], count: Tensor) -> None:
        if torch.is_floating_point(averages[0]):
            torch._foreach_lerp_(averages, new, self.blend())  # type: ignore[arg-type]
        else:  # counters, as batch norm's
            torch._foreach_copy_(averages, new)

    def update(self, pl_module: L.LightningModule) -> None:
        """Take the weights as they are now into the average; the first ones are the average."""
        assert self._average_model is not None
        self._average_model.update_parameters(pl_module)
        self.updates += 1

    def follow(self, pl_module: L.LightningModule) -> None:
        """Make the average the weights as they are now, where it has begun with none."""
        if self._average_model is not None and not self.updates:
            self._average_model.module.load_state_dict(pl_module.state_dict())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do nothing: what an epoch adds is in before its validation."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in."""
        self.follow(pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the network."""
        self.follow(pl_module)
        super().on_train_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save both sets of weights."""
        self.follow(pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Add how many sets of weights are in the average."""
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the average was."""
        super().load_state_dict(state_dict)
        self.updates = state_dict["updates"]


class EMA(_Average):
    """An exponential moving average over steps.

    Args:
        decay: what is kept of the average at each update, less in the first ones: update n keeps at
            most `(1 + n) / (10 + n)`, so that a short run is not averaged with what it began as.
        every_n_steps: optimizer steps from one update to the next.

    Raises:
        UserError: a setting out of its range.
    """

    def __init__(self, decay: float, every_n_steps: int = 1) -> None:
        if isinstance(decay, bool) or not 0 < decay < 1:
            raise UserError(
                f"callbacks.ema.decay is {decay}; it is between 0 and 1: 0.999, or null"
            )
        if isinstance(every_n_steps, bool) or not every_n_steps >= 1:
            raise UserError(f"callbacks.ema.every_n_steps is {every_n_steps}; it is at least 1")
        super().__init__()
        self.decay, self.every_n_steps = decay, every_n_steps

    def blend(self) -> float:
        """Give the share of the new weights."""
        return 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Update after an optimizer step."""
        step = trainer.global_step
        if step > self._latest_update_step and step % self.every_n_steps == 0:
            self.update(pl_module)
            self._latest_update_step = step


class SWA(_Average):
    """The mean of the weights at the ends of epochs. Izmailov et al. 2018, arXiv:1803.05407.

    Meant for a rate that stays high to the end (`optim.schedule=constant`, or one of its own).

    Args:
        start: from which share of the epochs on, above 0 and below 1.

    Raises:
        UserError: `start` is out of its range.
    """

    def __init__(self, start: float) -> None:
        if isinstance(start, bool) or not 0 <= start < 1:
            raise UserError(
                f"callbacks.swa.start is {start}; it is a share of the epochs, from 0 to below 1: 0.75"
            )
        super().__init__()
        self.start = start

    def blend(self) -> float:
        """Give the share of the new weights: all count the same."""
        return 1 / (self.updates + 1)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a run that has no number of epochs."""
        if stage == "fit" and (trainer.max_epochs or -1) < 0:
            raise UserError("callbacks.swa counts epochs: set trainer.max_epochs")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Update at the end of an epoch, before it is validated."""
        assert trainer.max_epochs is not None
        is_last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if is_last and trainer.current_epoch >= self.start * trainer.max_epochs:
            self.update(pl_module)


def ema(decay: float | None, every_n_steps: int = 1) -> EMA | None:
    """Build an exponential moving average; None for `decay=null`."""
    return None if decay is None else EMA(decay, every_n_steps)


def swa(start: float | None) -> SWA | None:
    """Build a stochastic weight average; None for `start=null`."""
    return None if start is None else SWA(start)
