"""Split a network over ranks (FSDP2): `trainer=fsdp`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from vidtrain.layers.blocks import blocks
from vidtrain.types import UserError

if TYPE_CHECKING:
    from vidtrain.tasks.base import VideoTask


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all ranks. A checkpoint is one file, as everywhere."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Count the ranks, which Lightning takes for as many as there are machines."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def prepare(task: VideoTask, trainer: L.Trainer) -> None:
    """Have the task's network split where the trainer's strategy wants it; else do nothing.

    Raises:
        UserError: an average of the weights is kept, of which each rank would need all, or a parameter
            is a single number (MoViNet's `alpha`), which FSDP2 does not take.
    """
    from vidtrain.callbacks.averaging import EMA, SWA

    if not isinstance(trainer.strategy, Sharded):
        return
    if any(isinstance(callback, (EMA, SWA)) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError("callbacks.ema and callbacks.swa need whole weights: take trainer=ddp")
    numbers = [name for name, parameter in task.model.named_parameters() if not parameter.ndim]
    if numbers:
        raise UserError(f"trainer=fsdp cannot split {numbers[0]}, one number: take trainer=ddp")
    # On this one task: Lightning looks for the hook, and warns of it where nothing is split.
    task.configure_model = partial(shard, task)  # type: ignore[method-assign]


def shard(task: VideoTask) -> None:
    """Split each block, then what is left: a block's weights are whole only while it computes."""
    from torch.distributed.fsdp import fully_shard

    mesh = task.device_mesh["data_parallel"]  # type: ignore[index]
    network = task.model
    if getattr(network, "is_sharded", False):  # `fit`, then `test`
        return
    for block in blocks(network).values():
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.is_sharded = True  # type: ignore[assignment]


def restore(task: VideoTask, state: Mapping[str, Tensor]) -> None:
    """Put a whole state dict into a task, split or not."""
    if not getattr(task.model, "is_sharded", False):
        task.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options: Any = StateDictOptions(full_state_dict=True)
    set_model_state_dict(task, dict(state), options=options)
