"""From samples to a batch: stack what stacks, list what does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vidtrain.types import Sample

Empty = Callable[[Sequence[int], torch.dtype], Tensor]  # makes a tensor to be filled


def plain_memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make a tensor in this process's own memory."""
    return torch.empty(shape, dtype=dtype)


def collate(samples: list[Sample], empty: Empty = plain_memory) -> dict[str, Any]:
    """Stack the samples that have frames; failures of all of them are listed.

    Args:
        samples: of one batch.
        empty: makes the memory that frames are stacked into; a worker's is shared with the main
            process, so that they are copied once.

    Returns:
        `video` (B, V, T, C, H, W) uint8, C innermost in memory, where views come ready, else lists
        of B `frames`, `view_frames`, `view_crops`, since videos differ in size and length; of flow
        `flow` (B, V, T, 2, H, W) uint8, else lists of B `fields`, `view_fields`, `view_crops`, and in
        both cases `flow_steps` (B, V, T, 2); `features` (B, V, D, T) float; `label`, `index` (B,), `failures`, `fps`, and `seed`, of
        what is drawn for the batch as a whole. B may be 0: every video of the batch failed.
    """
    failures = [failure for sample in samples for failure in sample.get("failures", [])]
    good = [sample for sample in samples if "fps" in sample]
    batch: dict[str, Any] = {
        "index": torch.tensor([sample["index"] for sample in good], dtype=torch.int64),
        "failures": failures,
        "fps": [sample["fps"] for sample in good],
        "seed": samples[0]["seed"],
    }
    if not good:
        return batch
    batch["label"] = torch.stack([sample["label"] for sample in good])
    if "video" in good[0]:
        batch["video"] = stack_channels_last([sample["video"] for sample in good], empty)
    if "flow" in good[0]:
        batch["flow"] = stack([sample["flow"] for sample in good], empty)
    if "features" in good[0]:
        batch["features"] = stack([sample["features"] for sample in good], empty)
    if "flow_steps" in good[0]:
        batch["flow_steps"] = torch.stack([sample["flow_steps"] for sample in good])
    for key in ("frames", "view_frames", "fields", "view_fields", "view_crops", "extent"):
        if key in good[0]:
            batch[key] = [sample[key] for sample in good]
    return batch


def stack(tensors: Sequence[Tensor], empty: Empty) -> Tensor:
    """Stack tensors of one shape into memory that `empty` makes."""
    together = empty((len(tensors), *tensors[0].shape), tensors[0].dtype)
    torch.stack(list(tensors), out=together)
    return together


def stack_channels_last(videos: Sequence[Tensor], empty: Empty) -> Tensor:
    """Stack `(V, T, C, H, W)` videos without changing their order in memory, which is `V T H W C`."""
    return stack([video.movedim(-3, -1) for video in videos], empty).movedim(-1, -3)
