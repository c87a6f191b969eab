"""PyTorchVideo's model zoo: C2D, I3D and Slow on ResNet-50, SlowFast, X3D; Kinetics-400.

https://github.com/facebookresearch/pytorchvideo, Apache-2.0. Its networks are numbered `blocks`: the stem,
the four stages with a pool among them where there is one, the head. In X3D's stem, `conv_t` is the
convolution over space and `conv_xy` the one over time: the names are the wrong way round there.
"""

from __future__ import annotations

import re

from torch import nn

from vidtrain.types import UserError
from vidtrain.weights.layout import (
    KINETICS_MEAN,
    KINETICS_STD,
    Facts,
    File,
    Layout,
    Renamed,
    Rules,
    family,
    kinetics_labels,
    nested,
    refuse,
    rename_by,
)

PATHWAYS = {"0": "slow", "1": "fast"}
BLOCK: Rules = (
    (r"branch1_conv", "shortcut_conv"),
    (r"branch1_norm", "shortcut_norm"),
    (r"branch2\.((?:conv|norm)_[abc])", r"\1"),
    (r"branch2\.norm_b\.0", "norm_b"),  # X3D's, with squeeze and excitation or nothing behind it
    (r"branch2\.norm_b\.1\.block\.0", "se.reduce"),
    (r"branch2\.norm_b\.1\.block\.2", "se.expand"),
)
ENDS: Rules = ((r"blocks\.0\.(conv|norm)", r"stem.\1"), (r"blocks\.\d+\.proj", "head.proj"))
ENDS_X3D: Rules = (
    (r"blocks\.0\.conv\.conv_t", "stem.conv"),
    (r"blocks\.0\.conv\.conv_xy", "stem.conv_t"),
    (r"blocks\.0\.norm", "stem.norm"),
    (r"blocks\.5\.pool\.pre_conv", "conv5"),
    (r"blocks\.5\.pool\.pre_norm", "norm5"),
    (r"blocks\.5\.pool\.post_conv", "fc1"),
    (r"blocks\.5\.proj", "fc2"),
)


def matches(file: File) -> bool:
    """Tell it by its numbered blocks."""
    return any(
        re.match(r"blocks\.\d+\.(multipathway_blocks|res_blocks)\.", k) for k in file.tensors
    )


def facts(file: File) -> Facts:
    """Its own grey; the classes of Kinetics in their order."""
    heads = [tensor for key, tensor in file.tensors.items() if key.endswith(".proj.bias")]
    labels = kinetics_labels(len(heads[0]) if heads else None)
    return Facts(KINETICS_MEAN, KINETICS_STD, labels=labels)


def stages(file: File) -> dict[int, str]:
    """Number the blocks that are stages: `{1: "res2", 3: "res3", ...}`."""
    found = {int(m[1]) for k in file.tensors if (m := re.match(r"blocks\.(\d+)\..*res_blocks", k))}
    return {block: f"res{number}" for number, block in enumerate(sorted(found), start=2)}


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Rename for one of our networks."""
    kinds = {"slow": ENDS, "slowfast": None, "x3d": ENDS_X3D}
    kind = family(network)
    if kind not in kinds:
        raise refuse("PyTorchVideo", network, tuple(kinds))
    if any("multipathway" in key for key in file.tensors) != (kind == "slowfast"):
        raise UserError(
            f"model.weights={file.path} is PyTorchVideo's network of"
            f" {'one pathway' if kind == 'slowfast' else 'two pathways'},"
            f" and {type(network).__name__} is not"
        )
    ends = kinds[kind]
    return rename_by(_two_pathways(file) if ends is None else _one_pathway(file, ends), file)


def _one_pathway(file: File, ends: Rules) -> Rules:
    rules = list(ends)
    for block, stage in stages(file).items():
        rules += nested(rf"blocks\.{block}\.res_blocks\.(\d+)\.", rf"{stage}.\1.", BLOCK)
    return rules


def _two_pathways(file: File) -> Rules:
    rules = [(r"blocks\.\d+\.proj", "head.proj")]
    for number, path in PATHWAYS.items():
        rules += [(rf"blocks\.0\.multipathway_blocks\.{number}\.(conv|norm)", rf"{path}.stem.\1")]
        for block, stage in stages(file).items():
            place = rf"blocks\.{block}\.multipathway_blocks\.{number}\.res_blocks\.(\d+)\."
            rules += nested(place, rf"{path}.{stage}.\1.", BLOCK)
    for block in range(4):
        place = rf"blocks\.{block}\.multipathway_fusion\."
        rules += [(place + "conv_fast_to_slow", f"lateral.{block}.conv")]
        rules += [(place + "norm", f"lateral.{block}.norm")]
    return rules


LAYOUT = Layout("pytorchvideo", matches, facts, rename)
