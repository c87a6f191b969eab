"""From samples to a batch: stack what stacks, list what does not."""

from __future__ import annotations

from typing import Any

import torch

from vidtrain.types import Sample


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Stack the samples that have frames; failures of all of them are listed.

    Returns:
        `video` (B, V, T, C, H, W) uint8 where views come ready, else lists of B `frames`,
        `view_frames`, `view_crops`, since videos differ in size and length; `label`, `index` (B,),
        `failures`, `fps`, and `seed`, of what is drawn for the batch as a whole. B may be 0: every
        video of the batch failed.
    """
    failures = [failure for sample in samples for failure in sample.get("failures", [])]
    good = [sample for sample in samples if "video" in sample or "frames" in sample]
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
        batch["video"] = torch.stack([sample["video"] for sample in good])
    else:
        for key in ("frames", "view_frames", "view_crops"):
            batch[key] = [sample[key] for sample in good]
    return batch
