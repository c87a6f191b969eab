"""SlowFast: one pathway sees few frames with many channels, the other many frames with few.

Feichtenhofer, Fan, Malik, He. "SlowFast Networks for Video Recognition." ICCV 2019.
https://arxiv.org/abs/1812.03982

Two 3D ResNets. The fast pathway sees every frame of the clip, the slow one `T / alpha` of them, which
the network picks itself; the fast one has an eighth of the slow one's channels. T x tau in a name are
the slow pathway's frames and their distance: 4 x 16 and 8 x 8 are clips of 32 frames 2 apart (alpha 8
and 4), 16 x 8 of 64. Time is never strided. Channels x frames from 32 x 224 x 224, at 8 x 8:

                 stem      res2      res3      res4       res5
    slow      64 x  8   256 x  8   512 x 8   1024 x 8   2048 x 8    1 x 7 x 7 stem; 3 x 1 x 1 in res4, res5
    fast       8 x 32    32 x 32    64 x 32   128 x 32   256 x 32   5 x 7 x 7 stem; 3 x 1 x 1 in all stages
    lateral   16 x  8    64 x  8   128 x 8    256 x 8               joins the slow map before the next stage

Lateral connections are convolutions over time with stride alpha. Each pathway's last map is averaged
over time and space; dropout and one linear layer follow.

In networks of 101 layers only the first six blocks of res4 span frames (`temporal_blocks`), of both
pathways. The released ones of 8 x 8 and 16 x 8 are so (101_50_50), and the paper's counts with them
(53.7 M; 106 and 213 G at 256 pixels); `temporal_blocks=23` is PyTorchVideo's slowfast_r101.

Submodules: `slow` and `fast`, each with `stem.conv` `stem.norm` and `res2` to `res5`, in these
`N.conv_a` `N.norm_a` ... `N.norm_c` `N.shortcut_conv` `N.shortcut_norm` of block N, and in `slow` what
`afterN` holds of a non-local block behind it, `.theta` `.phi` `.g` `.out` `.norm`; `lateral.0` to
`lateral.3`, behind the stem, res2, res3 and res4, with `conv` and `norm`; `head.proj`, which sees the
slow pathway's channels first.

Departs from the paper: the slow pathway's frames are spread from the first frame to the last, as in
PySlowFast, whose weights are made for it: of 32 frames 0 4 8 13 17 22 26 31. `slow_frames="stride"`
takes 0 4 8 12 16 20 24 28, the paper's and MMAction2's. The lateral kernel, 5 in the paper, is 7 in R50
8 x 8, as in what was released. The non-local blocks are dot products, as there. At test time the mean
is over the whole map, where PySlowFast slides the window of training over a larger one.

Parameters with 400 classes, and multiply-adds at 224 and 256 pixels, as tests/models/test_slowfast.py
asserts: R50 4 x 16 34,480,216, 27.639 and 36.099 G; R50 8 x 8 34,566,488, 50.309 and 65.709; R101 8 x 8
53,774,808, 81.548 and 106.511; R101 16 x 8 as many, 163.095 and 213.021; with non-local blocks
60,080,088, 177.969 and 233.959.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.bottleneck import Head, Stage, Stem, conv_of, stage_depths
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.non_local import non_local_blocks
from vidtrain.types import UserError

STAGES = ("res2", "res3", "res4", "res5")
LATERAL = 2  # times the fast pathway's channels: what a lateral connection adds to the slow one
NL_R50 = ((), (1, 3), (1, 3, 5), ())  # blocks of the slow pathway that a non-local one comes after
NL_R101 = ((), (), (6, 13, 20), ())


class Pathway(nn.Module):
    """One of the two: a stem and four stages, which SlowFast calls in turn.

    Args:
        width: Channels of the stem.
        joined: What share of its channels a map has on top when it enters a stage, as `1 / joined`;
            0 for none.
        depths: Blocks of each stage.
        stem_kernel: Frames that the stem's convolution spans.
        kernels: For each stage the frames that its blocks span.
        zero_init: As of the bottleneck.
        after: For each stage what comes after its blocks, by their numbers.
        drop_path: Share of samples that skip the last block in training; earlier ones fewer.
    """

    def __init__(
        self,
        width: int,
        joined: int,
        depths: Sequence[int],
        stem_kernel: int,
        kernels: Sequence[Sequence[int]],
        zero_init: bool,
        after: Sequence[dict[int, nn.Module]],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.stem = Stem(width, stem_kernel)
        dim, drops = width, path_rates(drop_path, sum(depths))
        for stage, name in enumerate(STAGES):
            inner, out = width << stage, 4 * width << stage
            dims = (dim + (dim // joined if joined else 0), inner, out)
            stride = 2 if stage else 1
            here = drops[sum(depths[:stage]) :][: depths[stage]]
            module = Stage(
                dims, depths[stage], kernels[stage], stride, zero_init, after[stage], here
            )
            self.add_module(name, module)
            dim = out
        self.num_features = dim


class Lateral(nn.Module):
    """From the fast pathway to the slow one: a convolution over time that keeps one frame of `alpha`.

    Args:
        dim: Channels of the fast pathway.
        kernel: Frames that it spans.
        alpha: Its stride in time.
    """

    def __init__(self, dim: int, kernel: int, alpha: int) -> None:
        super().__init__()
        self.conv = conv_of(dim, LATERAL * dim, (kernel, 1, 1), (alpha, 1, 1))
        self.norm = nn.BatchNorm3d(LATERAL * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, 2C, T / alpha, H, W)."""
        return F.relu(self.norm(self.conv(x)), inplace=True)


