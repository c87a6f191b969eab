"""2D backbones by name.

An image network here, torchvision's or ours, has

    stages()              its layers in order; one after another they make ...
    to_map(x)             ... the feature map (N, D, h, w), and
    head(x)               the logits (N, K)
    reset_classifier(K)   a new last layer; 0 leaves the embedding that fed it
    num_features          D
    channels_last         whether D comes last between the stages
    fixed_size            the one frame size that it takes, or None
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torchvision.models as tv
from einops import rearrange
from torch import Tensor, nn

from vidtrain.types import UserError

Stage = Callable[[Tensor], Tensor]

WIDTHS = (16, 32, 64, 128)  # of `small`

# The children of torchvision's networks that come after the feature map.
_HEADS = ("norm", "permute", "avgpool", "flatten", "dropout", "classifier", "fc", "heads", "head")


def torchvision_names() -> list[str]:
    """List the 2D classification networks that torchvision has."""
    return tv.list_models(module=tv)


def check_backbone(name: str, names: list[str]) -> None:
    """Refuse a backbone that does not exist.

    Raises:
        UserError: naming the nearest that does.
    """
    if name not in names:
        near = get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(f"model.backbone: there is no '{name}'; did you mean '{near}'?")


def first_conv(net: nn.Module) -> tuple[str, nn.Conv2d]:
    """Find the convolution that reads the frames, and its path."""
    return next((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d))


def cross_modality(kernel: Tensor, in_channels: int) -> Tensor:
    """Make a first kernel for RGB one for other channels: (D, 3, ...) -> (D, in_channels, ...).

    Each channel gets the mean over R, G and B. Wang et al. "Temporal Segment Networks." ECCV 2016,
    section 3.2.
    """
    return kernel.mean(1, keepdim=True).repeat(1, in_channels, *(1 for _ in kernel.shape[2:]))


def replace_module(net: nn.Module, path: str, module: nn.Module) -> None:
    """Put another module in the place of one."""
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)


def run_stages(net: Any, x: Tensor) -> Tensor:
    """Send frames through all stages of an image network."""
    for stage in net.stages():
        x = stage(x)
    return x


def init_he(module: nn.Module) -> None:
    """He et al. 2015, fan in, for convolutions and linear layers."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class PlainNet(nn.Module):
    """A chain of layers, hidden layers after it, and a classifier.

    Args:
        body: (N, C, H, W) -> (N, D, h, w).
        neck: (N, D, h, w) -> (N, E).
        num_features: D.
        num_embedding: E.
        num_classes: K; 0 for the embedding, None for a network that ends with its feature map.
        fixed_size: The one frame size that the hidden layers take, or None.
    """

    channels_last = False

    def __init__(
        self,
        body: nn.Sequential,
        neck: nn.Sequential,
        num_features: int,
        num_embedding: int,
        num_classes: int | None,
        fixed_size: int | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.neck = nn.Identity() if num_classes is None else neck
        self.apply(init_he)
        self.num_features = num_features
        self.num_embedding = num_embedding
        self.fixed_size = None if num_classes is None else fixed_size
        self.reset_classifier(num_classes or 0)

    def stages(self) -> list[nn.Module]:
        """List the layers of the body."""
        return list(self.body)

    def to_map(self, x: Tensor) -> Tensor:
        """(N, D, h, w) -> the same."""
        return x

    def head(self, x: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, K)."""
        return self.classifier(self.neck(x))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        return self.head(run_stages(self, x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = (
            nn.Linear(self.num_embedding, num_classes) if num_classes else nn.Identity()
        )


class TorchvisionNet(nn.Module):
    """A classification network of torchvision, with its feature map in reach.

    `net` is torchvision's own module, changed only where the first and the last layer must fit: its
    state dict takes torchvision's weights as they are.

    Args:
        name: As torchvision lists it: resnet18, vgg16, convnext_tiny, vit_b_16, ...
        num_classes: K; 0 for the embedding, None for a network that ends with its feature map.
        size: Height and width of the frames. Only vision transformers are bound to it.
        in_channels: Of the first convolution.

    Raises:
        UserError: there is no such network, or it cannot take frames of this size.
    """

    def __init__(self, name: str, num_classes: int | None, size: int, in_channels: int = 3) -> None:
        super().__init__()
        check_backbone(name, torchvision_names())
        arguments: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            arguments = {"aux_logits": False, "init_weights": True}
        elif name.startswith("vit_"):
            arguments = {"image_size": size}
        elif name.startswith("maxvit_"):
            arguments = {"input_size": (size, size)}
        try:
            self.net = _build(name, num_classes=num_classes or 1, **arguments)
            if in_channels != 3:
                path, conv = first_conv(self.net)
                replace_module(self.net, path, _with_channels(conv, in_channels))
            self.channels_last = isinstance(self.net, (tv.SwinTransformer, tv.VisionTransformer))
            self.fixed_size = size if arguments.keys() & {"image_size", "input_size"} else None
            self.num_features = stage_shapes(self, size, in_channels)[-1][1]
        except (ValueError, RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{name} does not take frames of {size} pixels: {reason}") from None
        self._last, last = [
            (path, module)
            for path, module in self.net.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        ][-1]
        self.num_embedding = last.weight.shape[1]
        if num_classes is None:
            for part in ("classifier", "fc", "heads", "head"):
                if hasattr(self.net, part):
                    setattr(self.net, part, nn.Identity())
        elif num_classes == 0:
            self.reset_classifier(0)

    def stages(self) -> list[Stage]:
        """List the layers before the feature map, containers opened once."""
        net = self.net
        if isinstance(net, tv.VisionTransformer):
            return [self._patches, net.encoder.dropout, *net.encoder.layers, net.encoder.ln]
        stages: list[Stage] = []
        for name, child in net.named_children():
            if name not in _HEADS:
                opens = isinstance(child, (nn.Sequential, nn.ModuleList))
                stages += list(child) if opens else [child]
        return stages

    def _patches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 1 + h·w, D), the class token first."""
        x = self.net.conv_proj(x).flatten(2).transpose(1, 2)  # (N, h·w, D)
        x = torch.cat([self.net.class_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.net.encoder.pos_embedding

    def to_map(self, x: Tensor) -> Tensor:
        """What the last stage gives -> (N, D, h, w)."""
        net = self.net
        if isinstance(net, tv.VisionTransformer):
            return rearrange(x[:, 1:], "n (h w) d -> n d h w", h=math.isqrt(x.shape[1] - 1))
        if isinstance(net, tv.SwinTransformer):
            return net.permute(net.norm(x))
        return torch.relu(x) if isinstance(net, tv.DenseNet) else x

    def head(self, x: Tensor) -> Tensor:
        """What the last stage gives -> (N, K)."""
        net = self.net
        if isinstance(net, tv.VisionTransformer):
            return net.heads(x[:, 0])
        x = self.to_map(x)
        if isinstance(net, (tv.SqueezeNet, tv.MaxVit)):  # they pool inside the classifier
            return net.classifier(x).flatten(1)
        x = net.avgpool(x) if hasattr(net, "avgpool") else x.mean((2, 3), keepdim=True)
        if isinstance(net, tv.ConvNeXt):  # it normalises before it flattens
            return net.classifier(x)
        x = x.flatten(1)
        for name in ("dropout", "classifier", "fc", "head"):
            x = getattr(net, name)(x) if hasattr(net, name) else x
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K)."""
        return self.head(run_stages(self, x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer; 0 takes it away."""
        last: nn.Module = nn.Identity()
        if num_classes and isinstance(self.net, tv.SqueezeNet):
            last = nn.Conv2d(self.num_embedding, num_classes, 1)
        elif num_classes:
            last = nn.Linear(self.num_embedding, num_classes)
        replace_module(self.net, self._last, last)


def _small(num_classes: int | None, size: int, in_channels: int = 3) -> PlainNet:
    """Build four convolutions with batch norm, each followed by a pool.

    Raises:
        UserError: the frames are too small for it.
    """
    if size < 16:
        raise UserError(f"backbone=small needs frames of at least 16 pixels, not {size}")
    body = nn.Sequential()
    dim = in_channels
    for i, width in enumerate(WIDTHS, start=1):
        body.add_module(f"conv{i}", nn.Conv2d(dim, width, 3, padding=1, bias=False))
        body.add_module(f"norm{i}", nn.BatchNorm2d(width))
        body.add_module(f"relu{i}", nn.ReLU())
        body.add_module(f"pool{i}", nn.MaxPool2d(2))
        dim = width
    neck = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    return PlainNet(body, neck, dim, dim, num_classes)


ImageNet = PlainNet | TorchvisionNet


def image_net(
    name: str,
    num_classes: int | None,
    size: int,
    in_channels: int = 3,
    others: Sequence[str] = (),
) -> ImageNet:
    """Build an image network by name: one of torchvision's, or `small`.

    `small` is four convolutions of 16 to 128 channels, for small frames and CPUs.

    Args:
        name: as above.
        num_classes: K; 0 for the embedding, None for a network that ends with its feature map.
        size: height and width of the frames.
        in_channels: of the first convolution.
        others: names that the caller knows besides.

    Raises:
        UserError: there is none of that name, or it does not take frames of this size.
    """
    check_backbone(name, ["small", *others, *torchvision_names()])
    if name == "small":
        return _small(num_classes, size, in_channels)
    return TorchvisionNet(name, num_classes, size, in_channels)


def _build(name: str, **arguments: Any) -> nn.Module:
    device = torch.get_default_device()
    # RegNet reads numbers out of tensors while it is built, so these must be real.
    with torch.device("cpu" if name.startswith("regnet_") else device):
        return tv.get_model(name, weights=None, **arguments).to(device)


def _with_channels(conv: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        bias=conv.bias is not None,
    )


class _Shapes(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> list[tuple[int, ...]]:
        """(1, C, H, W) -> the size after each stage, and of the feature map."""
        shapes = []
        for stage in self.net.stages():
            x = stage(x)
            shapes.append(tuple(x.shape))
        return [*shapes, tuple(self.net.to_map(x).shape)]


def stage_shapes(net: nn.Module, size: int, in_channels: int = 3) -> list[tuple[int, ...]]:
    """Find the size after each stage of an image network, and last that of its feature map.

    Nothing is computed: the network runs on the meta device.
    """
    probe = _Shapes(net)
    tensors = [*probe.named_parameters(), *probe.named_buffers()]
    state = {name: tensor.detach().to("meta") for name, tensor in tensors}
    frame = torch.empty(1, in_channels, size, size, device="meta")
    training = net.training
    net.eval()  # batch norm refuses a single value while training
    try:
        with torch.no_grad():
            return torch.func.functional_call(probe, state, (frame,))
    finally:
        net.train(training)
