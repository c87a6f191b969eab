"""Stop before a loss that is not a finite number gets into the weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor

from vidtrain.types import UserError

SHOWN = 5  # videos that are named


class NotFinite(UserError):
    """Training went to infinity, or to no number at all."""


class Sent(NamedTuple):
    """A loss on its way to the main memory."""

    loss: Tensor  # () on the device; the sum over the ranks once `work` is done
    own: Tensor  # () on the device, of this rank
    host: Tensor  # () where it arrives
    work: Any  # the reduction over the ranks, or None
    index: Tensor  # (B,) rows of the batch


class Finite(L.Callback):
    """Check each batch's loss before the weights are changed by it.

    The loss is sent to the main memory as soon as it is there, and looked at when the whole backward
    pass lies in the device's queue: waiting is then for the forward pass alone, and the device never runs
    dry. With several ranks its sum over all of them is sent, so that none changes its weights.
    That a finite loss had gradients which are not shows in the next loss, whose forward pass went
    through the weights; these are looked at whenever they are saved and not saved then.
    """

    def __init__(self) -> None:
        self._sent: list[Sent] = []
        self._index: Tensor | None = None
        self._before: list[Tensor] = []  # rows of the step before
        self._stream: Any = None
        self._arrived: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch's rows."""
        self._index = batch["index"]

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Send the loss, without waiting for it."""
        own, work = loss.detach(), None
        total = own.clone() if trainer.world_size > 1 else own
        assert self._index is not None
        if trainer.world_size > 1:
            work = torch.distributed.all_reduce(total, async_op=True)
        if loss.device.type != "cuda":
            self._sent.append(Sent(total, own, total, work, self._index))
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._arrived = torch.cuda.Event()
        host = torch.empty_like(total, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # the backward pass does not wait for other ranks
            if work is not None:
                work.wait()
            host.copy_(total, non_blocking=True)
            self._arrived.record()
        self._sent.append(Sent(total, own, host, None, self._index))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Look at the losses of this step's batches.

        Raises:
            NotFinite: naming videos.
        """
        sent, self._sent = self._sent, []
        if self._arrived is not None:
            self._arrived.synchronize()
        for one in sent:
            if one.work is not None:
                one.work.wait()
            if not math.isfinite(float(one.host)):
                self._refuse(trainer, pl_module, one)
        self._before = [one.index for one in sent]

    def _refuse(self, trainer: L.Trainer, pl_module: L.LightningModule, one: Sent) -> None:
        step = trainer.global_step + 1
        after = not finite(list(pl_module.parameters()))
        rows = torch.cat(self._before) if after and self._before else one.index
        value = float(one.own)
        mine = [] if math.isfinite(value) and not after else rows.tolist()
        values, found = [value], [mine]
        if trainer.world_size > 1:
            values, found = [0.0] * trainer.world_size, [[]] * trainer.world_size
            torch.distributed.all_gather_object(values, value)
            torch.distributed.all_gather_object(found, mine)
        bad = next((v for v in values if not math.isfinite(v)), math.inf)
        names = self._names(trainer, [row for part in found for row in part])
        what = (
            f"the weights are not finite after step {step - 1}, though its loss was; its videos"
            if after
            else f"the loss of step {step} is {bad}; the weights are still those before it; its videos"
        )
        raise NotFinite(
            f"{what}: {names}. Where these are fine (vidtrain data action=check), train with a lower"
            " optim.lr, a longer optim.warmup or trainer.gradient_clip_val=1"
        )

    def _names(self, trainer: L.Trainer, rows: list[int]) -> str:
        every: Any = trainer.train_dataloader.dataset.rows  # type: ignore[union-attr]
        names = list(dict.fromkeys(every.location(every.row(row)) for row in rows))
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return ", ".join(names[:SHOWN]) + more

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save weights that are lost.

        Raises:
            NotFinite: naming the step.
        """
        names = {name for name, _ in pl_module.named_parameters()}
        states = [checkpoint["state_dict"], checkpoint.get("current_model_state", {})]
        if not finite([state[key] for state in states for key in state if key in names]):
            raise NotFinite(
                f"the weights are not finite after step {trainer.global_step} and are not saved; train"
                " with a lower optim.lr, a longer optim.warmup or trainer.gradient_clip_val=1"
            )


def finite(tensors: list[Tensor]) -> bool:
    """Tell whether all numbers are finite."""
    if not tensors:
        return True
    device = tensors[0].device
    return bool(
        torch.stack([tensor.detach().isfinite().all().to(device) for tensor in tensors]).all()
    )
