"""`data.batch_size=auto`: the largest batch that a GPU's memory holds, found before training begins.

By steps of the network itself, at the run's precision, on blank clips: neither a video is decoded nor a
number of the run changed. Lightning's own finder runs the real loop on the real data, reads a checkpoint
to undo what it did, and works with one device alone.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from vidtrain.callbacks.boundary import can_be_saved_alone
from vidtrain.data.cache import available_memory
from vidtrain.data.features import FeatureDataset
from vidtrain.types import UserError

if TYPE_CHECKING:
    from vidtrain.data.module import VideoDataModule
    from vidtrain.tasks.base import VideoTask

AUTO = "auto"
HEADROOM = (
    0.1  # of the memory that is left beside the network: fragments, validation, other programs
)
START = 8  # clips tried first
STEPS = 2  # the second one runs beside the optimizer's state and the gradients of the first


class Found(NamedTuple):
    """The size of a batch, and what kept it from being larger."""

    size: int  # videos of one rank; 0: not even one fits
    why: str


def largest(fits: Callable[[int], bool], limit: int, start: int = START) -> int:
    """Find the largest size that fits: double until one does not, then halve what lies between.

    Args:
        fits: asked about sizes from 1 to `limit`; what fits does so in every smaller size.
        limit: the answer is no larger.
        start: the size that is tried first.

    Returns:
        0 where not even 1 fits.
    """
    good, bad = 0, limit + 1
    size = max(1, min(start, limit))
    while good < limit and size < bad:
        if fits(size):
            good, size = size, min(2 * size, limit)
        else:
            bad = size
    while bad - good > 1:
        size = (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good


def check_accelerator(accelerator: str) -> None:
    """Refuse to look for a limit where none can be hit without harm.

    Raises:
        UserError: the run is not on a CUDA device.
    """
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        raise UserError(
            "data.batch_size=auto measures the memory of a CUDA GPU, and this run is not on one;"
            " set data.batch_size=N"
        )


class LargestBatch(L.Callback):
    """Set `data.batch_size` as training begins; all ranks take the least of what they found.

    Args:
        settle: told the number, before anything is made that depends on it.
        say: told in a line what was found.

    Raises:
        UserError: not even one video fits, or the network is split over ranks.
    """

    def __init__(self, settle: Callable[[int], Any], say: Callable[[str], Any]) -> None:
        self.settle, self.say = settle, say

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Measure: the ranks know each other, an average of the weights lies where it will lie."""
        if stage != "fit":
            return
        found = fitting_batch(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        size = found.size
        if trainer.world_size > 1:
            size = int(trainer.strategy.reduce(torch.tensor(size, device=device), reduce_op="min"))
        refuse_none(size)
        why = found.why if size == found.size else "another rank has no room for more"
        self.say(f"data.batch_size=auto: {size} videos a step and device; {why}")
        self.settle(size)


def refuse_none(size: int) -> None:
    """Refuse a batch without videos.

    Raises:
        UserError: naming what makes clips smaller.
    """
    if not size:
        raise UserError(
            "data.batch_size=auto: not even one video fits the GPU's memory; set a smaller clip.size or"
            " clip.num_frames, trainer.precision=bf16-mixed, augment.repeats=1, or another model"
        )


def fitting_batch(trainer: L.Trainer, task: VideoTask, data: VideoDataModule) -> Found:
    """Find the largest batch of this rank; weights, buffers and random numbers stay as they are.

    Not compiled where the run is: `compile=true` mostly takes less memory than this measures.

    Args:
        trainer: its device, precision, ranks and accumulation.
        task: copied to the device.
        data: what batches look like.

    Raises:
        UserError: the strategy splits the network, so that no copy of it fits as a part would.
    """
    if not can_be_saved_alone(trainer):
        raise UserError(
            "data.batch_size=auto needs the whole network on each device; with trainer=fsdp set"
            " data.batch_size=N"
        )
    device = trainer.strategy.root_device
    videos = max(1, data.manifest.splits["train"] // trainer.world_size)
    host = host_limit(trainer, data)
    limit = min(videos, host)
    gpus = [device.index] if device.type == "cuda" else []
    with isolate_rng(include_cuda=False), torch.random.fork_rng(gpus):
        trial = Trial(trainer, task, data)
        try:
            size = largest(trial, limit)
        finally:
            trial.end()
    name = torch.cuda.get_device_name(device) if gpus else str(device)
    why = f"no more fit {name} with {HEADROOM:.0%} of its free memory to spare"
    if size == limit:
        why = "all training videos" + (" of a rank" if trainer.world_size > 1 else "")
        why += ", so that an epoch is one step"
        if host < videos:
            why = "more would fill the main memory with batches on their way (data.workers)"
    return Found(size, why)


def host_limit(trainer: L.Trainer, data: VideoDataModule) -> int:
    """Say how many videos a batch may have for those on their way to take half the free main memory."""
    free = available_memory()
    sample = blank_batch(data, 1, torch.device("cpu"))
    nbytes = sum(value.nbytes for value in sample.values() if isinstance(value, Tensor))
    batches = data.workers * (data.prefetch + 1) + 2
    if free is None:
        return 1 << 62
    return max(1, free // (2 * nbytes * batches * max(1, trainer.num_devices)))


class Trial:
    """Steps of a copy of the network: does a batch of so many videos fit?"""

    def __init__(self, trainer: L.Trainer, task: VideoTask, data: VideoDataModule) -> None:
        self.trainer, self.data = trainer, data
        self.device = trainer.strategy.root_device
        self.precision = trainer.precision_plugin
        self.task: Any = self.precision.convert_module(copy.deepcopy(task)).to(self.device).train()
        self.fitted = False
        self.compiles = data.transform.compile_on
        self.spared = self.spare()

    def spare(self) -> list[Tensor]:
        """Take the memory that must stay free, and what the run will hold beside network and batch."""
        spared = []
        if isinstance(self.trainer.strategy, DDPStrategy):  # the buckets that gradients travel in
            learned = [p for p in self.task.parameters() if p.requires_grad]
            spared.append(bytes_on(self.device, sum(p.nbytes for p in learned)))
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            allowed = total * torch.cuda.get_per_process_memory_fraction(self.device)
            free = min(free, int(allowed) - torch.cuda.memory_reserved(self.device))
            spared.append(bytes_on(self.device, int(HEADROOM * max(0, free))))
        return spared

    def __call__(self, size: int) -> bool:
        """Train on a batch of `size` videos.

        Raises:
            RuntimeError: whatever the very first steps raise that is not for want of memory.
        """
        try:
            self.steps(size)
        except RuntimeError as error:
            # Kernels that cannot count so many pixels say so in other words.
            if not (self.fitted or out_of_memory(error)):
                raise
            return False
        finally:
            self.free()
        self.fitted = True
        return True

    def steps(self, size: int) -> None:
        """Go forward and back and change the weights, as in training."""
        transform = self.data.transform.train()
        optimizer = self.task.optimizer(self.task.model, 1000)["optimizer"]
        parts = min(2, self.trainer.accumulate_grad_batches)  # gradients are there when more come
        for number in range(STEPS * parts):
            batch = blank_batch(self.data, size, self.device)
            batch = transform(self.precision.convert_input({**batch, "seed": number}))
            with self.precision.train_step_context():
                loss = self.task.step(batch).loss
            if number % parts == 0:
                optimizer.zero_grad()
            loss.backward()
            del loss, batch
            if number % parts == parts - 1:
                optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what a trial has left."""
        self.data.transform.compile_on = (
            self.compiles
        )  # which any error in there turns off for good
        self.task.zero_grad()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def end(self) -> None:
        """Give back everything."""
        self.spared.clear()
        self.task = torch.nn.Identity()
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)


def bytes_on(device: torch.device, count: int) -> Tensor:
    """Hold so many bytes."""
    return torch.empty(count, dtype=torch.uint8, device=device)


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether memory was wanting, in one library's words or another's."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or is_oom_error(error)
        or "ALLOC_FAILED" in str(error)
    )


def blank_batch(data: VideoDataModule, size: int, device: torch.device) -> dict[str, Any]:
    """Make a training batch as `collate` does, of clips with nothing on them.

    Args:
        data: says what the model takes.
        size: B.
        device: where its tensors lie.

    Returns:
        `video` (B, V, T, C, H, W) uint8, C innermost in memory; `flow` (B, V, T, 2, H, W) uint8 and
        `flow_steps` (B, V, T, 2); `features` (B, V, D, T), whichever the model takes; `label`, `index`,
        `failures`, `fps`, `seed`.
    """
    clip = data.clip
    views = (size, data.augment.repeats)
    frames = (*views, clip.num_frames)
    square = (clip.size, clip.size)
    batch: dict[str, Any] = {
        "index": torch.zeros(size, dtype=torch.int64),
        "failures": [],
        "fps": [1.0] * size,
        "seed": 0,
    }
    if data.multi_label:
        batch["label"] = torch.zeros(size, data.num_classes or 0, device=device)
    else:
        batch["label"] = torch.zeros(size, dtype=torch.int64, device=device)
    if "video" in data.inputs:
        video = torch.zeros(*frames, *square, 3, dtype=torch.uint8, device=device)
        batch["video"] = video.movedim(-1, -3)
    if "flow" in data.inputs:
        batch["flow"] = torch.zeros(*frames, 2, *square, dtype=torch.uint8, device=device)
        batch["flow_steps"] = torch.zeros(*frames, 2, device=device)
    if "features" in data.inputs:
        dataset = data.dataset("train", training=True)
        dim = dataset.dim if isinstance(dataset, FeatureDataset) else None
        batch["features"] = torch.zeros(*views, dim or 0, clip.num_frames, device=device)
    return batch