class SlowFast(nn.Module):
    """Two pathways, four lateral connections, one classifier.

    Args:
        num_classes: K; 0 for the two means side by side.
        depth: Layers of each pathway: 50, 101 or 152.
        alpha: How many times more frames the fast pathway sees.
        lateral_kernel: Frames that lateral connections span.
        slow_frames: Which frames the slow pathway sees: `spread` from first to last, or `stride`.
        temporal_blocks: How many blocks of res4, the first ones, span frames; None for all.
        non_local: Pairwise function of the slow pathway's non-local blocks; None for no such blocks.
        non_local_at: For each stage, the blocks that a non-local one comes after, counted from 0.
        non_local_pool: Max pool inside the non-local blocks, in t, h, w.
        width: Channels of the slow pathway's stem.
        beta_inverse: How many times fewer channels the fast pathway has; divides the width.
        dropout: Before the classifier.
        zero_init: Whether each residual block starts as its shortcut. Then no gradient reaches its
            convolutions before the first step.
        drop_path: Share of samples that skip each pathway's last block in training; earlier ones fewer.

    Raises:
        UserError: there is no such depth, pairwise function or block, the channels do not divide, or
            `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        depth: int,
        alpha: int,
        lateral_kernel: int,
        slow_frames: str = "spread",
        temporal_blocks: int | None = None,
        non_local: str | None = None,
        non_local_at: Sequence[Sequence[int]] = NL_R50,
        non_local_pool: Sequence[int] | None = (1, 2, 2),
        width: int = 64,
        beta_inverse: int = 8,
        dropout: float = 0.5,
        zero_init: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if width % beta_inverse or beta_inverse % LATERAL:
            raise UserError(
                f"model.width is {width} and model.beta_inverse {beta_inverse}: the second must be"
                " even and divide the first"
            )
        if slow_frames not in ("spread", "stride"):
            raise UserError(f"model.slow_frames is '{slow_frames}'; it must be spread or stride")
        self.alpha, self.slow_frames = alpha, slow_frames
        depths = stage_depths(depth)
        spanning = depths[2] if temporal_blocks is None else temporal_blocks
        if not 0 <= spanning <= depths[2]:
            raise UserError(
                f"model.temporal_blocks is {spanning}; res4 has {depths[2]} blocks, so that it must"
                f" be 0 to {depths[2]}"
            )
        res4 = [3] * spanning + [1] * (depths[2] - spanning)
        after = [
            non_local_blocks(4 * width << stage, non_local, blocks, non_local_pool)
            for stage, blocks in enumerate(non_local_at)
        ]
        joined, spans = beta_inverse // LATERAL, ([1], [1], res4, [3])
        self.slow = Pathway(width, joined, depths, 1, spans, zero_init, after, drop_path)
        fast = width // beta_inverse
        spans = ([3], [3], res4, [3])
        self.fast = Pathway(fast, 0, depths, 5, spans, zero_init, [{}] * 4, drop_path)
        dims = [fast, *(4 * fast << stage for stage in range(3))]
        self.lateral = nn.ModuleList(Lateral(dim, lateral_kernel, alpha) for dim in dims)
        self.num_features = self.slow.num_features + self.fast.num_features
        self.head = Head(self.num_features, num_classes, dropout)

    def pick_slow(self, x: Tensor) -> Tensor:
        """Pick the slow pathway's frames: (B, C, T, H, W) -> (B, C, T / alpha, H, W).

        Spread, they are `floor(linspace(0, T - 1, T / alpha))`, in whole numbers: torch's own linspace,
        rounded down, is one frame short in a few places of a few clips of 160 frames and more.
        """
        if self.slow_frames == "stride":
            return x[:, :, :: self.alpha]
        last, count = x.shape[2] - 1, x.shape[2] // self.alpha
        steps = torch.arange(count, device=x.device)
        return x.index_select(2, steps * last // max(count - 1, 1))

    def pathways(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> (B, C, T / alpha, h, w) of the slow and (B, D, T, h, w) of the fast one.

        Raises:
            UserError: `alpha` does not divide T.
        """
        if x.shape[2] % self.alpha:
            raise UserError(
                f"the slow pathway takes one frame of {self.alpha} and got a clip of {x.shape[2]};"
                f" make clip.num_frames a multiple of {self.alpha}"
            )
        slow, fast = self.slow.stem(self.pick_slow(x)), self.fast.stem(x)
        for name, lateral in zip(STAGES, self.lateral, strict=True):
            slow = getattr(self.slow, name)(torch.cat([slow, lateral(fast)], 1))
            fast = getattr(self.fast, name)(fast)
        return slow, fast

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T / alpha, h, w): slow channels, then fast ones.

        The fast pathway's frames are averaged, `alpha` of them for each of the slow one's.
        """
        slow, fast = self.pathways(x)
        return torch.cat([slow, fast.unflatten(2, (-1, self.alpha)).mean(3)], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        slow, fast = self.pathways(x)
        return self.head(torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer; 0 takes it away."""
        self.head.reset(num_classes)


