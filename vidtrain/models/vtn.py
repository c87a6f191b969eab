"""VTN: an image transformer on each frame, then a Longformer over the frames of a whole video.

Neimark, Bar, Zohar, Asselmann. "Video Transformer Network." ICCV Workshops 2021.
https://arxiv.org/abs/2102.00719

ViT-B/16 makes one vector of each frame, its class token. These, in order, with another class token in
front, go through three layers of Longformer: a frame looks at the 9 frames before and the 9 after it and at
the class token, the class token looks at all frames. From it a norm, a layer with a GELU and a linear layer
read the classes. Time and memory grow with the number of frames and not with its square, so a network that
was trained on clips of 16 frames takes a whole video in one pass: 250 frames, spread evenly over it.

Submodules: `backbone` (a ViT, with the names of timm's: `patch_embed.proj`, `cls_token`, `pos_embed`,
`blocks.N` with `norm1` `attn.qkv` `attn.proj` `norm2` `mlp.fc1` `mlp.fc2`, `norm`); `cls_token`; `temporal`
(a Longformer: `position_embeddings`, whose last two rows are the class token's and one for padding, which
nothing here needs; `token_type_embeddings`, of which the first is added to every token; `norm`; `layers.N`
with `attn.query` `attn.key` `attn.value`, the same with `_global`, `attn.proj`, `norm1`, `mlp.fc1`,
`mlp.fc2`, `norm2`); `norm`, `fc` and `head`. Behind the last layer of `temporal` only the class token counts, so that
its `query`, `key` and `value` get gradients that are zero.

Departs from the paper: a frame's position is its number in the clip, where the released code takes its
number in the video, from 286 on counted from 0 again. So positions behind the training clip's length keep
what they began with, which is small beside what they are added to. For other sizes than it was built for,
the image network's positions are spread over the new grid in straight lines.

Parameters with 400 classes: 113,502,352. Multiply-adds: 281.433 G for 16 frames of 224 x 224, 4397.018 G for
250, of which all but 6.252 are the image network's, as tests/models/test_vtn.py asserts (the paper's 4218
leave out the products of its attention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.attention import EPS, MLP, Block, init_linear
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.patch import PatchEmbed, grid_of, resize_table
from vidtrain.layers.windowed import WindowedAttention
from vidtrain.types import UserError

BERT_EPS = 1e-12  # of the Longformer's norms, as of BERT's


class ViT(nn.Module):
    """The vision transformer: of each frame its class token, behind the last norm.

    Dosovitskiy et al. "An Image is Worth 16x16 Words." ICLR 2021. https://arxiv.org/abs/2010.11929

    Args:
        size: H and W that positions are learned for.
        patch: Pixels of a patch's side.
        dim: D.
        depth: Blocks.
        heads: Of each attention.
        drop_path: Share of frames that skip a branch of the last block in training; of earlier ones fewer.
        frames_per_forward: Frames that go through the blocks at once where nothing is learned; None for all.

    Raises:
        UserError: patches do not fill the frame, heads do not divide D, `drop_path` is no share, or
            `frames_per_forward` no number.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        drop_path: float,
        frames_per_forward: int | None,
    ) -> None:
        super().__init__()
        if frames_per_forward is not None:
            _check("frames_per_forward", frames_per_forward, ", or null for all")
        self.frames_per_forward = frames_per_forward
        box = (1, patch, patch)
        _, *self.grid = grid_of((1, size, size), box)
        self.patch_embed = PatchEmbed(dim, box)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, 4 * dim, drop=rate) for rate in path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, T, D)."""
        maps = self.patch_embed(x)
        batch, frames, *grid = maps.shape[:4]
        cls_pos, pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = maps.flatten(2, 3).flatten(0, 1) + resize_table(pos, self.grid, grid, "bilinear")
        cls = (self.cls_token + cls_pos).expand(len(patches), -1, -1)
        tokens = torch.cat([cls, patches], 1)  # (B·T, 1 + S, D)
        at_once = self.frames_per_forward
        if self.training or at_once is None:
            seen = self._encode(tokens)
        else:
            seen = torch.cat([self._encode(part) for part in tokens.split(at_once)])
        return seen.unflatten(0, (batch, frames))

    def _encode(self, tokens: Tensor) -> Tensor:
        """(N, 1 + S, D) -> (N, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])


