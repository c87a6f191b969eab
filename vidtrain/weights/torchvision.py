"""torchvision: R3D-18, MC3-18, R(2+1)D-18, S3D, MViTv1 B and MViTv2 S, trained on Kinetics-400.

https://github.com/pytorch/vision, BSD-3-Clause. Of the convolutional ones ours bear its names, so that
nothing is renamed. What torchvision publishes is asked of torchvision itself: address, checksum (in the
file's name), normalisation, class names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torchvision.models as tv
from torch import Tensor, nn

from vidtrain.types import UserError
from vidtrain.weights.files import Address
from vidtrain.weights.layout import (
    KINETICS_MEAN,
    KINETICS_STD,
    Facts,
    File,
    Layout,
    Renamed,
    Rules,
    kinetics_labels,
    refuse,
    rename_by,
    rows,
)
from vidtrain.weights.layout import family as family_of

FAMILIES = ("resnet3d", "s3d", "mvit")
NAMES = {"mvit_v1_b_16x4": "mvit_v1_b", "mvit_v2_s_16x4": "mvit_v2_s"}  # ours -> torchvision's
MVIT: Rules = (
    (r"conv_proj", r"patch_embed"),
    (r"(blocks\.\d+)\.project", r"\1.proj"),
    (r"(blocks\.\d+\.attn)\.project\.0", r"\1.proj"),
    (r"(blocks\.\d+\.attn\.pool_[qkv])\.pool", r"\1.conv"),
    (r"(blocks\.\d+\.attn\.pool_[qkv])\.norm_act\.0", r"\1.norm"),
    (r"(blocks\.\d+\.mlp)\.0", r"\1.fc1"),
    (r"(blocks\.\d+\.mlp)\.3", r"\1.fc2"),
    (r"head\.1", r"head.proj"),
    (r"pos_encoding\.class_token", r"cls_token"),
    (r"pos_encoding\.(spatial|temporal|class)_pos", r"pos_\1"),
)
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
SCALED = ("googlenet", "inception_v3")  # their weights take x / 127.5 - 1 and change it themselves


class Published(NamedTuple):
    """A file that torchvision publishes."""

    model: str  # torchvision's name of the network
    weights: str  # and of the weights: KINETICS400_V1
    address: Address
    facts: Facts


def published(model: str) -> dict[str, Published]:
    """List what torchvision publishes for one of its networks: `{"kinetics400": ...}`.

    Each has its own name in small letters; `kinetics400` and `imagenet` are those that torchvision
    calls the default.
    """
    found: dict[str, Published] = {}
    entries: Any = tv.get_model_weights(model)
    for entry in entries:
        checksum = re.search(r"-([0-9a-f]{8,64})\.\w+$", urlsplit(entry.url).path)
        if checksum is None:
            continue
        transform = entry.transforms()
        mean, std = tuple(transform.mean), tuple(transform.std)
        if model in SCALED:
            mean = std = (0.5, 0.5, 0.5)
        facts = Facts(mean, std, labels=entry.meta.get("categories"))
        item = Published(model, entry.name, Address(entry.url, checksum[1]), facts)
        found[entry.name.lower()] = item
        short = {"KINETICS400": "kinetics400", "IMAGENET1K": "imagenet"}.get(
            entry.name.partition("_")[0]
        )
        if short is not None and entry is entries.DEFAULT:
            found[short] = item
    return found


def matches(file: File) -> bool:
    """Tell the video networks from those on images by their kernels."""
    names = ("stem.0.weight", "features.0.0.0.weight", "conv_proj.weight")
    return any(name in file.tensors and file.tensors[name].ndim == 5 for name in names)


def facts(file: File) -> Facts:
    """Kinetics-400's colours and, where the classifier has 400 rows, its classes."""
    labels = kinetics_labels(rows(file, "fc", "classifier.1", "head.1"))
    if "conv_proj.weight" in file.tensors:
        return Facts(KINETICS_MEAN, KINETICS_STD, labels=labels)
    return Facts(MEAN, STD, labels=labels)


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Rename MViT's tensors, and leave all other names as they are."""
    family = family_of(network)
    if family not in FAMILIES:
        raise refuse("torchvision", network, FAMILIES)
    if family != "mvit":
        return rename_by((), file)
    renamed = rename_by(MVIT, file)
    check_clip(file, renamed, network)
    return renamed


def check_clip(file: File, renamed: Renamed, network: nn.Module) -> None:
    """Compare the clips that a file's and a network's tables of positions are for.

    Raises:
        UserError: they are others.
    """
    made, built = _clip_of(renamed.tensors), _clip_of(network.state_dict())
    if made and built and made != built and made[0] == built[0]:
        _, frames, size = made
        raise UserError(
            f"model.weights: {file.path}'s tables of positions are for {frames} frames of {size}"
            f" pixels; set model.num_frames={frames} model.size={size}, which a clip of another"
            " length or size stretches"
        )


def _clip_of(tensors: Mapping[str, Tensor]) -> tuple[str, int, int] | None:
    """Tell an MViT's kind of positions, and the frames and pixels of the clips that they are for."""
    if "pos_temporal" in tensors:
        frames, places = len(tensors["pos_temporal"]), len(tensors["pos_spatial"])
        return "absolute", 2 * frames, 4 * math.isqrt(places)
    if (time := tensors.get("blocks.0.attn.rel_pos_t")) is not None:
        return "relative", len(time) + 1, 2 * (len(tensors["blocks.0.attn.rel_pos_h"]) + 1)
    return None


LAYOUT = Layout("torchvision", matches, facts, rename)