def slowfast_r50_4x16(
    num_classes: int,
    lateral_kernel: int = 5,
    slow_frames: str = "spread",
    non_local: str | None = None,
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> SlowFast:
    """Build SlowFast R50 for 4 slow and 32 fast frames."""
    return SlowFast(
        num_classes,
        depth=50,
        alpha=8,
        lateral_kernel=lateral_kernel,
        slow_frames=slow_frames,
        non_local=non_local,
        width=width,
        dropout=dropout,
        zero_init=zero_init,
        drop_path=drop_path,
    )


def slowfast_r50_8x8(
    num_classes: int,
    lateral_kernel: int = 7,
    slow_frames: str = "spread",
    non_local: str | None = None,
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> SlowFast:
    """Build SlowFast R50 for 8 slow and 32 fast frames."""
    return SlowFast(
        num_classes,
        depth=50,
        alpha=4,
        lateral_kernel=lateral_kernel,
        slow_frames=slow_frames,
        non_local=non_local,
        width=width,
        dropout=dropout,
        zero_init=zero_init,
        drop_path=drop_path,
    )


def slowfast_r101_8x8(
    num_classes: int,
    lateral_kernel: int = 5,
    slow_frames: str = "spread",
    temporal_blocks: int = 6,
    non_local: str | None = None,
    non_local_pool: Sequence[int] = (2, 2, 2),
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> SlowFast:
    """Build SlowFast R101 for 8 slow and 32 fast frames."""
    return SlowFast(
        num_classes,
        depth=101,
        alpha=4,
        lateral_kernel=lateral_kernel,
        slow_frames=slow_frames,
        temporal_blocks=temporal_blocks,
        non_local=non_local,
        non_local_at=NL_R101,
        non_local_pool=non_local_pool,
        width=width,
        dropout=dropout,
        zero_init=zero_init,
        drop_path=drop_path,
    )


def slowfast_r101_16x8(
    num_classes: int,
    lateral_kernel: int = 5,
    slow_frames: str = "spread",
    temporal_blocks: int = 6,
    non_local: str | None = None,
    non_local_pool: Sequence[int] = (2, 2, 2),
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> SlowFast:
    """Build SlowFast R101 for 16 slow and 64 fast frames."""
    return slowfast_r101_8x8(
        num_classes,
        lateral_kernel,
        slow_frames,
        temporal_blocks,
        non_local,
        non_local_pool,
        width,
        dropout,
        zero_init,
        drop_path,
    )


def slowfast_r101_16x8_nl(
    num_classes: int,
    lateral_kernel: int = 5,
    slow_frames: str = "spread",
    temporal_blocks: int = 6,
    non_local: str = "dot_product",
    non_local_pool: Sequence[int] = (2, 2, 2),
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> SlowFast:
    """Build SlowFast R101 for 16 slow and 64 fast frames, with three non-local blocks in res4."""
    return slowfast_r101_8x8(
        num_classes,
        lateral_kernel,
        slow_frames,
        temporal_blocks,
        non_local,
        non_local_pool,
        width,
        dropout,
        zero_init,
        drop_path,
    )