class LongformerLayer(nn.Module):
    """Windowed attention and an MLP, each beside a shortcut and in front of a norm.

    Args:
        dim: D.
        heads: Of the attention.
        window: Frames that one looks at beside itself.
        dropout: Of the attention's weights, and of what is added to a shortcut.
    """

    def __init__(self, dim: int, heads: int, window: int, dropout: float) -> None:
        super().__init__()
        self.attn = WindowedAttention(dim, heads, window, dropout)
        self.norm1 = nn.LayerNorm(dim, eps=BERT_EPS)
        self.mlp = MLP(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + T, D) -> the same."""
        x = self.norm1(x + self.dropout(self.attn(x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Longformer(nn.Module):
    """The Longformer's encoder over a class token and the frames of a clip, after their positions are added.

    Beltagy, Peters, Cohan. "Longformer: The Long-Document Transformer." 2020.
    https://arxiv.org/abs/2004.05150

    Args:
        dim: D.
        depth: Layers.
        heads: Of each attention.
        window: Frames that one looks at beside itself.
        max_frames: Positions that are learned, beside the class token's.
        dropout: Behind the embedding, and of each layer.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, window: int, max_frames: int, dropout: float
    ) -> None:
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.zeros(max_frames + 2, dim))
        self.token_type_embeddings = nn.Parameter(torch.zeros(2, dim))
        self.norm = nn.LayerNorm(dim, eps=BERT_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            LongformerLayer(dim, heads, window, dropout) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + T, D), the class token in front, -> the same."""
        table, frames = self.position_embeddings, x.shape[1] - 1
        positions = torch.cat([table[-2:-1], table[:frames]])
        x = self.dropout(self.norm(x + positions + self.token_type_embeddings[:1]))
        for layer in self.layers:
            x = layer(x)
        return x


class VTN(nn.Module):
    """An image transformer on each frame, then a Longformer over them.

    Args:
        num_classes: K; 0 for what the linear layer would see.
        size: H and W that the image network's positions are learned for.
        patch: Pixels of a patch's side.
        dim: D, of frames and of the Longformer.
        depth: Blocks of the image network.
        heads: Of each attention.
        temporal_depth: Layers of the Longformer.
        window: Frames that one looks at beside itself, half of them on each side.
        max_frames: T that positions are learned for.
        dropout: Before the classifier.
        temporal_dropout: In the Longformer.
        drop_path: Share of frames that skip a branch of the image network's last block in training; of
            earlier ones fewer.
        frames_per_forward: Frames that go through the image network at once where it does not learn; None
            for all of a batch.

    Raises:
        UserError: patches do not fill the frame, heads do not divide D, the window is no even number, or
            another number is none that it can be.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        temporal_depth: int,
        window: int,
        max_frames: int,
        dropout: float,
        temporal_dropout: float,
        drop_path: float,
        frames_per_forward: int | None,
    ) -> None:
        super().__init__()
        _check("temporal_depth", temporal_depth)
        _check("max_frames", max_frames)
        for name, share in (("dropout", dropout), ("temporal_dropout", temporal_dropout)):
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise UserError(f"model.{name} is {share!r}; it is a share, from 0 to below 1")
        self.num_features, self.max_frames = dim, max_frames
        self.backbone = ViT(size, patch, dim, depth, heads, drop_path, frames_per_forward)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.temporal = Longformer(dim, temporal_depth, heads, window, max_frames, temporal_dropout)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.fc = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self._init_weights()
        self.reset_classifier(num_classes)

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, 1 + T, D): the class token and the frames behind the last layer.

        Raises:
            UserError: there are more frames than positions.
        """
        if x.shape[2] > self.max_frames:
            raise UserError(
                f"the model knows {self.max_frames} positions and got a clip of {x.shape[2]} frames; set"
                f" clip.num_frames (in a test views.num_frames) to at most {self.max_frames}, or train"
                f" with +model.max_frames={x.shape[2]}"
            )
        cls = self.cls_token.expand(len(x), -1, -1)
        return self.temporal(torch.cat([cls, self.backbone(x)], 1))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, T, 1, 1): the frames behind the last layer."""
        return self.tokens(x)[:, 1:].transpose(1, 2)[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        cls = self.tokens(x)[:, 0]
        return self.head(self.dropout(F.gelu(self.fc(self.norm(cls)))))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer; 0 takes it away."""
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        init_linear(self.head)

    def _init_weights(self) -> None:
        """Draw matrices and tables from a Gaussian of 0.02; biases start at zero."""
        init_linear(self)
        for table in (
            self.cls_token,
            self.backbone.cls_token,
            self.backbone.pos_embed,
            self.temporal.position_embeddings,
            self.temporal.token_type_embeddings,
        ):
            nn.init.trunc_normal_(table, std=0.02)


def _check(name: str, number: object, otherwise: str = "") -> None:
    """Refuse what is no whole number above 0."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise UserError(
            f"model.{name} is {number!r}; it must be a whole number, at least 1{otherwise}"
        )


def vtn_base(
    num_classes: int,
    size: int = 224,
    patch: int = 16,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    temporal_depth: int = 3,
    window: int = 18,
    max_frames: int = 286,
    dropout: float = 0.5,
    temporal_dropout: float = 0.1,
    drop_path: float = 0.0,
    frames_per_forward: int | None = 64,
) -> VTN:
    """Build VTN with ViT-B/16 on each frame."""
    return VTN(
        num_classes,
        size,
        patch,
        dim,
        depth,
        heads,
        temporal_depth,
        window,
        max_frames,
        dropout,
        temporal_dropout,
        drop_path,
        frames_per_forward,
    )
