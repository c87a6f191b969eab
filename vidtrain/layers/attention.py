"""The block of a vision transformer: self-attention, then an MLP, each behind a norm and beside a shortcut.

Vaswani et al. "Attention Is All You Need." NeurIPS 2017. https://arxiv.org/abs/1706.03762
Dosovitskiy et al. "An Image is Worth 16x16 Words." ICLR 2021. https://arxiv.org/abs/2010.11929

    x = x + attn(norm1(x))      attn: of every head softmax(q k^T / sqrt(d)) v, side by side, then `proj`
    x = x + mlp(norm2(x))       mlp: fc1, GELU, fc2

Parameters have the names that these blocks have in most published weights: `norm1`, `attn.qkv`,
`attn.proj`, `norm2`, `mlp.fc1`, `mlp.fc2`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.drop_path import drop_path
from vidtrain.types import UserError

EPS = 1e-6  # of all layer norms, as in the first vision transformer

# What kernels for attention on a GPU take at once. Rows lie along an axis of a CUDA grid that has no more
# places; beyond, flash attention fails. Its backward is reported to fail where the sums of a gradient,
# tokens and channels rounded up, are more than 32 bits can number.
MOST_ROWS = 65_535
MOST_NUMBERS = 2**31
TOKENS, CHANNELS = 128, 32


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every query look at all keys of its row: (B, heads, N, d) each -> the same.

    More rows than a GPU's kernels take at once are taken in turns. Attention along time has one for each
    place of each clip.
    """
    heads, tokens, channels = q.shape[1:]
    row = heads * _round_up(tokens, TOKENS) * _round_up(channels, CHANNELS)
    most = max(1, min(MOST_ROWS, MOST_NUMBERS // row))
    if len(q) <= most:
        return F.scaled_dot_product_attention(q, k, v)
    parts = zip(q.split(most), k.split(most), v.split(most), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Attention(nn.Module):
    """Multi-head self-attention: every token looks at all tokens of its row.

    Args:
        dim: D, in and out.
        heads: How many; each has D / heads channels.
        key_bias: Whether keys have a bias, as queries and values do. It changes nothing but the length of
            `qkv.bias`: a number that all scores of a query share leaves their softmax as it is. Without,
            the two that are left are called `q_bias` and `v_bias`.

    Raises:
        UserError: the heads do not divide D.
    """

    def __init__(self, dim: int, heads: int, key_bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError(f"model.heads is {heads}; it must divide model.dim, {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        bias = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        # Taken apart where the three lie, so that their gradients are written there at once.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, d) each
        out = attend(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, for each token by itself.

    Args:
        dim: In.
        hidden: Between the two.
        out: Out; None for as many as come in.
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Self-attention and an MLP, each behind a norm and beside a shortcut.

    Args:
        dim: D.
        heads: Of the attention.
        hidden: Width of the MLP.
        key_bias: As of the attention.
        drop: Share of samples that skip a branch in training; each of the two is drawn for itself.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, key_bias: bool = True, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, hidden)
        self.drop_path = drop_path(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_linear(network: nn.Module) -> None:
    """Draw the weights of all linear layers from a Gaussian of 0.02, cut off at 2; biases start at zero."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
