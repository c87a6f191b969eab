"""VideoMAE's and VideoMAE V2's own checkpoints: pretraining networks and classifiers.

https://github.com/MCG-NJU/VideoMAE, code and weights CC BY-NC 4.0, and
https://github.com/OpenGVLab/VideoMAEv2, for whose licences see its repository and each file's page.

Parts are called as here. The tensors lie under `model` (pretraining) or `module` (fine-tuning); V2's files
that are published as safetensors call the whole network `model`. A pretraining network fills one of the
same kind, or the encoder of a classifier.
"""

from __future__ import annotations

import re

from torch import nn

from vidtrain.weights.image import MEAN, STD
from vidtrain.weights.layout import (
    Facts,
    File,
    Layout,
    Renamed,
    encoder_alone,
    family,
    kinetics_labels,
    refuse,
    rename_by,
    rows,
)

FAMILIES = ("videomae", "videomae_pretrain")


def matches(file: File) -> bool:
    """Tell it by its biases of queries and values alone, and by its tubelets."""
    biased = any(re.fullmatch(r"(.+\.)?blocks\.\d+\.attn\.q_bias", key) for key in file.tensors)
    return biased and any(
        key.endswith("patch_embed.proj.weight") and tensor.ndim == 5
        for key, tensor in file.tensors.items()
    )


def facts(file: File) -> Facts:
    """ImageNet's colours; the classes of Kinetics-400 where there are as many."""
    return Facts(MEAN, STD, labels=kinetics_labels(rows(file, "head", "model.head")))


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Leave the names as they are, or take a pretraining network's encoder alone."""
    if family(network) not in FAMILIES:
        raise refuse("VideoMAE", network, FAMILIES)
    renamed = rename_by(((r"model\.(.+)", r"\1"),), file)
    if any(name.startswith("encoder.") for name in renamed.tensors):
        encoder_alone(renamed, network)
    return renamed


LAYOUT = Layout("videomae", matches, facts, rename)
