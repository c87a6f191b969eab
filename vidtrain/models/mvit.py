"""MViT: a transformer over space and time whose stages have fewer tokens and more channels.

Fan, Xiong, Mangalam, Li, Yan, Malik, Feichtenhofer. "Multiscale Vision Transformers." ICCV 2021.
https://arxiv.org/abs/2104.11227 (v1)
Li, Wu, Fan, Mangalam, Xiong, Malik, Feichtenhofer. "MViTv2: Improved Multiscale Vision Transformers for
Classification and Detection." CVPR 2022. https://arxiv.org/abs/2112.01526 (v2)

A strided convolution makes tokens of the clip, and a class token comes first. Attention pools: a depthwise
3 x 3 x 3 convolution, the same for all heads, makes the maps of keys and values smaller, and in the first
block of a later stage that of queries, by 2 x 2; the shortcut there is a max pool. Time is never pooled.
Keys come to 7 x 7, in those first blocks, which see the stage before, to 14 x 14. From 16 x 224 x 224, of
B 16x4 (v1) and S 16x4 (v2):

    stage   channels   heads   blocks   queries, T x H x W   keys' stride
    1          96        1       1         8 x 56 x 56        1 x 8 x 8
    2         192        2       2         8 x 28 x 28        1 x 4 x 4
    3         384        4      11         8 x 14 x 14        1 x 2 x 2
    4         768        8       2         8 x  7 x  7        1 x 1 x 1

v1 adds learned positions of frames and of places to the tokens, and its channels grow in the MLP of a
stage's last block. v2 has no such positions. What it adds to q k^T is learned for the distance between
query and key along time, height and width, times the query (equation 3); its channels grow in the
attention of a stage's first block; queries are pooled in every block, with stride 1 too, and are added to
what attention gives (equation 4).

Submodules: `patch_embed`; `blocks.N` with `norm1` `attn.qkv` `attn.pool_{q,k,v}.{conv,norm}` `attn.proj`
`norm2` `mlp.fc1` `mlp.fc2`, and `proj` where channels grow; `norm`; `head.proj`. Beside them lie `cls_token`
and v1's `pos_spatial` `pos_temporal` `pos_class`; v2's tables are `blocks.N.attn.rel_pos_{h,w,t}`.

Departs from the papers, as the authors' code does: the query that the distances are multiplied by is not
divided by sqrt(d), only q k^T is; what joins the class token's attention is not its query; a table of
distances is as long as the stage's size divided by 2 and rounded down asks for, and is stretched where the
map is larger (v2 L at 312 pixels: 39, 20 and 10 places). A clip of another length or size stretches all
tables, linearly. Logits come from the class token alone, so that v2's last block has tables and a pool of
queries that only `forward_features` depends on; their gradient is 0 in training.

Parameters with 400 classes and multiply-adds, as tests/models/test_mvit.py asserts: v1 B 16x4 36,610,672,
70.599 G; B 32x3 36,611,440, 169.958 G; v2 S 16x4 34,537,744, 64.224 G; B 32x3 51,230,128, 224.473 G;
L 40x3 at 312 pixels 213,390,112, 2823.404 G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.attention import EPS, MLP, init_linear
from vidtrain.layers.bottleneck import Head
from vidtrain.layers.drop_path import drop_path as skip
from vidtrain.layers.drop_path import path_rates
from vidtrain.layers.patch import resize_table
from vidtrain.types import UserError

PATCH = (2, 4, 4)  # frames and pixels from one token to the next
STAGE_STRIDE = (1, 2, 2)
KEY_STRIDE = 8  # of the first stage's keys; half as much in each later one

Grid = tuple[int, int, int]  # tokens along time, height and width


def _strided(grid: Grid, stride: Grid) -> Grid:
    """Size after a convolution or a pool with an odd kernel and as much padding as keeps the middle."""
    t, h, w = ((size - 1) // step + 1 for size, step in zip(grid, stride, strict=True))
    return t, h, w


def _on_grid(pool: Callable[[Tensor], Tensor], x: Tensor, grid: Grid) -> Tensor:
    """Put all tokens but the class token on their grid and pool: (B, G, 1 + N, D) -> (B, G, 1 + M, D)."""
    maps = x[:, :, 1:].flatten(0, 1).transpose(1, 2).unflatten(2, grid)
    tokens = pool(maps).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
    return torch.cat([x[:, :, :1], tokens], 2)


def _by_distance(table: Tensor, queries: int, keys: int) -> Tensor:
    """Look up the distance of each query to each key on one axis: (N, d) -> (queries, keys, d).

    Distances are counted in the steps of whichever there are more of, from the last key on; the
    quotient is of whole numbers, so that nothing is rounded.
    """
    longest = max(queries, keys)
    query = torch.arange(queries, device=table.device)[:, None]
    key = torch.arange(keys, device=table.device)
    steps = longest * (query * keys + (keys - 1 - key) * queries) // (queries * keys)
    whole = resize_table(table[None], table.shape[:1], (2 * longest - 1,), "linear")[0]
    return whole[steps]


class Pool(nn.Module):
    """Depthwise convolution of a head's map, then a layer norm.

    Args:
        dim: Channels of a head.
        stride: Over time, height and width.
    """

    def __init__(self, dim: int, stride: Grid) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, heads, 1 + N, d) -> (B, heads, 1 + M, d); the class token is only normed."""
        return self.norm(_on_grid(self.conv, x, grid))


