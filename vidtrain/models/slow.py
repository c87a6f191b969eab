"""3D ResNets of one pathway: C2D, I3D-ResNet, both with non-local blocks, and Slow.

Wang, Girshick, Gupta, He. "Non-local Neural Networks." CVPR 2018. https://arxiv.org/abs/1711.07971
Feichtenhofer, Fan, Malik, He. "SlowFast Networks for Video Recognition." ICCV 2019.
https://arxiv.org/abs/1812.03982

ResNet-50, whose bottlenecks may span frames in their first convolution; the mean over time and space,
dropout, one linear layer. They differ in the frames that the convolutions span, and in a max pool that
halves time behind res2:

           stem   res2    pool   res3      res4          res5     out, from 8 x 224 x 224
    c2d    1      1 1 1   yes    1 1 1 1   1 1 1 1 1 1   1 1 1    2048 x 4 x 7 x 7
    i3d    5      3 3 3   yes    3 1 3 1   3 1 3 1 3 1   1 3 1    2048 x 4 x 7 x 7
    slow   1      1 1 1   no     1 1 1 1   3 3 3 3 3 3   3 3 3    2048 x 8 x 7 x 7

Non-local blocks come after blocks 1 and 3 of res3 and 1, 3 and 5 of res4, the places that look at
each other pooled by 1 x 2 x 2. All maps are padded to keep their length, so that any clip will do.

Submodules: `stem.conv` `stem.norm`; `res2` to `res5`, each with `N.conv_a` `N.norm_a` ... `N.norm_c`
`N.shortcut_conv` `N.shortcut_norm` of block N, and `afterN.theta` `.phi` `.g` `.out` `.norm` of the
non-local block behind it; `head.proj`.

Departs from the papers: I3D's temporal kernels and the 5 x 7 x 7 stem are those of PySlowFast, whose
numbers are quoted for these names. At test time the mean is over the whole map, where the papers' code
slides the window of training over a larger one.

Parameters with 400 classes: c2d 24,327,632, as many as ResNet-50 has, i3d 28,043,472, with non-local
blocks 35,401,936, slow 32,454,096. Multiply-adds at 224 pixels: c2d 19.493, i3d 28.408, with non-local
blocks 36.535, slow 20.871 (4 frames) and 41.741 G (8), as tests/models/test_slow.py asserts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vidtrain.layers.bottleneck import Head, Stage, Stem, stage_depths
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.non_local import non_local_blocks
from vidtrain.types import UserError

C2D = (
    1,
    (1,),
    (1,),
    (1,),
    (1,),
)  # frames that a convolution spans: of the stem, of each stage's blocks
I3D = (5, (3,), (3, 1), (3, 1), (1, 3))
SLOW = (1, (1,), (1,), (3,), (3,))


class ResNet3d(nn.Module):
    """A ResNet of bottlenecks on clips.

    Args:
        num_classes: K; 0 for the mean of the map itself.
        depth: Layers: 50, 101 or 152.
        kernels: Frames that convolutions span: the stem's, then for each stage those of its blocks,
            over again until all blocks have one.
        pool: Whether a max pool halves time behind res2.
        non_local: Pairwise function of the non-local blocks; None for no such blocks.
        non_local_at: For each stage, the blocks that a non-local one comes after, counted from 0.
        non_local_pool: Max pool inside the non-local blocks, in t, h, w.
        width: Channels of the stem; the last map has 32 times as many.
        dropout: Before the classifier.
        zero_init: Whether each residual block starts as its shortcut. Then no gradient reaches its
            convolutions before the first step.
        drop_path: Share of samples that skip the last block in training; earlier ones fewer.

    Raises:
        UserError: there is no such depth, pairwise function or block, or `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        depth: int,
        kernels: tuple[int, Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
        pool: bool,
        non_local: str | None = None,
        non_local_at: Sequence[Sequence[int]] = ((), (1, 3), (1, 3, 5), ()),
        non_local_pool: Sequence[int] | None = (1, 2, 2),
        width: int = 64,
        dropout: float = 0.5,
        zero_init: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        stem, *patterns = kernels
        self.stem = Stem(width, stem)
        self.pool = nn.MaxPool3d((2, 1, 1)) if pool else nn.Identity()
        dim, depths = width, stage_depths(depth)
        drops = path_rates(drop_path, sum(depths))
        for stage, blocks in enumerate(depths):
            inner, out = width << stage, 4 * width << stage
            after = non_local_blocks(out, non_local, non_local_at[stage], non_local_pool)
            stride = 2 if stage else 1
            here = drops[sum(depths[:stage]) :][:blocks]
            module = Stage(
                (dim, inner, out), blocks, patterns[stage], stride, zero_init, after, here
            )
            self.add_module(f"res{stage + 2}", module)
            dim = out
        self.num_features = dim
        self.head = Head(self.num_features, num_classes, dropout)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): T or half of it, H / 32, W / 32."""
        if x.shape[2] < 2 and isinstance(self.pool, nn.MaxPool3d):
            raise UserError("the model halves time and got one frame; clip.num_frames=2 or more")
        x = self.pool(self.res2(self.stem(x)))
        return self.res5(self.res4(self.res3(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.head(self.forward_features(x).mean((2, 3, 4)))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer; 0 takes it away."""
        self.head.reset(num_classes)


def c2d_r50_8x8(
    num_classes: int,
    non_local: str | None = None,
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> ResNet3d:
    """Build C2D: a ResNet-50 on each frame, and one max pool over time."""
    return ResNet3d(
        num_classes,
        50,
        C2D,
        True,
        non_local,
        width=width,
        dropout=dropout,
        zero_init=zero_init,
        drop_path=drop_path,
    )


def i3d_r50_8x8(
    num_classes: int,
    non_local: str | None = None,
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> ResNet3d:
    """Build I3D on a ResNet-50."""
    return ResNet3d(
        num_classes,
        50,
        I3D,
        True,
        non_local,
        width=width,
        dropout=dropout,
        zero_init=zero_init,
        drop_path=drop_path,
    )


def i3d_r50_nl_8x8(
    num_classes: int,
    non_local: str = "embedded_gaussian",
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> ResNet3d:
    """Build I3D on a ResNet-50 with five non-local blocks."""
    return ResNet3d(
        num_classes,
        50,
        I3D,
        True,
        non_local,
        width=width,
        dropout=dropout,
        zero_init=zero_init,
        drop_path=drop_path,
    )


def slow_r50_4x16(
    num_classes: int,
    non_local: str | None = None,
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> ResNet3d:
    """Build the slow pathway alone, for 4 frames, 16 apart."""
    return ResNet3d(
        num_classes,
        50,
        SLOW,
        False,
        non_local,
        width=width,
        dropout=dropout,
        zero_init=zero_init,
        drop_path=drop_path,
    )


def slow_r50_8x8(
    num_classes: int,
    non_local: str | None = None,
    width: int = 64,
    dropout: float = 0.5,
    zero_init: bool = True,
    drop_path: float = 0.0,
) -> ResNet3d:
    """Build the slow pathway alone, for 8 frames, 8 apart."""
    return slow_r50_4x16(num_classes, non_local, width, dropout, zero_init, drop_path)
