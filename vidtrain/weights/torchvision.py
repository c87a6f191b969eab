"""torchvision: R3D-18, MC3-18, R(2+1)D-18 and S3D, trained on Kinetics-400.

Our networks of those names bear its names, so that nothing is renamed. What torchvision publishes is
asked of torchvision itself: address, checksum (in the file's name), normalisation, class names.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torchvision.models as tv
from torch import nn

from vidtrain.weights.files import Address
from vidtrain.weights.layout import (
    Facts,
    File,
    Layout,
    Renamed,
    kinetics_labels,
    refuse,
    rename_by,
    rows,
)
from vidtrain.weights.layout import family as family_of

FAMILIES = ("resnet3d", "s3d")
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
    names = ("stem.0.weight", "features.0.0.0.weight")
    return any(name in file.tensors and file.tensors[name].ndim == 5 for name in names)


def facts(file: File) -> Facts:
    """Kinetics-400's colours and, where the classifier has 400 rows, its classes."""
    return Facts(MEAN, STD, labels=kinetics_labels(rows(file, "fc", "classifier.1")))


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Leave the names as they are."""
    if family_of(network) not in FAMILIES:
        raise refuse("torchvision", network, FAMILIES)
    return rename_by((), file)


LAYOUT = Layout("torchvision", matches, facts, rename)
