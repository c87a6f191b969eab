"""MMAction2's model zoo: C3D, Slow (there SlowOnly), C2D, and TSN's image ResNets.

https://github.com/open-mmlab/mmaction2, Apache-2.0. A convolution and its norm are one module, `conv1.conv`
and `conv1.bn`; the classifier is `cls_head.fc_cls`. Frames are RGB, of values from 0 to 255.

Three of its networks compute something else than ours of that name, although the tensors have the same
sizes, and are refused: I3D halves time in its stem and in the pool behind it; SlowFast's lateral
connections have neither norm nor ReLU; C3D pads before pool5, which `model.pool5=pad` does here.
"""

from __future__ import annotations

import re

from torch import nn

from vidtrain.types import UserError
from vidtrain.weights import image
from vidtrain.weights.layout import (
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
    rows,
)

BLOCK: Rules = (
    *(
        rule
        for number, letter in zip("123", "abc", strict=True)
        for rule in (
            (rf"conv{number}\.conv", f"conv_{letter}"),
            (rf"conv{number}\.bn", f"norm_{letter}"),
        )
    ),
    (r"downsample\.conv", "shortcut_conv"),
    (r"downsample\.bn", "shortcut_norm"),
)
SLOW: Rules = (
    (r"backbone\.conv1\.conv", "stem.conv"),
    (r"backbone\.conv1\.bn", "stem.norm"),
    *(
        rule
        for stage in range(1, 5)
        for rule in nested(rf"backbone\.layer{stage}\.(\d+)\.", rf"res{stage + 1}.\1.", BLOCK)
    ),
    (r"cls_head\.fc_cls", "head.proj"),
)
C3D: Rules = (
    (r"backbone\.(conv[12])a\.conv", r"\1"),
    (r"backbone\.(conv[345][ab])\.conv", r"\1"),
    (r"backbone\.(fc[67])", r"\1"),
    (r"cls_head\.fc_cls", "fc8"),
)
RESNET: Rules = (  # to torchvision's names
    (r"backbone\.conv1\.conv", "conv1"),
    (r"backbone\.conv1\.bn", "bn1"),
    (r"backbone\.(layer\d\.\d+)\.conv(\d)\.conv", r"\1.conv\2"),
    (r"backbone\.(layer\d\.\d+)\.conv(\d)\.bn", r"\1.bn\2"),
    (r"backbone\.(layer\d\.\d+)\.downsample\.conv", r"\1.downsample.0"),
    (r"backbone\.(layer\d\.\d+)\.downsample\.bn", r"\1.downsample.1"),
    (r"cls_head\.fc_cls", "fc"),
)


def matches(file: File) -> bool:
    """Tell it by a convolution in its backbone that is a module of its own."""
    return any(re.match(r"backbone\..*conv\d[ab]?\.conv\.weight$", key) for key in file.tensors)


def _is_c3d(file: File) -> bool:
    return "backbone.conv1a.conv.weight" in file.tensors


def facts(file: File) -> Facts:
    """ImageNet's colours; of C3D a mean of 104, 117, 128 and no scale."""
    classes = rows(file, "cls_head.fc_cls")
    if _is_c3d(file):
        return Facts((104 / 255, 117 / 255, 128 / 255), (1 / 255, 1 / 255, 1 / 255))
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    red, green, blue = (value / 255 for value in mean)
    scale = tuple(value / 255 for value in std)
    return Facts(
        (red, green, blue), (scale[0], scale[1], scale[2]), labels=kinetics_labels(classes)
    )


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Rename for one of our networks."""
    kind = family(network)
    if _is_c3d(file):
        if kind != "c3d":
            raise refuse("MMAction2's C3D", network, ("c3d",))
        if getattr(network.get_submodule("pool5"), "padding", 0) != (0, 1, 1):
            raise UserError("MMAction2's C3D pads the map before pool5; add model.pool5=pad")
        return rename_by(C3D, file)
    if any(".slow_path." in key for key in file.tensors):
        raise UserError(
            f"model.weights={file.path} is MMAction2's SlowFast, whose lateral connections have"
            " neither norm nor ReLU: ours would compute something else with its weights"
        )
    stem = file.tensors.get("backbone.conv1.conv.weight")
    if stem is not None and stem.ndim == 5 and stem.shape[2] > 1:
        raise UserError(
            f"model.weights={file.path} is MMAction2's I3D, which halves time in its stem and behind"
            " it: ours would compute something else with its weights"
        )
    if stem is not None and stem.ndim == 4:  # TSN, and C2D, whose kernels have no time axis
        plain = rename_by(RESNET, file)
        made = image.rename(File(file.path, plain.tensors), network, at)
        made.origin = {name: plain.origin[key] for name, key in made.origin.items()}
        made.dropped = {plain.origin[key]: what for key, what in made.dropped.items()}
        return made
    if kind != "slow":
        raise refuse("MMAction2", network, ("c3d", "slow", "c2d", "single_frame"))
    return rename_by(SLOW, file)


LAYOUT = Layout("mmaction2", matches, facts, rename)
