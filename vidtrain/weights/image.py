"""Networks trained on images, ImageNet first of all, with torchvision's names.

Three ways lead from one to a network on clips:

    per frame   where the network holds an image network of torchvision: into that, as it is
    inflated    I3D out of GoogLeNet, C2D, I3D and Slow out of ResNet-50, R3D and MC3 out of ResNet-18:
                each kernel K_t times along time, divided by K_t (Carreira, Zisserman 2017)
    other channels of the first convolution: those of several frames get the kernel of one, divided by
                their number; flow fields get the mean over R, G and B (Wang et al., ECCV 2016)
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from vidtrain.layers.image import TorchvisionNet, cross_modality
from vidtrain.types import UserError
from vidtrain.weights.inflate import inflate_kernel
from vidtrain.weights.layout import (
    Facts,
    File,
    Layout,
    Renamed,
    Rules,
    family,
    nested,
    rename_by,
    rows,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS = ("classifier", "fc", "heads", "head")  # what torchvision calls a classifier
AUXILIARY = re.compile(r"(AuxLogits|aux1|aux2)\.")

RESNET: Rules = (
    (r"conv1", "stem.conv"),
    (r"bn1", "stem.norm"),
    *(
        (rf"layer{stage}\.(\d+)\.{old}", rf"res{stage + 1}.\1.{new}")
        for stage in range(1, 5)
        for old, new in (
            ("conv1", "conv_a"),
            ("bn1", "norm_a"),
            ("conv2", "conv_b"),
            ("bn2", "norm_b"),
            ("conv3", "conv_c"),
            ("bn3", "norm_c"),
            (r"downsample\.0", "shortcut_conv"),
            (r"downsample\.1", "shortcut_norm"),
        )
    ),
    (r"fc", "head.proj"),
)
RESNET_18: Rules = (
    (r"conv1", "stem.0"),
    (r"bn1", "stem.1"),
    (r"(layer[1-4]\.\d+)\.conv([12])", r"\1.conv\2.0"),
    (r"(layer[1-4]\.\d+)\.bn([12])", r"\1.conv\2.1"),
)
UNIT: Rules = ((r"conv", "conv3d"), (r"bn", "bn"))
GOOGLENET: Rules = (
    *nested(r"conv1\.", "Conv3d_1a_7x7.", UNIT),
    *nested(r"conv2\.", "Conv3d_2b_1x1.", UNIT),
    *nested(r"conv3\.", "Conv3d_2c_3x3.", UNIT),
    *(
        rule
        for theirs, ours in zip(
            ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"),
            ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"),
            strict=True,
        )
        for branch, unit in (
            (r"branch1", "b0"),
            (r"branch2\.0", "b1a"),
            (r"branch2\.1", "b1b"),
            (r"branch3\.0", "b2a"),
            (r"branch3\.1", "b2b"),
            (r"branch4\.1", "b3b"),
        )
        for rule in nested(rf"inception{theirs}\.{branch}\.", f"Mixed_{ours}.{unit}.", UNIT)
    ),
    (r"fc", "logits.conv3d"),
)
# torchvision's files of vision transformers are older than its names of their layers.
OLDER: Rules = ((r"(.+\.mlp)\.linear_1", r"\1.0"), (r"(.+\.mlp)\.linear_2", r"\1.3"))
# What a family is inflated from: torchvision's names of such networks, and the renaming.
INFLATED: dict[str, tuple[str, Rules]] = {
    "slow": ("resnet50", RESNET),
    "resnet3d": ("resnet18", RESNET_18),
    "i3d": ("googlenet", GOOGLENET),
}
NON_LOCAL = r"res\d\.after\d+\..*"  # blocks that no image network has


def matches(file: File) -> bool:
    """Tell it by its kernels: all are two-dimensional, and there are some."""
    sizes = {tensor.ndim for tensor in file.tensors.values()}
    return 4 in sizes and 5 not in sizes


def facts(file: File) -> Facts:
    """ImageNet's colours; GoogLeNet's and Inception's weights take values from -1 to 1."""
    scaled = any(key.startswith(("inception3a.", "Mixed_5b.")) for key in file.tensors)
    mean, std = ((0.5, 0.5, 0.5),) * 2 if scaled else (MEAN, STD)
    return Facts(
        mean, std, labels=imagenet_labels(rows(file, "fc", "classifier", "heads.head", "head"))
    )


