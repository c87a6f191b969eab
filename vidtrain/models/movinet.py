"""MoViNet: searched for phones, and able to see a video one frame at a time.

Kondratyuk, Yuan, Li, Zhang, Tan, Brown, Gong. "MoViNets: Mobile Video Networks for Efficient Video
Recognition." CVPR 2021. https://arxiv.org/abs/2103.11511

Inverted bottlenecks, whose widths and kernels were found by search (`A0` to `A5` below, after the
authors' released code):

    expand    1 x 1 x 1 to the block's own width, norm, activation
    depthwise k_t x k x k on each channel, norm, activation
    se        squeeze and excitation, by a quarter of the channels
    project   1 x 1 x 1, norm; times `alpha`, which starts at 0 (ReZero); plus the input, which an
              average pool and a 1 x 1 x 1 bring to the new size where that changes

before them a convolution of 1 x 3 x 3, behind them 1 x 1 x 1 to 480 channels (A0) and more, the mean
over time and space, and two linear layers. Padding is TensorFlow's SAME. Time is never halved and any
clip will do.

The streaming networks see no later frame: their kernels end at the frame that they are computed for,
squeeze and excitation goes by the mean of all frames so far and that of the frame itself, and only
the head takes the mean over all. k_t x k x k is split in two, 1 x k x k and k_t x 1 x 1, each with
norm and activation. Swish is hard swish, and the sigmoid is clip(0.2 x + 0.5, 0, 1). What later frames
need of earlier ones is little: the last k_t - 1 maps of each depthwise convolution, and sums. Hence

    state = None
    for frames in video:                              # (B, 3, T, H, W), one or more at a time
        logits, state = net.stream(frames, state)     # of all frames so far

gives in the end what `net(video)` gives. A new video begins with None again.

Submodules: `stem.conv` `stem.norm`; `blocks.S.N` of stage S and block N, counted from 0, each with
`alpha`, `expand`, `depthwise`, `project`, `skip` (each `.conv` `.norm`; `depthwise.conv_t` `.norm_t`
where it is split), `se.reduce` `se.expand`; `project.conv` `project.norm`; `fc1` `fc2`.

Departs from the paper: A3 to A5 are as released, larger than the paper says (5.3, 4.9 and 15.7 M).
Released A3 to A5 streams tell squeeze and excitation which frame it is at, a gate a block more: 33, 47
and 59 parameters; `positional_encoding=true` does so.

Parameters with 600 classes: A0 to A5 3,111,799, 4,690,296, 5,249,562, 7,397,545, 11,349,463 and
18,650,523; streams 3,748,031, 6,447,352, 7,326,962, 10,986,585, 18,136,135 and 31,495,875. Multiply-adds
of their clips 2.631, 5.866, 11.558, 55.593, 103.339 and 276.334 G; streams 2.426, 5.540, 10.700, 52.134,
96.741 and 261.710 G, as tests/models/test_movinet.py asserts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.drop_path import drop_path, path_rates
from vidtrain.layers.flat import FlatConv3d, depthwise, depthwise_order
from vidtrain.layers.head import linear
from vidtrain.layers.same import same_padding
from vidtrain.layers.squeeze import SqueezeExcitation, round_channels
from vidtrain.types import UserError

State = Mapping[str, Tensor]  # what a stream keeps of the frames that it has seen

CONVS = ("2plus1d", "3d")


@dataclass(frozen=True)
class Search:
    """What the search found: one row a stage, `width: inner@kernel inner@kernel ...`.

    Kernels are k_t and k: 53 is 5 x 3 x 3. A stage's first block halves the map, but the fourth's.
    """

    stem: int
    stages: tuple[str, ...]
    project: int

    def blocks(self) -> list[list[tuple[int, int, int, int, int]]]:
        """List each stage's blocks: channels out, inner channels, k_t, k, stride."""
        stages: list[list[tuple[int, int, int, int, int]]] = []
        for number, row in enumerate(self.stages):
            width, _, blocks = row.partition(":")
            stages.append([])
            for i, block in enumerate(blocks.split()):
                inner, _, kernel = block.partition("@")
                stride = 2 if i == 0 and number != 3 else 1
                stages[-1].append((int(width), int(inner), int(kernel[0]), int(kernel[1]), stride))
        return stages


