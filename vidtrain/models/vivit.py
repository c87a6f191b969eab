"""ViViT: video vision transformers over tubelets, with four ways to attend to space and time.

Arnab, Dehghani, Heigold, Sun, Lucic, Schmid. "ViViT: A Video Vision Transformer." ICCV 2021.
https://arxiv.org/abs/2103.15691

A clip is cut into tubelets of 2 frames x 16 x 16 pixels, each of which is a token with a learned position;
32 x 224 x 224 gives 16 x 14 x 14 of them, all those of one step in time being a frame of tokens. The
paper's models (section 3.3):

    1  joint                    a token looks at all tokens; a class token is read off.
    2  factorised encoder       a transformer over each frame by itself, with a class token; a second one of
                                `temporal_depth` blocks over the frames' class tokens, with one of its own,
                                which is read off. With 0 blocks the frames' class tokens are averaged.
    3  factorised attention     in every block first over time, a token looks at its own place in all frames;
                                then over space, at its own frame. The tokens' mean is read off.
    4  factorised dot-product   in every block half of the heads look along time and half over space, side by
                                side. The tokens' mean is read off.

                blocks      D   heads
    base (b)        12    768      12
    large (l)       24   1024      16

Submodules: `patch_embed.proj`; `blocks.N` with `norm1` `attn.qkv` `attn.proj` `norm2` `mlp.fc1` `mlp.fc2`
and, in model 3, `temporal_norm1` `temporal_attn.qkv` `temporal_attn.proj`; `norm`; in model 2
`temporal_blocks.N`, which has the same parts as `blocks.N`, and `temporal_norm`; `head`; beside them
`pos_embed` and, in models 1 and 2, `cls_token`, in model 2 `temporal_cls_token` and `temporal_pos_embed`.

The paper starts from an image network: its positions repeated for every frame, its patch kernel spread
over the tubelet's frames, on the central one alone or on all in equal parts (`central_frame` and
`inflate_kernel` of vidtrain/weights/inflate.py).

Departs from the paper, as its released code does: model 3 looks along time first (the paper's equations:
last), and GELU is the approximation with tanh. Departs from both: where `init_temporal` is zero, the last
matrix of the attention over time alone is, not all its weights, which would stay there, since none of them
would get a gradient. For other numbers of frames and sizes than the network was built for, positions are
spread over the new grid in straight lines; in model 3 drop path works too.

Parameters with 400 classes, and multiply-adds of 32 x 224 x 224, as tests/models/test_vivit.py asserts:
base 88,954,000, 451.525 G (model 1); 115,062,928, 283.342 (2); 117,319,312, 371.094 (3); 88,952,464,
276.182 (4); large 307,508,624, 1435.969 (1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.attention import EPS, MLP, Attention, Block, attend, init_linear
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.patch import PatchEmbed, grid_of, resize_table
from vidtrain.types import UserError

INIT_TEMPORAL = ("zero", "random")


class SpaceAttention(Attention):
    """Self-attention within each frame: every token looks at the tokens of its own frame."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, S, D) -> the same."""
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class TimeAttention(SpaceAttention):
    """Self-attention along time: every token looks at its own place in all frames."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, S, D) -> the same."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class SplitAttention(Attention):
    """Self-attention whose first half of heads looks along time and whose second half over space.

    Args:
        dim: D, in and out.
        heads: How many, an even number.

    Raises:
        UserError: the heads are odd, or do not divide D.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        if heads % 2:
            raise UserError(
                f"model.heads is {heads}; half of them look along time and half over space:"
                " make it an even number"
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, S, D) -> the same."""
        time, space = self.qkv(x).unflatten(-1, (3, self.heads, -1)).chunk(2, -2)
        time = _attend(time.transpose(1, 2)).transpose(1, 2)
        return self.proj(torch.cat([time, _attend(space)], -2).flatten(-2))


def _attend(qkv: Tensor) -> Tensor:
    """Let each of N look at the N of its row: (B, rows, N, 3, heads, d) -> (B, rows, N, heads, d)."""
    q, k, v = (part.transpose(1, 2) for part in qkv.flatten(0, 1).unbind(2))
    out = attend(q, k, v)
    return out.transpose(1, 2).unflatten(0, qkv.shape[:2])


class TanhMLP(MLP):
    """The block's MLP with the GELU that the paper's weights were trained with, tanh in place of erf."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ViViTBlock(Block):
    """Self-attention of some kind and an MLP, each behind a norm and beside a shortcut.

    Args:
        dim: D.
        heads: Of the attention.
        drop: Share of clips that skip a branch in training; each branch is drawn for itself.
        attention: Its kind. `Attention` takes (B, N, D), all others (B, t, S, D), as the block then does.
    """

    def __init__(
        self, dim: int, heads: int, drop: float, attention: type[Attention] = Attention
    ) -> None:
        super().__init__(dim, heads, 4 * dim, drop=drop)
        self.attn = attention(dim, heads)
        self.mlp = TanhMLP(dim, 4 * dim)


