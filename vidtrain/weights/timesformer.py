"""TimeSformer's own checkpoints: Kinetics-400 and -600, Something-Something V2, HowTo100M.

https://github.com/facebookresearch/TimeSformer. Code and weights: CC BY-NC 4.0. The network is called
`model` in them, and its parts as here. A checkpoint carries its config, as PySlowFast's do.
"""

from __future__ import annotations

from torch import nn

from vidtrain.weights import pyslowfast
from vidtrain.weights.inflate import inflate_kernel
from vidtrain.weights.layout import (
    Facts,
    File,
    Layout,
    Renamed,
    family,
    kinetics_labels,
    refuse,
    rename_by,
    rows,
)

PATCHES = "patch_embed.proj.weight"


def matches(file: File) -> bool:
    """Tell it by what its network is called, and by its patches of one frame."""
    patches = file.tensors.get(f"model.{PATCHES}")
    return patches is not None and patches.ndim == 4 and "model.pos_embed" in file.tensors


def facts(file: File) -> Facts:
    """What its config says, else PySlowFast's grey."""
    mean, std = pyslowfast.normalisation(file)
    return Facts(mean, std, labels=kinetics_labels(rows(file, "model.head")))


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Take the first part of all names off."""
    if family(network) != "timesformer":
        raise refuse("TimeSformer", network, ("timesformer",))
    renamed = rename_by(((r"model\.(.+)", r"\1"),), file)
    one_frame(renamed)
    return renamed


def one_frame(renamed: Renamed) -> None:
    """Make the convolution over a frame's patches one over boxes of one frame."""
    patches = renamed.tensors.get(PATCHES)
    if patches is not None and patches.ndim == 4:
        renamed.tensors[PATCHES] = inflate_kernel(patches, 1)


LAYOUT = Layout("timesformer", matches, facts, rename)