A0 = Search(
    8,
    (
        "8: 24@15",
        "32: 80@33 80@33 80@33",
        "56: 184@53 112@33 184@33",
        "56: 184@53 184@33 184@33 184@33",
        "104: 384@53 280@15 280@15 344@15",
    ),
    480,
)
A1 = Search(
    16,
    (
        "16: 40@15 40@33",
        "40: 96@33 120@33 96@33 96@33",
        "64: 216@53 128@33 216@33 168@33 216@33",
        "64: 216@53 216@33 216@33 128@33 128@15 216@33",
        "136: 456@53 360@15 360@15 360@15 456@15 456@33 544@13",
    ),
    600,
)
A2 = Search(
    16,
    (
        "16: 40@15 40@33 64@33",
        "40: 96@33 120@33 96@33 96@33 120@33",
        "72: 240@53 160@33 240@33 192@33 240@33",
        "72: 240@53 240@33 240@33 240@33 144@15 240@33",
        "144: 480@53 384@15 384@15 480@15 480@15 480@33 576@13",
    ),
    640,
)
A3 = Search(
    16,
    (
        "16: 40@15 40@33 64@33 40@33",
        "48: 112@33 144@33 112@33 112@15 144@33 144@33",
        "80: 240@53 152@33 240@33 192@33 240@33",
        "88: 264@53 264@33 264@33 264@33 160@15 264@33 264@33 264@33",
        "168: 560@53 448@15 448@15 560@15 560@15 560@33 448@15 448@15 560@33 672@13",
    ),
    744,
)
A4 = Search(
    24,
    (
        "24: 64@15 64@33 96@33 64@33 96@33 64@33",
        "56: 168@33 168@33 136@33 136@33 168@33 168@33 168@33 136@15 136@33",
        "96: 320@53 160@33 320@33 192@33 320@33 160@33 320@33 256@33 320@33",
        "96: 320@53 320@33 320@33 320@33 192@15 320@33 320@33 192@33 320@33 320@33",
        "192: 640@53 512@15 512@15 640@15 640@15 640@33 512@15 512@15 640@15 768@15 640@15 640@33"
        " 768@33",
    ),
    856,
)
A5 = Search(
    24,
    (
        "24: 64@15 64@15 96@33 64@33 96@33 64@33",
        "64: 192@53 152@33 152@33 152@33 192@33 192@33 192@33 152@33 152@33 192@33 192@33",
        "112: 376@53 224@33 376@33 376@33 296@33 376@33 224@33 376@33 376@33 296@33 376@33 376@33"
        " 376@33",
        "120: 376@53 376@33 376@33 376@33 224@15 376@33 376@33 224@33 376@33 376@33 376@33",
        "224: 744@53 744@33 600@15 600@15 744@15 744@15 744@33 896@15 600@15 600@15 896@15 744@15"
        " 744@33 896@15 600@15 600@15 744@15 744@33",
    ),
    992,
)


def _hard_sigmoid(x: Tensor) -> Tensor:
    """clip(0.2 x + 0.5, 0, 1): 0 below -2.5 and 1 above 2.5. PyTorch's own is x / 6 + 0.5."""
    return torch.clamp(0.2 * x + 0.5, 0.0, 1.0)


def _norm(dim: int) -> nn.BatchNorm3d:
    return nn.BatchNorm3d(dim, eps=1e-3, momentum=0.01)


class SameConv(nn.Conv3d):
    """A convolution with SAME padding in space; in time it is told what to pad."""

    def forward(self, x: Tensor, time: tuple[int, int] = (0, 0)) -> Tensor:
        """(B, C, T, H, W) and frames to pad before and behind -> (B, D, t, h, w)."""
        space = same_padding(x.shape[3:], self.kernel_size[1:], self.stride[1:])
        pads = [time, *space]
        front = [before for before, _ in pads]
        if any(before != behind for before, behind in pads):
            x = F.pad(x, [places for pair in reversed(pads) for places in pair])
            front = [0, 0, 0]
        if self.groups > 1:
            return depthwise(x, self.weight, self.stride, front)
        return F.conv3d(x, self.weight, None, self.stride, front)


class PointConv(nn.Module):
    """A 1 x 1 x 1 convolution and its norm."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv = FlatConv3d(dim_in, dim_out, 1, bias=False)
        self.norm = _norm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, H, W)."""
        return self.norm(self.conv(x))


