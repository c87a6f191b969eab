"""MAE-ST's own checkpoints: "Masked Autoencoders As Spatiotemporal Learners", pretrained and fine-tuned.

https://github.com/facebookresearch/mae_st. Code and weights: CC BY-NC 4.0. Encoder and decoder lie side by
side in them, the decoder's parts as `decoder_...`; queries, keys and values have a layer each. A pretraining
network fills one of the same kind, or the encoder of a classifier.
"""

from __future__ import annotations

from torch import nn

from vidtrain.weights.layout import (
    KINETICS_MEAN,
    KINETICS_STD,
    Facts,
    File,
    Layout,
    Renamed,
    Rules,
    encoder_alone,
    family,
    join_qkv,
    kinetics_labels,
    refuse,
    rename_by,
    rows,
)

FAMILIES = ("mae_st",)
DECODER: Rules = (
    (r"decoder_pred", "decoder.head"),
    (r"decoder_(.+)", r"decoder.\1"),
    (r"mask_token", "decoder.mask_token"),
)


def matches(file: File) -> bool:
    """Tell it by its separate positions, its separate queries, and its tubelets."""
    patches = file.tensors.get("patch_embed.proj.weight")
    names = ("pos_embed_spatial", "blocks.0.attn.q.weight")
    return patches is not None and patches.ndim == 5 and all(n in file.tensors for n in names)


def facts(file: File) -> Facts:
    """The grey of PySlowFast; the classes of Kinetics-400 where there are as many."""
    return Facts(KINETICS_MEAN, KINETICS_STD, labels=kinetics_labels(rows(file, "head")))


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Rename for a pretraining network or a classifier."""
    if family(network) not in FAMILIES:
        raise refuse("MAE-ST", network, FAMILIES)
    pretrained = "head.weight" not in file.tensors
    renamed = rename_by((*DECODER, (r"(.+)", r"encoder.\1")) if pretrained else (), file)
    join_qkv(renamed, key_bias=True)
    if pretrained:
        encoder_alone(renamed, network)
    return renamed


LAYOUT = Layout("mae_st", matches, facts, rename)