class PoolingAttention(nn.Module):
    """Attention between tokens of which there are fewer as keys and, at a stage's start, as queries.

    Args:
        dims: Channels that come in and go out.
        heads: Attention heads.
        stride: Of queries.
        key_stride: Of keys and values.
        pool_queries: Whether queries are pooled.
        residual: Whether pooled queries are added to the result.
        lengths: How long the tables of distances are, over time, height and width; None for none.
    """

    def __init__(
        self,
        dims: tuple[int, int],
        heads: int,
        stride: Grid,
        key_stride: Grid,
        pool_queries: bool,
        residual: bool,
        lengths: Grid | None,
    ) -> None:
        super().__init__()
        dim_in, dim = dims
        self.heads, self.stride, self.key_stride = heads, stride, key_stride
        self.residual = residual
        self.qkv = nn.Linear(dim_in, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.pool_q = Pool(dim // heads, stride) if pool_queries else None
        self.pool_k = Pool(dim // heads, key_stride)
        self.pool_v = Pool(dim // heads, key_stride)
        self.relative = lengths is not None
        if lengths is not None:
            for axis, length in zip("thw", lengths, strict=True):
                table = nn.Parameter(torch.empty(length, dim // heads))
                self.register_parameter(f"rel_pos_{axis}", table)
                nn.init.trunc_normal_(table, std=0.02)

    def bias(self, q: Tensor, grid: Grid, keys: Grid) -> Tensor:
        """What distances add to q k^T: (B, heads, 1 + N, d) -> (B, heads, 1 + N, 1 + M).

        Args:
            q: Queries, not divided by sqrt(d).
            grid: Of the queries.
            keys: Of the keys.
        """
        places = q[:, :, 1:].unflatten(2, grid)
        (qt, qh, qw), (kt, kh, kw) = grid, keys
        t = torch.einsum("bnthwd,tkd->bnthwk", places, _by_distance(self.rel_pos_t, qt, kt))
        h = torch.einsum("bnthwd,hkd->bnthwk", places, _by_distance(self.rel_pos_h, qh, kh))
        w = torch.einsum("bnthwd,wkd->bnthwk", places, _by_distance(self.rel_pos_w, qw, kw))
        total = t[..., None, None] + h[..., None, :, None] + w[..., None, None, :]
        # The class token comes first on both sides, and is at no distance.
        return F.pad(total.flatten(5).flatten(2, 4), (1, 0, 1, 0))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """(B, 1 + N, D) -> (B, 1 + N / strides, E)."""
        parts = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, heads, 1 + N, d) each
        k, v = self.pool_k(k, grid), self.pool_v(v, grid)
        if self.pool_q is not None:
            q = self.pool_q(q, grid)
        bias = None
        if self.relative:
            bias = self.bias(q, _strided(grid, self.stride), _strided(grid, self.key_stride))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if self.residual:
            out = torch.cat([out[:, :, :1], out[:, :, 1:] + q[:, :, 1:]], 2)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pooling attention and an MLP, each behind a norm and beside a shortcut.

    Where channels grow, the shortcut is a linear layer on the normed tokens.

    Args:
        dims: Channels that come in, of attention and that go out.
        heads: Attention heads.
        stride: Of queries, and of the shortcut around attention.
        key_stride: Of keys and values.
        pool_queries: Whether queries are pooled where the stride is 1 as well.
        residual: Whether pooled queries are added to what attention gives.
        lengths: How long the tables of distances are; None for none.
        drop: Share of samples that skip each of the two in training.
    """

    def __init__(
        self,
        dims: tuple[int, int, int],
        heads: int,
        stride: Grid,
        key_stride: Grid,
        pool_queries: bool,
        residual: bool,
        lengths: Grid | None,
        drop: float,
    ) -> None:
        super().__init__()
        dim_in, dim, out = dims
        strided = max(stride) > 1
        self.norm1 = nn.LayerNorm(dim_in, eps=EPS)
        self.attn = PoolingAttention(
            (dim_in, dim), heads, stride, key_stride, pool_queries or strided, residual, lengths
        )
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, 4 * dim, out)
        self.proj = nn.Linear(dim_in, out) if dim_in != out else None
        self.in_attention = dim_in != dim
        kernel = [step + 1 if step > 1 else 1 for step in stride]
        padding = [size // 2 for size in kernel]
        self.pool_skip = nn.MaxPool3d(kernel, stride, padding) if strided else None
        self.stride = stride
        self.drop = skip(drop)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, 1 + N, D) -> (B, 1 + M, E), and the grid that the M tokens lie on."""
        normed = self.norm1(x)
        short = self.proj(normed) if self.proj is not None and self.in_attention else x
        if self.pool_skip is not None:
            short = _on_grid(self.pool_skip, short[:, None], grid)[:, 0]
        x = short + self.drop(self.attn(normed, grid))
        normed = self.norm2(x)
        short = self.proj(normed) if self.proj is not None and not self.in_attention else x
        return short + self.drop(self.mlp(normed)), _strided(grid, self.stride)


class MViT(nn.Module):
    """Tokens, blocks in stages, and a classifier on the class token.

    Args:
        num_classes: K; 0 for the class token itself.
        depths: Blocks of each stage.
        num_frames: Of the clips that tables of positions are made for; others stretch them.
        size: Of those clips, in pixels.
        width: Channels of the first stage; twice as many in each later one.
        heads: Attention heads of the first stage; twice as many in each later one.
        positions: `absolute`, added to the tokens, or `relative`, added to q k^T.
        growth: Where channels grow: in `attention` of a stage's first block, or in the `mlp` of the last
            block before it.
        pool_queries: Whether queries are pooled in every block, and not only where they become fewer.
        residual_pooling: Whether pooled queries are added to what attention gives.
        dropout: Before the classifier.
        drop_path: Share of samples that skip the last block's parts in training; earlier ones fewer.

    Raises:
        UserError: the heads do not divide the width, there is no such kind of positions or place of
            growth, or `drop_path` is no share.
    """

    inputs = ("video",)

    def __init__(
        self,
        num_classes: int,
        depths: Sequence[int],
        num_frames: int,
        size: int,
        width: int = 96,
        heads: int = 1,
        positions: str = "relative",
        growth: str = "attention",
        pool_queries: bool = True,
        residual_pooling: bool = True,
        dropout: float = 0.5,
        drop_path: float = 0.2,
    ) -> None:
        super().__init__()
        if width < 1 or width % heads:
            raise UserError(
                f"model.width is {width} and the first stage has {heads} heads: it must be a"
                f" multiple of {heads}"
            )
        if positions not in ("absolute", "relative"):
            raise UserError(f"model.positions is '{positions}'; it must be absolute or relative")
        if growth not in ("attention", "mlp"):
            raise UserError(f"model.growth is '{growth}'; it must be attention or mlp")
        grid = _strided((num_frames, size, size), PATCH)
        self.patch_embed = nn.Conv3d(3, width, (3, 7, 7), PATCH, padding=(1, 3, 3))
        self.cls_token = nn.Parameter(torch.empty(width))
        self.absolute = positions == "absolute"
        if self.absolute:
            self.pos_spatial = nn.Parameter(torch.empty(grid[1] * grid[2], width))
            self.pos_temporal = nn.Parameter(torch.empty(grid[0], width))
            self.pos_class = nn.Parameter(torch.empty(width))
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.blocks = nn.ModuleList()
        rates = path_rates(drop_path, sum(depths))
        side, dim_in = grid[1], width
        for stage, depth in enumerate(depths):
            dim, key_step = width << stage, max(KEY_STRIDE >> stage, 1)
            for place in range(depth):
                step = 2 if stage and not place else 1
                # Rounded down, as in the authors' code, though a map of odd size comes out larger.
                longest = max(side // step, side // key_step, 1)
                side = max(side // step, 1)
                lengths = (2 * grid[0] - 1, 2 * longest - 1, 2 * longest - 1)
                last = place == depth - 1 and stage < len(depths) - 1
                out = 2 * dim if growth == "mlp" and last else dim
                block = Block(
                    (dim_in, dim, out),
                    heads << stage,
                    STAGE_STRIDE if step > 1 else (1, 1, 1),
                    (1, key_step, key_step),
                    pool_queries,
                    residual_pooling,
                    None if self.absolute else lengths,
                    rates[len(self.blocks)],
                )
                self.blocks.append(block)
                dim_in = out
        self.num_features = dim_in
        self.norm = nn.LayerNorm(dim_in, eps=EPS)
        self.head = Head(dim_in, num_classes, dropout)
        init_linear(self)

    def tokens(self, x: Tensor) -> tuple[Tensor, Grid]:
        """(B, 3, T, H, W) -> (B, 1 + N, D), the class token first, and the grid of the N others."""
        maps = self.patch_embed(x)
        t, h, w = maps.shape[2:]
        grid: Grid = (t, h, w)
        cls = self.cls_token.expand(len(x), 1, -1)
        x = torch.cat([cls, maps.flatten(2).transpose(1, 2)], 1)
        if self.absolute:
            x = x + self.positions(grid)
        for block in self.blocks:
            x, grid = block(x, grid)
        return x, grid

    def positions(self, grid: Grid) -> Tensor:
        """What v1 adds to the tokens of a grid: (1 + N, D)."""
        t, h, w = grid
        side = round(len(self.pos_spatial) ** 0.5)
        places = resize_table(self.pos_spatial[None], (side, side), (h, w), "bilinear")
        frames = resize_table(self.pos_temporal[None], self.pos_temporal.shape[:1], (t,), "linear")
        total = frames.transpose(0, 1) + places
        return torch.cat([self.pos_class[None], total.flatten(0, 1)])

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, D, t, h, w): all tokens but the class token, back on their grid."""
        x, grid = self.tokens(x)
        return self.norm(x[:, 1:]).transpose(1, 2).unflatten(2, grid)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, K)."""
        x, _ = self.tokens(x)
        return self.head(self.norm(x[:, 0]))

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer; 0 takes it away."""
        self.head.reset(num_classes)
        init_linear(self.head)


def mvit_v1_b_16x4(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    width: int = 96,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MViT:
    """Build MViTv1 B for 16 frames, 4 apart."""
    return MViT(
        num_classes,
        (1, 2, 11, 2),
        num_frames,
        size,
        width,
        positions="absolute",
        growth="mlp",
        pool_queries=False,
        residual_pooling=False,
        dropout=dropout,
        drop_path=drop_path,
    )


def mvit_v1_b_32x3(
    num_classes: int,
    num_frames: int = 32,
    size: int = 224,
    width: int = 96,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MViT:
    """Build MViTv1 B for 32 frames, 3 apart."""
    return mvit_v1_b_16x4(num_classes, num_frames, size, width, dropout, drop_path)


def mvit_v2_s_16x4(
    num_classes: int,
    num_frames: int = 16,
    size: int = 224,
    width: int = 96,
    dropout: float = 0.5,
    drop_path: float = 0.2,
) -> MViT:
    """Build MViTv2 S for 16 frames, 4 apart."""
    depths = (1, 2, 11, 2)
    return MViT(num_classes, depths, num_frames, size, width, dropout=dropout, drop_path=drop_path)


def mvit_v2_b_32x3(
    num_classes: int,
    num_frames: int = 32,
    size: int = 224,
    width: int = 96,
    dropout: float = 0.5,
    drop_path: float = 0.3,
) -> MViT:
    """Build MViTv2 B for 32 frames, 3 apart."""
    depths = (2, 3, 16, 3)
    return MViT(num_classes, depths, num_frames, size, width, dropout=dropout, drop_path=drop_path)


def mvit_v2_l_40x3(
    num_classes: int,
    num_frames: int = 40,
    size: int = 312,
    width: int = 144,
    dropout: float = 0.5,
    drop_path: float = 0.75,
) -> MViT:
    """Build MViTv2 L for 40 frames, 3 apart, of 312 pixels; its first stage has two heads."""
    return MViT(
        num_classes,
        (2, 6, 36, 4),
        num_frames,
        size,
        width,
        heads=2,
        dropout=dropout,
        drop_path=drop_path,
    )
