"""What is known of a source of weights: its keys, their names here, its frames and its classes.

One file beside this one per source. Each has a `LAYOUT`; `vidtrain/weights/load.py` lists them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
        notes: what was done to tensors besides, in words for the user.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def move(self, name: str, to: str) -> None:
        """Give a tensor another name here."""
        self.tensors[to], self.origin[to] = self.tensors.pop(name), self.origin.pop(name)

    def drop(self, name: str, what: str) -> None:
        """Leave a tensor out, and say what it is."""
        del self.tensors[name]
        self.dropped[self.origin.pop(name)] = what


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

    A tensor that is no layer's weight, bias or statistic (a class token) has a path of its own. One that
    no rule fits keeps its name, so that whoever fills the network finds no place for it and names it.
    """
    compiled = [(re.compile(pattern), to) for pattern, to in rules]
    renamed = Renamed()
    for key, tensor in file.tensors.items():
        path, dot, leaf = key.rpartition(".")
        if leaf not in LEAVES:
            path, dot, leaf = key, "", ""
        for pattern, to in compiled:
            if match := pattern.fullmatch(path):
                path = match.expand(to)
                break
        name = path + dot + leaf
        renamed.tensors[name], renamed.origin[name] = tensor, key
    return renamed


def join_qkv(renamed: Renamed, key_bias: bool) -> None:
    """Put queries, keys and values into one: `attn.q`, `attn.k` and `attn.v` become `attn.qkv`.

    What lacks one of the three stays as it is.

    Args:
        renamed: is changed.
        key_bias: whether keys have a bias here. Where they have none, the others are `q_bias` and
            `v_bias`, and a file's is dropped: it adds one number to all scores of a query.
    """
    for name in [name for name in renamed.tensors if name.endswith(".q.weight")]:
        place = name.removesuffix("q.weight")
        _join(renamed, place, "weight")
        if key_bias:
            _join(renamed, place, "bias")
            continue
        for part in "qv":
            if f"{place}{part}.bias" in renamed.tensors:
                renamed.move(f"{place}{part}.bias", f"{place}{part}_bias")
        if f"{place}k.bias" in renamed.tensors:
            renamed.drop(f"{place}k.bias", "biases of keys, which change nothing")


def _join(renamed: Renamed, place: str, leaf: str) -> None:
    names = [f"{place}{part}.{leaf}" for part in "qkv"]
    if not all(name in renamed.tensors for name in names):
        return
    renamed.origin[f"{place}qkv.{leaf}"] = renamed.origin[names[0]]
    renamed.tensors[f"{place}qkv.{leaf}"] = torch.cat([renamed.tensors[name] for name in names])
    for name in names:
        del renamed.tensors[name], renamed.origin[name]


def encoder_alone(renamed: Renamed, network: nn.Module) -> None:
    """Put the encoder of a pretraining network into the classifier with the same blocks.

    What is `encoder.X` there is `X` here. All else is its decoder's, and is left out. So is a norm behind
    the encoder, where the classifier has one behind the mean of the tokens, `fc_norm`: that is new.
    """
    own = network.state_dict()
    if any(name.startswith("encoder.") for name in own):
        return
    for name in list(renamed.tensors):
        inner = name.removeprefix("encoder.")
        if inner == name:
            renamed.drop(name, "its decoder")
        elif inner in ("norm.weight", "norm.bias") and inner not in own:
            renamed.drop(name, "the norm behind its encoder")
        else:
            renamed.move(name, inner)
    renamed.new = (*renamed.new, r"fc_norm\..*")


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
