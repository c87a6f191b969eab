"""Batch norm's statistics, measured anew over many batches before each validation.

The running mean that batch norm keeps by itself lags behind weights that change at every step, and
with small batches it is noisy. Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vidtrain.types import UserError


class PreciseBN(L.Callback):
    """Replace running means and variances by those over `batches` training batches of now.

    The mean over the batches of each batch's mean and variance, with the weights that are validated
    (an average of weights too, see `callbacks.averaging`). Nothing else of the network learns or drops.

    Args:
        batches: of each rank; they are read once more at every validation.

    Raises:
        UserError: `batches` is below 1.
    """

    def __init__(self, batches: int) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise UserError(f"callbacks.precise_bn.batches is {batches}; it is at least 1, or null")
        self.batches = batches

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure. The random numbers of training are left as they are."""
        frozen = [pl_module.model.get_submodule(name) for name in pl_module.frozen]
        still = {module for part in frozen for module in part.modules()}
        norms = [
            norm
            for norm in pl_module.model.modules()
            if isinstance(norm, _BatchNorm) and norm.track_running_stats and norm not in still
        ]
        if not norms or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        devices = [pl_module.device.index] if pl_module.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                for batch in data.extra_batches(self.batches, trainer.current_epoch):
                    batch = data.transform.train()(move_data_to_device(batch, pl_module.device))
                    with trainer.precision_plugin.train_step_context():
                        pl_module.logits(batch)
        finally:
            data.transform.eval()
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.eval()
        self._share(trainer, norms)

    def _share(self, trainer: L.Trainer, norms: list[nn.Module]) -> None:
        """Take the mean over the ranks."""
        if trainer.world_size == 1:
            return
        for norm in norms:
            for name in ("running_mean", "running_var"):
                statistic = getattr(norm, name)
                statistic.copy_(trainer.strategy.reduce(statistic, reduce_op="mean"))


def precise_bn(batches: int | None) -> PreciseBN | None:
    """Build it; None for `batches=null`."""
    return None if batches is None else PreciseBN(batches)
