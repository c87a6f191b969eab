"""Vision transformers on images, with timm's names or torchvision's: a start for transformers on clips.

https://github.com/huggingface/pytorch-image-models: Apache-2.0, as its own weights (augreg) are; others that
it lists have licences of their own. https://github.com/pytorch/vision: BSD-3-Clause; the weights called SWAG
are CC BY-NC 4.0.

    TimeSformer   the network as it is; attention over time and its norm begin as those over space, behind
                  them `temporal_fc` and the positions in time as they were built: zero
    ViViT         positions repeated for every frame of tokens. The patch kernel goes on a tubelet's central
                  frame, or, with `model.weights_from=vit_average`, in equal parts on all. What looks along
                  time stays as it was built; models 3 and 4 have no class token
    VTN           its `backbone`

A table of positions for another size is spread over the grid here (bicubic), and a line says so.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from vidtrain.layers.patch import resize_table
from vidtrain.weights import image
from vidtrain.weights.inflate import inflate_kernel
from vidtrain.weights.layout import (
    Facts,
    File,
    Layout,
    Renamed,
    Rules,
    family,
    nested,
    refuse,
    rename_by,
    rows,
)

FAMILIES = ("timesformer", "vivit", "vtn")
# How our functions begin whose image network torchvision publishes.
NETWORKS = {
    "timesformer_": "vit_b_16",
    "vivit_b_": "vit_b_16",
    "vivit_l_": "vit_l_16",
    "vtn_base": "vit_b_16",
}
TORCHVISION: Rules = (
    (r"class_token", "cls_token"),
    (r"conv_proj", "patch_embed.proj"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.ln", "norm"),
    (r"heads\.head", "head"),
    *nested(
        r"encoder\.layers\.encoder_layer_(\d+)\.",
        r"blocks.\1.",
        (
            (r"ln_([12])", r"norm\1"),
            (r"self_attention\.in_proj_(weight|bias)", r"attn.qkv.\1"),
            (r"self_attention\.out_proj", "attn.proj"),
            (r"mlp\.(?:0|linear_1)", "mlp.fc1"),  # the published files have the second names
            (r"mlp\.(?:3|linear_2)", "mlp.fc2"),
        ),
    ),
)


def image_network(function: str) -> str | None:
    """Name torchvision's image network that one of our functions starts from, if it does from any."""
    return next((net for start, net in NETWORKS.items() if function.startswith(start)), None)


def from_torchvision(file: File) -> bool:
    """Say whether a file has torchvision's names, and not timm's."""
    return "class_token" in file.tensors


def matches(file: File) -> bool:
    """Tell it by its class token, its blocks and its patches of an image."""
    timm = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    theirs = ("class_token", "encoder.pos_embedding", "conv_proj.weight")
    names = theirs if from_torchvision(file) else timm
    return all(name in file.tensors for name in names) and file.tensors[names[2]].ndim == 4


def facts(file: File) -> Facts:
    """ImageNet's colours for torchvision's; timm's files were made with several, and do not say which."""
    if from_torchvision(file):
        return image.facts(file)
    return Facts(labels=image.imagenet_labels(rows(file, "head")))


def rename(how: str, file: File, network: nn.Module, at: str) -> Renamed:
    """Rename and spread for one of our networks; torchvision's goes into one of its own as well.

    Args:
        how: what becomes of the patch kernel: `centre` or `average`.
        file: read.
        network: to be filled.
        at: where it is.
    """
    kind = family(network)
    if kind not in FAMILIES:
        if from_torchvision(file):
            return image.rename(file, network, at)
        raise refuse("timm", network, FAMILIES)
    made = rename_by(TORCHVISION if from_torchvision(file) else (), file)
    inside = network.get_submodule("backbone") if hasattr(network, "backbone") else network
    own = inside.state_dict()
    for name in list(made.tensors):
        if name.startswith("pre_logits."):
            made.drop(name, "a layer before its classifier")
        elif name.startswith("head.") and kind == "vtn":
            made.drop(name, "its classifier")
    patches, kernel = "patch_embed.proj.weight", made.tensors.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        made.tensors[patches] = inflate_kernel(kernel, own[patches].shape[2], how)
    _positions(made, inside, own)
    if kind == "timesformer":
        _over_time(made, own)
    if inside is not network:
        for name in list(made.tensors):
            made.move(name, f"backbone.{name}")
        made.new = (r"(?!backbone\.).*",)
    else:
        made.new = (r"time_embed", r"temporal_.*", r"blocks\.\d+\.temporal_.*")
    return made


def _positions(made: Renamed, inside: nn.Module, own: dict[str, Tensor]) -> None:
    """Give the table the size of a frame here, and repeat it for the frames that have places here."""
    table = made.tensors.get("pos_embed")
    if table is None or table.ndim != 3:
        return
    grid: tuple[int, ...] = tuple(getattr(inside, "grid", ()))[-2:]
    cls, places = table[:, :1], table[:, 1:]
    side = math.isqrt(places.shape[1])
    if side**2 == places.shape[1] and (side, side) != grid:
        places = resize_table(places, (side, side), grid, "bicubic")
        made.notes.append(
            f"its positions, {side} x {side}, were spread over {grid[0]} x {grid[1]} (bicubic)"
        )
    has_cls = "cls_token" in own
    frames = (own["pos_embed"].shape[1] - has_cls) // math.prod(grid)
    places = places.repeat(1, frames, 1)
    made.tensors["pos_embed"] = torch.cat([cls, places], 1) if has_cls else places
    if not has_cls and "cls_token" in made.tensors:
        made.drop("cls_token", "its class token")


def _over_time(made: Renamed, own: dict[str, Tensor]) -> None:
    """Let attention over time begin as attention over space."""
    for name, tensor in list(made.tensors.items()):
        for part in ("attn", "norm1"):
            copy = name.replace(f".{part}.", f".temporal_{part}.")
            if copy != name and copy in own:
                made.tensors[copy], made.origin[copy] = tensor, made.origin[name]


LAYOUT = Layout("vit", matches, facts, partial(rename, "centre"))
AVERAGE = Layout("vit_average", lambda file: False, facts, partial(rename, "average"))
