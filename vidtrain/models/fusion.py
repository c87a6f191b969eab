"""Single-frame, early, late and slow fusion: image networks that see time at different depths.

Karpathy, Toderici, Shetty, Leung, Sukthankar, Fei-Fei. "Large-scale Video Classification with
Convolutional Neural Networks." CVPR 2014. https://cs.stanford.edu/people/karpathy/deepvideo

    single frame   the network on each frame; probabilities averaged over frames
    early          its first convolution spans all T frames
    late           its convolutions on each frame; all maps meet in the first FC layer
    late, pooled   ... or are averaged over T, h, w before a linear layer (not in the paper)
    slow           its first three convolutions span 4, 2 and 2 frames with stride 2 in time:
                   T = 10 -> 4 -> 2 -> 1

The network is the paper's own, on frames of 170 x 170:

    C(96,11,3)-N-P-C(256,5,1)-N-P-C(384,3,1)-C(384,3,1)-C(256,3,1)-P-FC(4096)-FC(4096)-K

C(filters, kernel, stride) with ReLU; N local response normalisation; P 2 x 2 max pooling.
`backbone` puts another in its place: `small`, four convolutions for small clips and CPUs, or any 2D
classification network of torchvision by its name, with random weights. Late fusion then has one
hidden layer instead of two.

Slow fusion needs three convolutions that every path goes through. Plain chains (alexnet, vgg16,
`small`) have them, and get them extended in time as in the paper. Elsewhere only the first is: the
next two lie in residual or parallel branches, which cannot shorten time on their own. There the
paper's second and third are split into space, which the network has, and time, which is added: a
2 x 1 x 1 convolution of each channel, stride 2, where the maps have shrunk once, and twice. Frames
that are left after the third (T > 10) are averaged before the head.

Departs from the paper: dropout of 0.5 on both FC layers, which it does not mention, as in the
network of Krizhevsky et al. that it extends; weights start as in He et al. 2015, where it is
silent; no multiresolution streams.

Parameters with 487 classes: single 60,276,583, early 60,590,215 (T = 10), late 98,025,319 (T = 2),
slow 61,880,263; multiply-adds 1.129, 2.044, 2.240 and 4.147 G, as tests/models/test_fusion.py
asserts.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from einops import rearrange
from torch import Tensor, nn

from vidtrain.layers.conv import FoldedConv3d, FoldedTimeConv
from vidtrain.layers.frames import check_clip, fold_time, unfold_time
from vidtrain.layers.image import (
    ImageNet,
    PlainNet,
    first_conv,
    image_net,
    init_he,
    replace_module,
    run_stages,
    stage_shapes,
)
from vidtrain.types import UserError

# Extent and stride in time of slow fusion's first three convolutions.
SLOW = ((4, 2), (2, 2), (2, 2))


def _linear(dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _mlp(dim: int, widths: tuple[int, ...]) -> nn.Sequential:
    layers = _named(flatten=nn.Flatten())
    for i, width in enumerate(widths, start=1):
        layers.add_module(f"fc{i}", nn.Linear(dim, width))
        layers.add_module(f"relu{i}", nn.ReLU())
        layers.add_module(f"dropout{i}", nn.Dropout(0.5))
        dim = width
    return layers


def _karpathy_net(num_classes: int | None, size: int, in_channels: int = 3) -> PlainNet:
    """Build the paper's image network.

    Raises:
        UserError: the frames are too small for it.
    """
    if size < 32:
        raise UserError(f"backbone=karpathy needs frames of at least 32 pixels, not {size}")
    # Krizhevsky et al. multiply the sum over n = 5 channels by 1e-4; torch, by alpha / n.
    norm = {"size": 5, "alpha": 5 * 1e-4, "beta": 0.5, "k": 2.0}
    body = _named(
        conv1=nn.Conv2d(in_channels, 96, 11, stride=3),
        relu1=nn.ReLU(),
        norm1=nn.LocalResponseNorm(**norm),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(96, 256, 5, padding=2),
        relu2=nn.ReLU(),
        norm2=nn.LocalResponseNorm(**norm),
        pool2=nn.MaxPool2d(2),
        conv3=nn.Conv2d(256, 384, 3, padding=1),
        relu3=nn.ReLU(),
        conv4=nn.Conv2d(384, 384, 3, padding=1),
        relu4=nn.ReLU(),
        conv5=nn.Conv2d(384, 256, 3, padding=1),
        relu5=nn.ReLU(),
        pool5=nn.MaxPool2d(2),
    )
    side = ((size - 11) // 3 + 1) // 8  # of the last map: one convolution of stride 3, three pools
    return PlainNet(body, _mlp(256 * side * side, (4096, 4096)), 256, 4096, num_classes, size)


def _image_net(backbone: str, num_classes: int | None, size: int, in_channels: int = 3) -> ImageNet:
    """Build an image network by name: `karpathy`, or what `layers.image.image_net` knows.

    Raises:
        UserError: there is none of that name, or it does not take frames of this size.
    """
    if backbone == "karpathy":
        return _karpathy_net(num_classes, size, in_channels)
    return image_net(backbone, num_classes, size, in_channels, others=["karpathy"])


class SingleFrame(nn.Module):
    """An image network on each frame; the probabilities of all frames are averaged.

    The average is taken in the logits' place: the softmax of what comes out is the mean of the
    frames' softmaxes. One frame gives the image network's own logits.

    Args:
        backbone: Image network with its head.
        num_classes: K; 0 for the mean embedding.
    """

    inputs = ("video",)

    def __init__(self, backbone: ImageNet, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.num_classes = num_classes

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w)."""
        maps = self.backbone.to_map(run_stages(self.backbone, fold_time(x)))
        return unfold_time(maps, x.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        check_clip(x, size=self.backbone.fixed_size)
        num_frames = x.shape[2]
        x = self.backbone(fold_time(x)).unflatten(0, (-1, num_frames))  # (B, T, K)
        if num_frames == 1:
            return x.squeeze(1)
        if not self.num_classes:
            return x.mean(1)
        return x.log_softmax(-1).logsumexp(1) - math.log(num_frames)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.backbone.reset_classifier(num_classes)
        self.num_classes = num_classes


class EarlyFusion(nn.Module):
    """An image network whose first convolution takes the channels of all frames.

    Args:
        backbone: Image network with its head, for 3·T channels: those of a frame lie together.
        num_frames: T.
    """

    inputs = ("video",)

    def __init__(self, backbone: ImageNet, num_frames: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.num_frames = num_frames

    def _stack(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, T·3, H, W)."""
        check_clip(x, self.num_frames)
        return rearrange(x, "b c t h w -> b (t c) h w")

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, 1, h, w)."""
        return self.backbone.to_map(run_stages(self.backbone, self._stack(x))).unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        check_clip(x, size=self.backbone.fixed_size)
        return self.backbone(self._stack(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.backbone.reset_classifier(num_classes)


class LateFusion(nn.Module):
    """An image network on each frame; fully connected layers on the maps of all frames together.

    Args:
        backbone: Image network without head.
        num_classes: K; 0 for the last hidden layer.
        num_frames: T.
        size: Height and width of the frames.
        widths: Of the hidden layers.
    """

    inputs = ("video",)

    def __init__(
        self,
        backbone: ImageNet,
        num_classes: int,
        num_frames: int,
        size: int,
        widths: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.num_frames = num_frames
        self.size = size
        self.num_embedding = widths[-1]
        self.mlp = _mlp(num_frames * math.prod(stage_shapes(backbone, size)[-1]), widths)
        self.mlp.apply(init_he)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w)."""
        maps = self.backbone.to_map(run_stages(self.backbone, fold_time(x)))
        return unfold_time(maps, x.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        check_clip(x, self.num_frames, self.size)
        x = rearrange(self.forward_features(x), "b d t h w -> b (t d h w)")
        return self.classifier(self.mlp(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = _linear(self.num_embedding, num_classes)


class LateFusionPool(nn.Module):
    """An image network on each frame; the mean over time and space, then a linear layer.

    Args:
        backbone: Image network without head.
        num_classes: K; 0 for the mean.
    """

    inputs = ("video",)

    def __init__(self, backbone: ImageNet, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w)."""
        maps = self.backbone.to_map(run_stages(self.backbone, fold_time(x)))
        return unfold_time(maps, x.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        check_clip(x, size=self.backbone.fixed_size)
        return self.classifier(self.forward_features(x).mean((2, 3, 4)))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.classifier = _linear(self.num_features, num_classes)


class SlowFusion(nn.Module):
    """An image network extended in time where it begins, so that frames are fused step by step.

    Args:
        backbone: Image network with its head; it is rebuilt in place.
        num_frames: T. Fewer than 4 shorten the kernels.
        size: Height and width of the frames.
    """

    inputs = ("video",)

    def __init__(self, backbone: ImageNet, num_frames: int, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.num_frames = num_frames
        self.between = nn.ModuleDict()  # convolutions over time, by the stage that they follow
        shapes = stage_shapes(backbone, size)
        on_the_way = [stage for stage in backbone.stages() if isinstance(stage, nn.Conv2d)]
        extended = on_the_way[:3] if len(on_the_way) >= 3 else [first_conv(backbone)[1]]
        after = _where_maps_shrink(shapes[:-1], backbone.channels_last)
        paths = {module: path for path, module in backbone.named_modules()}
        frames = num_frames
        for i, (extent, stride) in enumerate(SLOW):
            extent = min(extent, frames)
            if i < len(extended):
                conv = FoldedConv3d(extended[i], frames, extent, stride)
                init_he(conv)
                replace_module(backbone, paths[extended[i]], conv)
            elif frames > 1:
                stage = after[i - 1]
                dim = shapes[stage][-1 if backbone.channels_last else 1]
                conv = FoldedTimeConv(dim, frames, extent, stride, backbone.channels_last)
                self.between[str(stage)] = conv
            frames = (frames - extent) // stride + 1
        self.frames_left = frames

    def _run(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B·t, D, h, w), or what else the last stage gives."""
        check_clip(x, self.num_frames)
        x = fold_time(x)
        for i, stage in enumerate(self.backbone.stages()):
            x = stage(x)
            if str(i) in self.between:
                x = self.between[str(i)](x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w)."""
        return unfold_time(self.backbone.to_map(self._run(x)), self.frames_left)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        check_clip(x, size=self.backbone.fixed_size)
        x = self._run(x)
        if self.frames_left > 1:
            x = x.unflatten(0, (-1, self.frames_left)).mean(1)
        return self.backbone.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        self.backbone.reset_classifier(num_classes)


def _where_maps_shrink(shapes: list[tuple[int, ...]], channels_last: bool) -> list[int]:
    """Name the two stages after which the maps are smaller, first and second time.

    A network that keeps its size (a vision transformer) is cut into thirds instead.
    """
    places = [math.prod(s[1:-1] if channels_last else s[2:]) for s in shapes]
    shrinks = [i for i in range(1, len(places)) if places[i] < places[i - 1]]
    return shrinks[:2] if len(shrinks) >= 2 else [len(places) // 3, 2 * len(places) // 3]


def single_frame(num_classes: int, size: int, backbone: str = "karpathy") -> SingleFrame:
    """Build single-frame classification: any T, probabilities averaged."""
    return SingleFrame(_image_net(backbone, num_classes, size), num_classes)


def early_fusion(
    num_classes: int, num_frames: int, size: int, backbone: str = "karpathy"
) -> EarlyFusion:
    """Build early fusion: the first convolution spans all frames."""
    return EarlyFusion(_image_net(backbone, num_classes, size, 3 * num_frames), num_frames)


def late_fusion(
    num_classes: int, num_frames: int, size: int, backbone: str = "karpathy"
) -> LateFusion:
    """Build late fusion: the maps of all frames meet in fully connected layers."""
    widths = {"karpathy": (4096, 4096), "small": (128,)}.get(backbone, (512,))
    return LateFusion(_image_net(backbone, None, size), num_classes, num_frames, size, widths)


def late_fusion_pool(num_classes: int, size: int, backbone: str = "karpathy") -> LateFusionPool:
    """Build late fusion with pooling: any T, blind to the order of frames."""
    return LateFusionPool(_image_net(backbone, None, size), num_classes)


def slow_fusion(
    num_classes: int, num_frames: int, size: int, backbone: str = "karpathy"
) -> SlowFusion:
    """Build slow fusion: the first three convolutions fuse time step by step."""
    return SlowFusion(_image_net(backbone, num_classes, size), num_frames, size)
