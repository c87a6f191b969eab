"""What is known of a source of weights: its keys, their names here, its frames and its classes.

One file beside this one per source. Each has a `LAYOUT`; `vidtrain/weights/load.py` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vidtrain.types import UserError

Colour = tuple[float, float, float]  # R, G, B
Rules = Sequence[tuple[str, str]]  # regular expression of a module's whole path -> its path here
KINETICS_MEAN, KINETICS_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)  # of PySlowFast and its kin
LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class File:
    """A file of weights, read: its tensors, and what else its maker put beside them."""

    path: Path
    tensors: dict[str, Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What a network saw while its weights were made.

    Attributes:
        mean: taken off values from 0 to 1, of R, G and B; None: not known, or no frames.
        std: what is divided by then.
        bgr: whether its first convolution was given blue, green, red.
        labels: class names in the order of the classifier's rows; None: not known.
    """

    mean: Colour | None = None
    std: Colour | None = None
    bgr: bool = False
    labels: Sequence[str] | None = None


@dataclass
class Renamed:
    """A file's tensors under the names that a network here gives them.

    Attributes:
        tensors: by their names here.
        origin: which tensor of the file each of them is.
        dropped: tensors of the file that no network here has a place for, by what they are.
        new: patterns (regular expressions) of parts of the network that the source does not have.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    new: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A source.

    Attributes:
        name: what `model.weights_from` calls it.
        matches: whether a file has its keys.
        facts: of a file.
        rename: for a network, or the part of one with this dotted name. Raises UserError where the
            source has no such network, or one that computes something else.
    """

    name: str
    matches: Callable[[File], bool]
    facts: Callable[[File], Facts]
    rename: Callable[[File, nn.Module, str], Renamed]


def family(network: nn.Module) -> str:
    """Name the file that a network's class is in: slow, x3d, image, ..."""
    return type(network).__module__.rpartition(".")[2]


def rename_by(rules: Rules, file: File) -> Renamed:
    """Give tensors the names that the first fitting rule makes of their module's path.

    A tensor that no rule fits keeps its name, so that whoever fills the network finds no place for
    it and names it.
    """
    compiled = [(re.compile(pattern), to) for pattern, to in rules]
    renamed = Renamed()
    for key, tensor in file.tensors.items():
        module, _, leaf = key.rpartition(".")
        name = key
        if leaf in LEAVES:
            for pattern, to in compiled:
                if match := pattern.fullmatch(module):
                    name = f"{match.expand(to)}.{leaf}"
                    break
        renamed.tensors[name], renamed.origin[name] = tensor, key
    return renamed


def nested(place: str, to: str, rules: Rules) -> list[tuple[str, str]]:
    r"""Put rules of a block's inside behind the rule of where the block is.

    `nested(r"s(\d)\.", r"res\1.", [(r"conv_([ab])", r"\1")])` is `s(\d)\.conv_([ab])` -> `res\1.\2`.
    """
    before = re.compile(place).groups
    return [
        (place + old, to + re.sub(r"\\(\d)", lambda m: rf"\{int(m[1]) + before}", new))
        for old, new in rules
    ]


def refuse(source: str, network: nn.Module, families: Sequence[str]) -> UserError:
    """Say which networks a source has."""
    return UserError(
        f"model.weights: {source}'s weights are read for {', '.join(families)};"
        f" {type(network).__name__} is none of them"
    )


def rows(file: File, *names: str) -> int | None:
    """Count the classes of a file's classifier, which is one of `names`."""
    for name in names:
        for leaf in ("bias", "weight"):
            if (tensor := file.tensors.get(f"{name}.{leaf}")) is not None:
                return int(tensor.shape[0])
    return None


def kinetics_labels(classes: int | None) -> Sequence[str] | None:
    """Give Kinetics-400's class names, which all its sources have in alphabetical order."""
    if classes != 400:
        return None
    from torchvision.models.video import R3D_18_Weights

    labels: list[str] = R3D_18_Weights.KINETICS400_V1.meta["categories"]
    return labels
