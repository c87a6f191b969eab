"""vidtrain's own checkpoints: the whole network, or a part that two networks have equal.

A checkpoint describes itself: normalisation and class names come out of its config. Where the whole
network does not fit, an inner network of one is looked for in the other: the backbone of a
`single_frame` for a `cnn_lstm`, or an `r3d_18` for its 3D backbone. The encoder of a masked autoencoder fills
a classifier that has the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from vidtrain.layers.head import head_names
from vidtrain.layers.image import TorchvisionNet
from vidtrain.weights.image import HEADS
from vidtrain.weights.layout import Facts, File, Layout, Renamed, encoder_alone

KEY = "vidtrain"
ENCODER = "encoder"  # of a masked autoencoder, what is kept of it


def matches(file: File) -> bool:
    """Tell it by its description."""
    return KEY in file.extra


def facts(file: File) -> Facts:
    """What its config and its label names say."""
    about = file.extra.get(KEY, {})
    labels = about.get("label_names") or None
    clip = about.get("config", {}).get("clip", {})
    if "mean" not in clip or "std" not in clip:
        return Facts(labels=labels)
    return Facts(tuple(clip["mean"]), tuple(clip["std"]), labels=labels)


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Take the whole network where it fits, else the largest inner one that does."""
    theirs = {key.removeprefix("model."): (key, tensor) for key, tensor in file.tensors.items()}
    own = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    if ENCODER in {key.partition(".")[0] for key in theirs}:
        whole = _all(theirs, network)
        encoder_alone(whole, network)
        return whole
    heads = head_names(network)
    for inner in _inner(network):
        wanted = {k: shape for k, shape in own.items() if k.startswith(inner) and k not in heads}
        if not wanted:
            continue
        first = next(iter(wanted)).removeprefix(inner)
        for prefix in (k.removesuffix(first) for k in theirs if f".{k}".endswith(f".{first}")):
            found = (theirs.get(prefix + k.removeprefix(inner)) for k in wanted)
            if all(
                one is not None and tuple(one[1].shape) == shape
                for one, shape in zip(found, wanted.values(), strict=True)
            ):
                if prefix or inner:
                    return _part(theirs, prefix, network, inner)
                return _all(theirs, network)
    return _all(theirs, network)


def _inner(network: nn.Module) -> Iterator[str]:
    """Walk the prefixes of a network and of the networks in it, outermost first."""
    for name, module in network.named_modules():
        if not name:
            yield ""
        elif hasattr(module, "to_map") or hasattr(module, "forward_features"):
            yield f"{name}."


def _all(theirs: dict[str, tuple[str, Tensor]], network: nn.Module) -> Renamed:
    """Leave the names as they are; what an image network here does without is dropped."""
    made = Renamed()
    own = network.state_dict()
    ends = tuple(end for name, module in network.named_modules() for end in _ends(name, module))
    for name, (key, tensor) in theirs.items():
        if name not in own and ends and name.startswith(ends):
            made.dropped[key] = "its classifier"
        else:
            made.tensors[name], made.origin[name] = tensor, key
    return made


def _part(
    theirs: dict[str, tuple[str, Tensor]], prefix: str, network: nn.Module, inner: str
) -> Renamed:
    """Put what the file has under `prefix` under `inner`, but for the layers behind the last map."""
    made = Renamed(new=(rf"(?!{re.escape(inner)}).*",) if inner else ())
    own = network.state_dict()
    module = network.get_submodule(inner.rstrip("."))
    ends = (*_ends(inner.rstrip("."), module), *(inner + name for name in head_names(module)))
    for name, child in module.named_children():
        if type(child) is nn.Identity:
            ends = (*ends, f"{inner}{name}.")
    for name, (key, tensor) in theirs.items():
        here = inner + name.removeprefix(prefix)
        if not name.startswith(prefix):
            made.dropped[key] = f"its {name.partition('.')[0]}"
        elif here not in own and here.startswith(ends):
            made.dropped[key] = "its classifier"
        else:
            made.tensors[here], made.origin[here] = tensor, key
    return made


def _ends(name: str, module: nn.Module) -> list[str]:
    """List how the tensors behind an image network's last map begin."""
    if not hasattr(module, "to_map"):
        return []
    place = f"{name}." if name else ""
    place += "net." if isinstance(module, TorchvisionNet) else ""
    return [f"{place}{end}." for end in (*HEADS, "neck")]


LAYOUT = Layout("vidtrain", matches, facts, rename)