def imagenet_labels(classes: int | None) -> list[str] | None:
    """Give ImageNet's class names, where there are a thousand rows."""
    if classes != 1000:
        return None
    from torchvision.models import ResNet50_Weights

    labels: list[str] = ResNet50_Weights.DEFAULT.meta["categories"]
    return labels


def places(network: nn.Module, inside: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk the parts of a network that an image network's weights go into, and their prefixes."""
    if isinstance(network, TorchvisionNet):
        yield f"{inside}net.", network.net
    elif family(network) in INFLATED and hasattr(network, "inputs") and not _holds(network):
        yield inside, network
    else:
        for name, child in network.named_children():
            yield from places(child, f"{inside}{name}.")


def _holds(network: nn.Module) -> bool:
    """Say whether a network is made of whole others, as two streams are."""
    return any(hasattr(child, "inputs") for child in network.children())


def rename(file: File, network: nn.Module, at: str) -> Renamed:
    """Rename for every image network in one of ours, or for one of ours that is inflated."""
    found = list(places(network))
    if not found:
        raise UserError(
            f"model.weights: {type(network).__name__} holds no image network that torchvision has"
            " weights for; model.backbone=resnet18 would be one"
        )
    made = Renamed()
    for prefix, part in found:
        inflated = family(part) in INFLATED
        one = rename_by(INFLATED[family(part)][1] if inflated else OLDER, file)
        own = part.state_dict()
        first = _first_kernel(part)
        for name, tensor in one.tensors.items():
            key = one.origin[name]
            if AUXILIARY.match(key):
                made.dropped[key] = "auxiliary classifiers"
            elif name not in own and name.partition(".")[0] in HEADS and not inflated:
                made.dropped[key] = "its classifier"
            else:
                if name in own:
                    tensor = _fit(
                        tensor, own[name], name == first, _sees_flow(network, f"{at}.{prefix}")
                    )
                made.tensors[prefix + name], made.origin[prefix + name] = tensor, key
    whole = "|".join(re.escape(prefix) for prefix, _ in found)
    made.new = (NON_LOCAL, rf"(?!{whole}).*") if whole else (NON_LOCAL,)
    return made


def _first_kernel(part: nn.Module) -> str:
    """Name the kernel that reads the frames."""
    kinds = (nn.Conv2d, nn.Conv3d)
    path = next((n for n, m in part.named_modules() if isinstance(m, kinds)), "")
    return f"{path}.weight"


def _sees_flow(network: nn.Module, prefix: str) -> bool:
    """Say whether a part of a network is given flow: its inputs, or its name, tell."""
    if tuple(getattr(network, "inputs", ())) == ("flow",):
        return True
    return bool({"flow", "temporal"} & set(prefix.split(".")))


def _fit(tensor: Tensor, own: Tensor, first: bool, flow: bool) -> Tensor:
    """Give a kernel the channels and the time axis that it has here; all else stays."""
    if tensor.ndim == 4 and first and tensor.shape[1] == 3 and own.shape[1] != 3:
        if flow:
            tensor = cross_modality(tensor, own.shape[1])
        elif own.shape[1] % 3 == 0:  # frames one after another
            frames = own.shape[1] // 3
            tensor = (tensor / frames).repeat(1, frames, 1, 1)
    if tensor.ndim == 4 and own.ndim == 5:
        tensor = inflate_kernel(tensor, own.shape[2])
    return tensor


LAYOUT = Layout("image", matches, facts, rename)