class Stem(nn.Module):
    """1 x 3 x 3 on every second pixel, norm, activation."""

    def __init__(self, dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = SameConv(3, dim, (1, 3, 3), (1, 2, 2), bias=False)
        self.norm = _norm(dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, H/2, W/2)."""
        return self.activation(self.norm(self.conv(x)))


class Depthwise(nn.Module):
    """k_t x k x k on each channel, norm, activation.

    Args:
        dim: Channels.
        kernel: k_t and k.
        stride: In space.
        causal: Whether a frame sees itself and the k_t - 1 before it, and not those around it.
        activation: Behind the norm.
    """

    def __init__(
        self,
        dim: int,
        kernel: tuple[int, int],
        stride: int,
        causal: bool,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        extent, k = kernel
        self.extent, self.causal, self.activation = extent, causal, activation
        self.conv = SameConv(dim, dim, (extent, k, k), (1, stride, stride), groups=dim, bias=False)
        self.norm = _norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, h, w)."""
        both = (self.extent // 2, self.extent // 2)
        time = (self.extent - 1, 0) if self.causal else both
        return self.activation(self.norm(self.conv(x, time)))

    def stream(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Go on: the frames, and the k_t - 1 before them; the same for next time."""
        if past is not None:
            x = torch.cat([past.to(x.dtype), x], 2)
            past = x[:, :, 1 - self.extent :].clone()
        return self.activation(self.norm(self.conv(x))), past

    def past(self, frames: Tensor, height: int, width: int) -> Tensor | None:
        """Make what comes before the first frame, for maps of such a size."""
        if self.extent == 1:
            return None
        shape = (len(frames), self.conv.in_channels, self.extent - 1, height, width)
        return frames.new_zeros(shape)


class SplitDepthwise(nn.Module):
    """1 x k x k on each channel, norm, activation; then k_t x 1 x 1, norm, activation. Causal.

    With k_t = 1 there is no second one.

    Args:
        dim: Channels.
        kernel: k_t and k.
        stride: In space.
        activation: Behind both norms.
    """

    def __init__(
        self,
        dim: int,
        kernel: tuple[int, int],
        stride: int,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.extent, k = kernel
        self.stride, self.activation = stride, activation
        self.conv = SameConv(dim, dim, (1, k, k), (1, stride, stride), groups=dim, bias=False)
        self.norm = _norm(dim)
        if self.extent > 1:
            self.conv_t = FlatConv3d(dim, dim, (self.extent, 1, 1), groups=dim, bias=False)
            self.norm_t = _norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, h, w)."""
        x = self.activation(self.norm(self.conv(x)))
        if self.extent == 1:
            return x
        x = F.pad(x, (0, 0, 0, 0, self.extent - 1, 0))
        return self.activation(self.norm_t(self.conv_t(x)))

    def stream(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Go on: the frames, and the k_t - 1 before them; the same for next time."""
        x = self.activation(self.norm(self.conv(x)))
        if past is None:
            return x, None
        x = torch.cat([past.to(x.dtype), x], 2)
        past = x[:, :, 1 - self.extent :].clone()
        return self.activation(self.norm_t(self.conv_t(x))), past

    def past(self, frames: Tensor, height: int, width: int) -> Tensor | None:
        """Make what comes before the first frame, for maps of such a size."""
        if self.extent == 1:
            return None
        height, width = -(-height // self.stride), -(-width // self.stride)
        shape = (len(frames), self.conv.in_channels, self.extent - 1, height, width)
        return frames.new_zeros(shape)


class CausalSqueezeExcitation(nn.Module):
    """Squeeze and excitation of each frame, by all that was seen up to it.

    Args:
        dim: Channels. Of the 2 C that go in, the first half is the mean of all frames so far, the
            second that of the frame.
        positional: Whether sines and cosines of the frame's number, times `alpha`, are added to them.
    """

    def __init__(self, dim: int, positional: bool) -> None:
        super().__init__()
        dim_inner = round_channels(dim / 2)
        self.reduce = nn.Conv3d(2 * dim, dim_inner, 1)
        self.expand = nn.Conv3d(dim_inner, dim, 1)
        self.alpha = nn.Parameter(torch.zeros(())) if positional else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same."""
        return self.stream(x, None, None)[0]

    def stream(self, x: Tensor, total: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Go on: the frames, the sum (B, C, 1, 1, 1) over earlier ones and their number."""
        frame = x.mean((3, 4), keepdim=True)
        # Sums over long videos need more digits than bf16 has.
        totals = frame.to(torch.promote_types(frame.dtype, torch.float32)).cumsum(2)
        totals = totals if total is None else totals + total
        times = torch.arange(x.shape[2], device=x.device).view(-1, 1, 1)
        times = times if seen is None else times + seen
        scale = torch.cat([(totals / (times + 1)).to(frame.dtype), frame], 1)
        if self.alpha is not None:
            scale = scale + (self.alpha * self._positions(times)).to(scale.dtype)
        scale = _hard_sigmoid(self.expand(F.hardswish(self.reduce(scale))))
        return x * scale, totals[:, :, -1:]

    def _positions(self, times: Tensor) -> Tensor:
        """Sines and cosines of (T, 1, 1) frame numbers -> (2 C, T, 1, 1)."""
        dim = self.expand.out_channels
        channels = torch.arange(dim, device=times.device).view(-1, 1, 1, 1)
        angles = times / 10_000 ** (channels / dim)
        return torch.cat([angles.sin(), angles.cos()])


class Skip(nn.Module):
    """Bring a block's input to the size of its output.

    The average pool of 3 x 3 pixels counts no padding in its mean.

    Args:
        dim_in: Channels that come in.
        dim_out: Channels that go out.
        stride: In space; with 1 there is no pool.
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = FlatConv3d(dim_in, dim_out, 1, bias=False)
        self.norm = _norm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, h, w)."""
        if self.stride > 1:
            pads = same_padding(x.shape[3:], (3, 3), (self.stride, self.stride))
            front = [before for before, _ in pads]
            # Of the two sides only the one behind may be larger, by one: a window over the rest.
            frames = x.transpose(1, 2).flatten(0, 1)
            frames = F.avg_pool2d(frames, 3, self.stride, front, True, count_include_pad=False)
            x = frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
        return self.norm(self.conv(x))


class Block(nn.Module):
    """An inverted bottleneck.

    Args:
        dim_in: Channels that come in.
        dim_out: Channels that go out.
        dim: Channels between.
        kernel: k_t and k of the depthwise convolution.
        stride: In space.
        causal: Whether no later frame is seen.
        split: Whether time has a convolution of its own.
        positional: As of `CausalSqueezeExcitation`.
        drop: Share of samples that skip the block in training.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int,
        kernel: tuple[int, int],
        stride: int,
        causal: bool,
        split: bool,
        positional: bool,
        drop: float,
    ) -> None:
        super().__init__()
        self.activation = F.hardswish if causal else F.silu
        self.expand = PointConv(dim_in, dim)
        self.depthwise: Depthwise | SplitDepthwise
        if split:
            self.depthwise = SplitDepthwise(dim, kernel, stride, self.activation)
        else:
            self.depthwise = Depthwise(dim, kernel, stride, causal, self.activation)
        self.se: CausalSqueezeExcitation | SqueezeExcitation
        if causal:
            self.se = CausalSqueezeExcitation(dim, positional)
        else:
            self.se = SqueezeExcitation(dim, round_channels(dim / 4), F.silu)
        self.project = PointConv(dim, dim_out)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.drop_path = drop_path(drop)
        same = stride == 1 and dim_in == dim_out
        self.skip = nn.Identity() if same else Skip(dim_in, dim_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, D, T, h, w)."""
        y = self.se(self.depthwise(self.activation(self.expand(x))))
        return self.skip(x) + self.drop_path(self.alpha * self.project(y))

    def stream(
        self, x: Tensor, past: Tensor | None, total: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Go on: the frames, and what the depthwise convolution and the mean know of earlier ones."""
        y, past = self.depthwise.stream(self.activation(self.expand(x)), past)
        y, total = self.se.stream(y, total, seen)
        return self.skip(x) + self.drop_path(self.alpha * self.project(y)), past, total


class MoViNet(nn.Module):
    """Stem, five stages of blocks, a head.

    Args:
        num_classes: K; 0 for what fc1 gives.
        search: Widths and kernels.
        causal: Whether no frame sees a later one, so that the network can stream.
        conv: 2plus1d, depthwise convolutions in space, then in time, or 3d, both at once.
        positional_encoding: Whether squeeze and excitation is told the number of the frame.
        dropout: Before fc2.
        drop_path: Share of samples that skip the last block in training; earlier ones fewer.

    Raises:
        UserError: `conv` is none of these, or `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        search: Search,
        causal: bool,
        conv: str,
        positional_encoding: bool,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        if conv not in CONVS:
            raise UserError(f"model.conv is '{conv}'; it must be {' or '.join(CONVS)}")
        self.causal = causal
        self.activation = F.hardswish if causal else F.silu
        self.stem = Stem(search.stem, self.activation)
        self.blocks = nn.ModuleList()
        table = search.blocks()
        dim_in = search.stem
        drops = iter(path_rates(drop_path, sum(map(len, table)) + 1)[1:])
        for stage in table:
            blocks = nn.ModuleList()
            for dim_out, dim, k_t, k, stride in stage:
                drop = next(drops)
                split, kernel = conv == "2plus1d", (k_t, k)
                block = Block(
                    dim_in, dim_out, dim, kernel, stride, causal, split, positional_encoding, drop
                )
                blocks.append(block)
                dim_in = dim_out
            self.blocks.append(blocks)
        self.num_features = search.project
        self.project = PointConv(dim_in, search.project)
        self.fc1 = nn.Linear(search.project, 2048)
        self.dropout = nn.Dropout(dropout)
        self._init_weights()
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w); h and w are a 32nd, rounded up."""
        x = self.stem(depthwise_order(x))
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        return self.activation(self.project(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self._classify(self.forward_features(x).mean((2, 3, 4)))

    def stream(self, frames: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """See the next frames of a video, one or more.

        Args:
            frames: (B, 3, T, H, W).
            state: What the call before returned; None for the first frames of a video.

        Returns:
            (B, K) logits of all frames so far, and the state to go on with. The state that was given
            is left as it was.

        Raises:
            UserError: the network sees later frames, or the state is of videos of another number or
                size.
        """
        before = self.initial_state(frames)
        if state is not None:
            shapes = {key: tensor.shape for key, tensor in before.items()}
            if shapes != {key: tensor.shape for key, tensor in state.items()}:
                raise UserError(
                    "the state comes from another network, or from videos of another number or size"
                    " than these frames; begin a new video with state=None"
                )
            before = state
        seen = before["seen"]
        after = {"seen": seen + frames.shape[2]}
        x = self.stem(depthwise_order(frames))
        for name, block in self._named_blocks():
            past, total = before.get(f"{name}.past"), before[f"{name}.total"]
            x, past, after[f"{name}.total"] = block.stream(x, past, total, seen)
            if past is not None:
                after[f"{name}.past"] = past
        x = self.activation(self.project(x)).mean((3, 4))
        total = x.to(torch.promote_types(x.dtype, torch.float32)).sum(2) + before["total"]
        after["total"] = total
        return self._classify((total / after["seen"]).to(x.dtype)), after

    def initial_state(self, frames: Tensor) -> State:
        """Make the state before the first frame of videos of such a number, size and type.

        Args:
            frames: (B, 3, T, H, W), of which only that is looked at.

        Returns:
            `seen`, the number of frames; `total`, the sum (B, D) of what the head takes the mean of;
            for each block `S.N.total` (B, C, 1, 1, 1), and `S.N.past` (B, C, k_t - 1, h, w) where k_t
            is more than 1.

        Raises:
            UserError: the network sees later frames.
        """
        if not self.causal:
            raise UserError(
                "this network sees later frames and cannot stream; model=movinet_a0_stream can"
            )
        sums = torch.promote_types(frames.dtype, torch.float32)
        state = {"seen": torch.zeros((), dtype=torch.int64, device=frames.device)}
        state["total"] = frames.new_zeros((len(frames), self.num_features), dtype=sums)
        height, width = (-(-size // 2) for size in frames.shape[3:])
        for name, block in self._named_blocks():
            past = block.depthwise.past(frames, height, width)
            if past is not None:
                state[f"{name}.past"] = past
            dim, stride = block.depthwise.conv.in_channels, block.depthwise.conv.stride[1]
            state[f"{name}.total"] = frames.new_zeros((len(frames), dim, 1, 1, 1), dtype=sums)
            height, width = -(-height // stride), -(-width // stride)
        return state

    def reset_classifier(self, num_classes: int) -> None:
        """Replace fc2; 0 takes it away."""
        self.fc2 = linear(2048, num_classes)

    def _classify(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K). Swish, in streams too."""
        return self.fc2(self.dropout(F.silu(self.fc1(x))))

    def _named_blocks(self) -> list[tuple[str, Block]]:
        return [(f"{s}.{n}", b) for s, stage in enumerate(self.blocks) for n, b in enumerate(stage)]

    def _init_weights(self) -> None:
        """He et al.'s normal distribution by fan in; biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def movinet_a0(num_classes: int, dropout: float = 0.2, drop_path: float = 0.2) -> MoViNet:
    """Build MoViNet-A0: 50 frames, 5 apart, of 172 pixels."""
    return MoViNet(num_classes, A0, False, "3d", False, dropout, drop_path)


def movinet_a1(num_classes: int, dropout: float = 0.5, drop_path: float = 0.2) -> MoViNet:
    """Build MoViNet-A1: 50 frames, 5 apart, of 172 pixels."""
    return MoViNet(num_classes, A1, False, "3d", False, dropout, drop_path)


def movinet_a2(num_classes: int, dropout: float = 0.5, drop_path: float = 0.2) -> MoViNet:
    """Build MoViNet-A2: 50 frames, 5 apart, of 224 pixels."""
    return MoViNet(num_classes, A2, False, "3d", False, dropout, drop_path)


def movinet_a3(num_classes: int, dropout: float = 0.5, drop_path: float = 0.2) -> MoViNet:
    """Build MoViNet-A3: 120 frames, 2 apart, of 256 pixels."""
    return MoViNet(num_classes, A3, False, "3d", False, dropout, drop_path)


def movinet_a4(num_classes: int, dropout: float = 0.5, drop_path: float = 0.2) -> MoViNet:
    """Build MoViNet-A4: 80 frames, 3 apart, of 290 pixels."""
    return MoViNet(num_classes, A4, False, "3d", False, dropout, drop_path)


def movinet_a5(num_classes: int, dropout: float = 0.5, drop_path: float = 0.2) -> MoViNet:
    """Build MoViNet-A5: 120 frames, 2 apart, of 320 pixels."""
    return MoViNet(num_classes, A5, False, "3d", False, dropout, drop_path)


def movinet_a0_stream(
    num_classes: int,
    conv: str = "2plus1d",
    positional_encoding: bool = False,
    dropout: float = 0.2,
    drop_path: float = 0.2,
) -> MoViNet:
    """Build MoViNet-A0-Stream: 50 frames, 5 apart, of 172 pixels."""
    return MoViNet(num_classes, A0, True, conv, positional_encoding, dropout, drop_path)


def movinet_a1_stream(
    num_classes: int,
    conv: str = "2plus1d",
    positional_encoding: bool = False,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MoViNet:
    """Build MoViNet-A1-Stream: 50 frames, 5 apart, of 172 pixels."""
    return MoViNet(num_classes, A1, True, conv, positional_encoding, dropout, drop_path)


def movinet_a2_stream(
    num_classes: int,
    conv: str = "2plus1d",
    positional_encoding: bool = False,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MoViNet:
    """Build MoViNet-A2-Stream: 50 frames, 5 apart, of 224 pixels."""
    return MoViNet(num_classes, A2, True, conv, positional_encoding, dropout, drop_path)


def movinet_a3_stream(
    num_classes: int,
    conv: str = "2plus1d",
    positional_encoding: bool = False,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MoViNet:
    """Build MoViNet-A3-Stream: 120 frames, 2 apart, of 256 pixels."""
    return MoViNet(num_classes, A3, True, conv, positional_encoding, dropout, drop_path)


def movinet_a4_stream(
    num_classes: int,
    conv: str = "2plus1d",
    positional_encoding: bool = False,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MoViNet:
    """Build MoViNet-A4-Stream: 80 frames, 3 apart, of 290 pixels."""
    return MoViNet(num_classes, A4, True, conv, positional_encoding, dropout, drop_path)


def movinet_a5_stream(
    num_classes: int,
    conv: str = "2plus1d",
    positional_encoding: bool = False,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MoViNet:
    """Build MoViNet-A5-Stream: 120 frames, 2 apart, of 320 pixels."""
    return MoViNet(num_classes, A5, True, conv, positional_encoding, dropout, drop_path)
