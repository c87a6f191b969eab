"""TimeSformer: a vision transformer for clips whose attention is divided into time and space.

Bertasius, Wang, Torresani. "Is Space-Time Attention All You Need for Video Understanding?" ICML 2021.
https://arxiv.org/abs/2102.05095

Every frame is cut into patches of 16 x 16 pixels, each of which is a token. To it come a learned
position in the frame and, but in space-only attention, a learned position in time. One class token is
put in front; a linear layer reads it off behind the last norm. `attention` (section 3.3, figure 2):

    divided     in every block first over time: a token looks at its own place in all frames; a linear
                layer follows, zero at first, so that the network starts as one that knows no time. Then
                over space: a token looks at its own frame and the class token, of which each frame has a
                copy; what the copies see is averaged.
    joint       a token looks at all tokens of all frames.
    space       a token looks at its own frame alone, with a class token for each; the frames' class
                tokens are averaged before the last norm.

Submodules: `patch_embed.proj`; `blocks.N` with `norm1` `attn.qkv` `attn.proj` `norm2` `mlp.fc1` `mlp.fc2`
and, where attention is divided, `temporal_norm1` `temporal_attn` `temporal_fc`; `norm`; `head`; beside them
`cls_token`, `pos_embed` and `time_embed`.

At first `temporal_fc` is zero: until it has moved, no gradient reaches `temporal_norm1` and
`temporal_attn`. The paper starts from an image network (ViT trained on ImageNet), whose `attn` and `norm1`
fill `temporal_attn` and `temporal_norm1` as well.

Departs from the paper, as its released code does: the class token takes no part in attention over time.
Other numbers of frames and sizes than the network was built for get the nearest position, as there.
Departs from that code: drop path leaves out a whole branch of a clip, where there each frame of it (in
time, each place) is drawn for itself, before `temporal_fc`.

Parameters with 400 classes, and multiply-adds, as tests/models/test_timesformer.py asserts: base (8 x 224)
121,566,352, 195.830 G; HR (16 x 448) 122,024,080, 1702.686; large (96 x 224) 121,633,936, 2379.857; base
with joint attention 86,112,400, 179.563; space-only 86,106,256, 140.507.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidtrain.layers.attention import EPS, Attention, Block, init_linear
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.patch import PatchEmbed, grid_of, resize_table
from vidtrain.types import UserError

ATTENTION = ("divided", "joint", "space")


class DividedBlock(Block):
    """A block that looks along time first, then over each frame.

    Args:
        dim: D.
        heads: Of both attentions.
        hidden: Width of the MLP.
        drop: Share of clips that skip a branch in training; each of the three is drawn for itself.
    """

    def __init__(self, dim: int, heads: int, hidden: int, drop: float) -> None:
        super().__init__(dim, heads, hidden, drop=drop)
        self.temporal_norm1 = nn.LayerNorm(dim, eps=EPS)
        self.temporal_attn = Attention(dim, heads)
        self.temporal_fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, frames: int = 1) -> Tensor:
        """(B, 1 + S·T, D) -> the same: the class token, then for each of S places its T frames."""
        batch, cls, patches = len(x), x[:, :1], x[:, 1:]
        rows = patches.unflatten(1, (-1, frames)).flatten(0, 1)  # (B·S, T, D)
        along_time = self.temporal_fc(self.temporal_attn(self.temporal_norm1(rows)))
        patches = patches + self.drop_path(along_time.reshape(patches.shape))

        maps = patches.unflatten(1, (-1, frames)).transpose(1, 2)  # (B, T, S, D)
        each = torch.cat([cls.unsqueeze(1).expand(-1, frames, -1, -1), maps], 2).flatten(0, 1)
        seen = self.drop_path(self.attn(self.norm1(each)).unflatten(0, (batch, frames)))
        cls = cls + seen[:, :, 0].mean(1, keepdim=True)
        patches = patches + seen[:, :, 1:].transpose(1, 2).flatten(1, 2)
        x = torch.cat([cls, patches], 1)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TimeSformer(nn.Module):
    """A transformer over the patches of a clip's frames.

    Args:
        num_classes: K; 0 for the class token behind the last norm.
        num_frames: T that positions in time are learned for.
        size: H and W that positions in the frame are learned for.
        attention: `divided`, `joint` or `space`.
        patch: Pixels of a patch's side.
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        mlp_ratio: Width of the MLPs, in D.
        dropout: Before the classifier.
        drop_path: Share of clips that skip a branch of the last block in training; of earlier ones fewer.

    Raises:
        UserError: there is no such attention, patches do not fill the frame, heads do not divide D, or
            `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        num_frames: int,
        size: int,
        attention: str = "divided",
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise UserError(
                f"model.attention is '{attention}'; it must be one of {', '.join(ATTENTION)}"
            )
        self.attention, self.num_features = attention, dim
        box = (1, patch, patch)
        self.frames, *self.grid = grid_of((num_frames, size, size), box)
        self.patch_embed = PatchEmbed(dim, box)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        if attention != "space":
            self.time_embed = nn.Parameter(torch.zeros(1, num_frames, dim))
        make = DividedBlock if attention == "divided" else Block
        hidden = int(mlp_ratio * dim)
        self.blocks = nn.ModuleList(
            make(dim, heads, hidden, drop=rate) for rate in path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.dropout = nn.Dropout(dropout)
        self._init_weights()
        self.reset_classifier(num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, T, 1 + S, D): each frame's patches behind a class token, with positions."""
        maps = self.patch_embed(x)
        grid = maps.shape[2:4]
        cls_pos, pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        tokens = maps.flatten(2, 3) + resize_table(pos, self.grid, grid, "nearest").unsqueeze(1)
        if self.attention != "space":
            time = resize_table(self.time_embed, (self.frames,), maps.shape[1:2], "nearest")
            tokens = tokens + time.unsqueeze(2)
        cls = (self.cls_token + cls_pos).unsqueeze(1).expand(*maps.shape[:2], -1, -1)
        return torch.cat([cls, tokens], 2)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) -> (B, D), the class token, and (B, T, S, D), the patches; both normed."""
        x = self.embed(x)
        batch, frames = x.shape[:2]
        if self.attention == "space":
            x = x.flatten(0, 1)
            for block in self.blocks:
                x = block(x)
            x = x.unflatten(0, (batch, frames))
            return self.norm(x[:, :, 0].mean(1)), self.norm(x[:, :, 1:])
        patches = x[:, :, 1:].transpose(1, 2).flatten(1, 2)  # S outside, T inside
        x = torch.cat([x[:, 0, :1], patches], 1)
        for block in self.blocks:
            x = block(x, frames) if self.attention == "divided" else block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:].unflatten(1, (-1, frames)).transpose(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, h, w): the patches behind the last norm."""
        height = x.shape[3] // self.patch_embed.box[1]
        return self.tokens(x)[1].unflatten(2, (height, -1)).permute(0, 4, 1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        return self.head(self.dropout(self.tokens(x)[0]))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer; 0 takes it away."""
        made = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear(made)
        self.head = made

    def _init_weights(self) -> None:
        init_linear(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                nn.init.zeros_(block.temporal_fc.weight)


def timesformer_base(
    num_classes: int,
    num_frames: int = 8,
    size: int = 224,
    patch: int = 16,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.1,
    attention: str = "divided",
) -> TimeSformer:
    """Build TimeSformer for 8 frames of 224 x 224 pixels."""
    return TimeSformer(
        num_classes,
        num_frames,
        size,
        attention,
        patch=patch,
        dim=dim,
        depth=depth,
        heads=heads,
        dropout=dropout,
        drop_path=drop_path,
    )


def timesformer_hr(
    num_classes: int,
    num_frames: int = 16,
    size: int = 448,
    patch: int = 16,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.1,
) -> TimeSformer:
    """Build TimeSformer-HR: larger frames, 16 of 448 x 448 pixels."""
    return timesformer_base(
        num_classes, num_frames, size, patch, dim, depth, heads, dropout, drop_path
    )


def timesformer_large(
    num_classes: int,
    num_frames: int = 96,
    size: int = 224,
    patch: int = 16,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.1,
) -> TimeSformer:
    """Build TimeSformer-L: longer clips, 96 frames of 224 x 224 pixels."""
    return timesformer_base(
        num_classes, num_frames, size, patch, dim, depth, heads, dropout, drop_path
    )


def timesformer_base_joint(
    num_classes: int,
    num_frames: int = 8,
    size: int = 224,
    patch: int = 16,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.1,
) -> TimeSformer:
    """Build TimeSformer with joint attention over time and space."""
    return timesformer_base(
        num_classes, num_frames, size, patch, dim, depth, heads, dropout, drop_path, "joint"
    )


def timesformer_base_space(
    num_classes: int,
    num_frames: int = 8,
    size: int = 224,
    patch: int = 16,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    dropout: float = 0.0,
    drop_path: float = 0.1,
) -> TimeSformer:
    """Build TimeSformer with attention within each frame alone."""
    return timesformer_base(
        num_classes, num_frames, size, patch, dim, depth, heads, dropout, drop_path, "space"
    )