class FactorisedBlock(ViViTBlock):
    """A block that looks along time first, then over each frame.

    Args:
        dim: D.
        heads: Of both attentions.
        drop: Share of clips that skip a branch in training; each of the three is drawn for itself.
    """

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__(dim, heads, drop, SpaceAttention)
        self.temporal_norm1 = nn.LayerNorm(dim, eps=EPS)
        self.temporal_attn = TimeAttention(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, t, S, D) -> the same."""
        return super().forward(x + self.drop_path(self.temporal_attn(self.temporal_norm1(x))))


class ViViT(nn.Module):
    """What the four models share: tubelets before them, a linear layer behind them.

    Args:
        num_frames: T of the clip that positions are learned for.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D.
        dropout: Before the classifier.

    Raises:
        UserError: tubelets do not fill the clip.
    """

    inputs = ("video",)

    def __init__(
        self, num_frames: int, size: int, patch: int, tubelet: int, dim: int, dropout: float
    ) -> None:
        super().__init__()
        box = (tubelet, patch, patch)
        self.num_features = dim
        self.grid = grid_of((num_frames, size, size), box)
        self.patch_embed = PatchEmbed(dim, box)
        self.dropout = nn.Dropout(dropout)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> (B, D), what the classifier sees, and (B, t, h, w, D), the normed tokens."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): the tokens of tubelets behind the norm.

        In model 2 that is the norm of the encoder over space.
        """
        return self.tokens(x)[1].permute(0, 4, 1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.head(self.dropout(self.tokens(x)[0]))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer; 0 takes it away."""
        made = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear(made)
        self.head = made

    def _start(self, num_classes: int) -> None:
        """Draw first weights, class tokens and positions among them, and make the classifier."""
        init_linear(self)
        for table in self.parameters(recurse=False):
            nn.init.trunc_normal_(table, std=0.02)
        self.reset_classifier(num_classes)


class Joint(ViViT):
    """Model 1: every token looks at all tokens in every block.

    Args:
        num_classes: K; 0 for the class token behind the norm.
        num_frames: T of the clip that positions are learned for.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        dropout: Before the classifier.
        drop_path: Share of clips that skip a branch of the last block in training; of earlier ones fewer.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide D, or `drop_path` is no share.
    """

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        size: int,
        patch: int,
        tubelet: int,
        dim: int,
        depth: int,
        heads: int,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__(num_frames, size, patch, tubelet, dim, dropout)
        t, h, w = self.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + t * h * w, dim))
        self.blocks = nn.ModuleList(
            ViViTBlock(dim, heads, rate) for rate in path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self._start(num_classes)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> (B, D), the class token, and (B, t, h, w, D)."""
        maps = self.patch_embed(x)
        grid = maps.shape[1:4]
        positions = resize_table(self.pos_embed[:, 1:], self.grid, grid, "trilinear")
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(maps), -1, -1)
        x = torch.cat([cls, maps.flatten(1, 3) + positions], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:].unflatten(1, grid)


