"""PySlowFast's checkpoints: C2D, I3D, Slow and SlowFast, with non-local blocks or without, X3D, MViT.

https://github.com/facebookresearch/SlowFast, Apache-2.0. Stages are `s1` (stem) to `s5`, blocks
`pathwayP_resB`; MViT's blocks are numbered through.
A checkpoint of its own carries its config, from which normalisation, colour order and the non-local
blocks' pairwise function are read; the model zoo's files of Caffe2 (`.pkl`) are pickles of arrays: load
them with PySlowFast, and save the network's state dict.
"""

from __future__ import annotations

import re
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from vidtrain.types import UserError
from vidtrain.weights.layout import (
    KINETICS_MEAN,
    KINETICS_STD,
    Colour,
    Facts,
    File,
    Layout,
    Renamed,
    Rules,
    family,
    join_qkv,
    kinetics_labels,
    nested,
    refuse,
    rename_by,
    rows,
)
from vidtrain.weights.torchvision import check_clip

PAIRWISE = {"softmax": "embedded_gaussian", "dot_product": "dot_product"}
PATHWAYS = {"slow": {"0": ""}, "slowfast": {"0": "slow.", "1": "fast."}, "x3d": {"0": ""}}
FAMILIES = (*PATHWAYS, "mvit")
BLOCK: Rules = (
    (r"branch1", "shortcut_conv"),
    (r"branch1_bn", "shortcut_norm"),
    (r"branch2\.([abc])", r"conv_\1"),
    (r"branch2\.([abc])_bn", r"norm_\1"),
    (r"branch2\.se\.fc1", "se.reduce"),
    (r"branch2\.se\.fc2", "se.expand"),
)
NON_LOCAL: Rules = ((r"conv_(theta|phi|g|out)", r"\1"), (r"(?:bn|norm)", "norm"))
ENDS: Rules = ((r"s1\.pathway0_stem\.conv", "stem.conv"), (r"head\.projection", "head.proj"))
ENDS_X3D: Rules = (
    (r"s1\.pathway0_stem\.conv_xy", "stem.conv"),  # space
    (r"s1\.pathway0_stem\.conv", "stem.conv_t"),  # time
    (r"head\.conv_5", "conv5"),
    (r"head\.conv_5_bn", "norm5"),
    (r"head\.lin_5", "fc1"),
    (r"head\.projection", "fc2"),
)
MVIT: Rules = (
    (r"patch_embed\.proj", "patch_embed"),
    (r"pos_embed_(spatial|temporal|class)", r"pos_\1"),
    (r"(blocks\.\d+\.attn\.pool_[qkv])", r"\1.conv"),
    (r"(blocks\.\d+\.attn)\.norm_([qkv])", r"\1.pool_\2.norm"),
    (r"head\.projection", "head.proj"),
)
VECTORS = ("cls_token", "pos_spatial", "pos_temporal", "pos_class")  # with axes of 1 in front there
KEYS = r"(s[2-5]\.pathway\d_res\d+\.branch2\.|blocks\.\d+\.attn\.pool_[qkv]\.weight)"


def matches(file: File) -> bool:
    """Tell it by its stages and pathways, MViT by its pools."""
    return any(re.match(KEYS, key) for key in file.tensors)


def config(file: File) -> dict[str, Any]:
    """Read the config that PySlowFast puts into its checkpoints, if it is there."""
    text = file.extra.get("cfg")
    if not isinstance(text, str):
        return {}
    try:
        found = OmegaConf.to_container(OmegaConf.create(text))
    except Exception:  # it is another program's text; without it the defaults hold
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _section(file: File, name: str) -> dict[str, Any]:
    found = config(file).get(name)
    return found if isinstance(found, dict) else {}


def _colour(value: Any, default: Colour) -> Colour:
    """Take three numbers, or what is the default."""
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(isinstance(number, (int, float)) for number in numbers):
        return default
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def normalisation(file: File) -> tuple[Colour, Colour]:
    """Give the mean and deviation that its config names, else the default grey."""
    data = _section(file, "DATA")
    return _colour(data.get("MEAN"), KINETICS_MEAN), _colour(data.get("STD"), KINETICS_STD)


def facts(file: File) -> Facts:
    """What its config says, else its default grey."""
    mean, std = normalisation(file)
    # behind the normalisation
    bgr = bool(_section(file, "DATA").get("REVERSE_INPUT_CHANNEL", False))
    return Facts(mean, std, bgr, kinetics_labels(rows(file, "head.projection")))


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Rename for one of our networks."""
    kind = family(network)
    if kind == "mvit":
        return _rename_mvit(file, network)
    if (pathways := PATHWAYS.get(kind)) is None:
        raise refuse("PySlowFast", network, FAMILIES)
    two = any(".pathway1_" in key for key in file.tensors)
    if two != (len(pathways) == 2):
        raise UserError(
            f"model.weights={file.path} is PySlowFast's network of {'two' if two else 'one'}"
            f" pathway{'s' if two else ''}, and {type(network).__name__} is not"
        )
    _check_pairwise(file, network)
    normed = "s2.pathway0_res0.branch1_bn.weight" in file.tensors
    if kind == "x3d" and normed and "res2.0.shortcut_norm.weight" not in network.state_dict():
        raise UserError(
            "PySlowFast's X3D normalises the shortcut of res2; add model.norm_res2=true"
        )
    ends = ENDS_X3D if kind == "x3d" else ENDS if kind == "slow" else ()
    return rename_by([*ends, *_rules(pathways)], file)


def _rename_mvit(file: File, network: nn.Module) -> Renamed:
    about = _section(file, "MVIT")
    separate = "blocks.0.attn.q.weight" in file.tensors
    if separate and (about.get("SEPARATE_QKV") is not True or about.get("POOL_FIRST")):
        raise UserError(
            f"model.weights={file.path} has a layer each for queries, keys and values, and its config does"
            " not say MVIT.SEPARATE_QKV: true with POOL_FIRST: false; only then pools lie behind these"
            " layers for certain, as in the papers and here"
        )
    renamed = rename_by(MVIT, file)
    join_qkv(renamed, key_bias=True)
    for name in VECTORS:
        if (tensor := renamed.tensors.get(name)) is not None:
            long = name in ("pos_spatial", "pos_temporal")
            renamed.tensors[name] = tensor.flatten(0, -2) if long else tensor.flatten()
    check_clip(file, renamed, network)
    return renamed


def _rules(pathways: dict[str, str]) -> Rules:
    rules = [(r"head\.projection", "head.proj")]
    for number, prefix in pathways.items():
        rules += [
            (rf"s1\.pathway{number}_stem\.conv", f"{prefix}stem.conv"),
            (rf"s1\.pathway{number}_stem\.bn", f"{prefix}stem.norm"),
        ]
        place = rf"s([2-5])\.pathway{number}_"
        rules += nested(rf"{place}res(\d+)\.", rf"{prefix}res\1.\2.", BLOCK)
        rules += nested(rf"{place}nonlocal(\d+)\.", rf"{prefix}res\1.after\2.", NON_LOCAL)
    for stage in range(1, 5):  # a connection stands behind each of s1 to s4
        rules += [
            (rf"s{stage}_fuse\.conv_f2s", f"lateral.{stage - 1}.conv"),
            (rf"s{stage}_fuse\.bn", f"lateral.{stage - 1}.norm"),
        ]
    return rules


def _check_pairwise(file: File, network: nn.Module) -> None:
    """Refuse non-local blocks that would be computed otherwise than they were trained."""
    theirs = PAIRWISE.get(_section(file, "NONLOCAL").get("INSTANTIATION", ""))
    if theirs is None or not any("nonlocal" in key for key in file.tensors):
        return
    for module in network.modules():
        ours = getattr(module, "pairwise", theirs)
        if ours != theirs:
            raise UserError(
                f"model.weights={file.path} was trained with the pairwise function {theirs}, and"
                f" the network has {ours}; add model.non_local={theirs}"
            )


LAYOUT = Layout("pyslowfast", matches, facts, rename)