class FactorisedEncoder(ViViT):
    """Model 2: a transformer over each frame, then one over what it makes of the frames.

    Args:
        num_classes: K; 0 for the last encoder's class token behind its norm.
        num_frames: T of the clip that positions are learned for.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D.
        depth: Blocks of the encoder over space.
        heads: Of each attention.
        temporal_depth: Blocks of the encoder over time; 0 for the mean of the frames' class tokens.
        dropout: Before the classifier.
        drop_path: Share of clips that skip a branch of an encoder's last block in training; of earlier
            ones fewer.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide D, `temporal_depth` is no count, or
            `drop_path` is no share.
    """

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        size: int,
        patch: int,
        tubelet: int,
        dim: int,
        depth: int,
        heads: int,
        temporal_depth: int,
        dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__(num_frames, size, patch, tubelet, dim, dropout)
        if not isinstance(temporal_depth, int) or temporal_depth < 0:
            raise UserError(
                f"model.temporal_depth is {temporal_depth}; it is how many blocks look along time,"
                " 0 for a mean in their place"
            )
        t, h, w = self.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + h * w, dim))
        self.blocks = nn.ModuleList(
            ViViTBlock(dim, heads, rate, SpaceAttention) for rate in path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.temporal_depth = temporal_depth
        if temporal_depth:
            self.temporal_cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.temporal_pos_embed = nn.Parameter(torch.zeros(1, 1 + t, dim))
            self.temporal_blocks = nn.ModuleList(
                ViViTBlock(dim, heads, rate) for rate in path_rates(drop_path, temporal_depth)
            )
            self.temporal_norm = nn.LayerNorm(dim, eps=EPS)
        self._start(num_classes)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> (B, D), the last class token, and (B, t, h, w, D)."""
        maps = self.patch_embed(x)
        frames, *grid = maps.shape[1:4]
        positions = resize_table(self.pos_embed[:, 1:], self.grid[1:], grid, "bilinear")
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(maps), frames, 1, -1)
        x = torch.cat([cls, maps.flatten(2, 3) + positions], 2)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.over_time(x[:, :, 0]), x[:, :, 1:].unflatten(2, grid)

    def over_time(self, x: Tensor) -> Tensor:
        """(B, t, D), the frames' class tokens -> (B, D)."""
        if not self.temporal_depth:
            return x.mean(1)
        known, grid = self.temporal_pos_embed, x.shape[1:2]
        cls = (self.temporal_cls_token + known[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x + resize_table(known[:, 1:], self.grid[:1], grid, "linear")], 1)
        for block in self.temporal_blocks:
            x = block(x)
        return self.temporal_norm(x[:, 0])


class Factorised(ViViT):
    """Models 3 and 4: attention over time and over space in every block, no class token.

    Args:
        num_classes: K; 0 for the mean of the normed tokens.
        num_frames: T of the clip that positions are learned for.
        size: Its H and W.
        patch: Pixels of a tubelet's side.
        tubelet: Frames of a tubelet.
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        dropout: Before the classifier.
        drop_path: Share of clips that skip a branch of the last block in training; of earlier ones fewer.
        split_heads: Model 4; else model 3.
        init_temporal: Of model 3. `zero`: what looks along time adds nothing at first, so that the network
            starts as one that sees each frame by itself, as an image network does. `random`: it starts as
            all else.

    Raises:
        UserError: tubelets do not fill the clip, heads do not divide D or, in model 4, are odd,
            `drop_path` is no share, or there is no such first state.
    """

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        size: int,
        patch: int,
        tubelet: int,
        dim: int,
        depth: int,
        heads: int,
        dropout: float,
        drop_path: float,
        split_heads: bool,
        init_temporal: str = "random",
    ) -> None:
        super().__init__(num_frames, size, patch, tubelet, dim, dropout)
        if init_temporal not in INIT_TEMPORAL:
            raise UserError(f"model.init_temporal is '{init_temporal}'; it must be zero or random")
        t, h, w = self.grid
        self.pos_embed = nn.Parameter(torch.zeros(1, t * h * w, dim))
        self.blocks = nn.ModuleList(
            ViViTBlock(dim, heads, rate, SplitAttention)
            if split_heads
            else FactorisedBlock(dim, heads, rate)
            for rate in path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self._start(num_classes)
        if init_temporal == "zero":
            for block in self.blocks:
                nn.init.zeros_(block.temporal_attn.proj.weight)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> (B, D), the tokens' mean, and (B, t, h, w, D)."""
        maps = self.patch_embed(x)
        grid = maps.shape[1:4]
        positions = resize_table(self.pos_embed, self.grid, grid, "trilinear")
        x = maps.flatten(2, 3) + positions.unflatten(1, (grid[0], -1))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x.mean((1, 2)), x.unflatten(2, grid[1:])


def vivit_b_joint(
    num_classes: int,
    num_frames: int = 32,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Joint:
    """Build model 1 of ViT-B: joint attention over space and time."""
    return Joint(
        num_classes, num_frames, size, patch, tubelet, dim, depth, heads, dropout, drop_path
    )


def vivit_b_factorised_encoder(
    num_classes: int,
    num_frames: int = 32,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    temporal_depth: int = 4,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> FactorisedEncoder:
    """Build model 2 of ViT-B: an encoder over space, then one over time."""
    return FactorisedEncoder(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        temporal_depth,
        dropout,
        drop_path,
    )


def vivit_b_factorised_attention(
    num_classes: int,
    num_frames: int = 32,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    init_temporal: str = "zero",
) -> Factorised:
    """Build model 3 of ViT-B: in every block attention over time, then over space."""
    return Factorised(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        dropout,
        drop_path,
        split_heads=False,
        init_temporal=init_temporal,
    )


def vivit_b_factorised_dot_product(
    num_classes: int,
    num_frames: int = 32,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Factorised:
    """Build model 4 of ViT-B: half of the heads over time, half over space."""
    return Factorised(
        num_classes,
        num_frames,
        size,
        patch,
        tubelet,
        dim,
        depth,
        heads,
        dropout,
        drop_path,
        split_heads=True,
    )


def vivit_l_joint(
    num_classes: int,
    num_frames: int = 32,
    size: int = 224,
    patch: int = 16,
    tubelet: int = 2,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 16,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> Joint:
    """Build model 1 of ViT-L."""
    return vivit_b_joint(
        num_classes, num_frames, size, patch, tubelet, dim, depth, heads, dropout, drop_path
    )
