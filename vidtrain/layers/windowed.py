"""Sliding-window attention with one global token, at a cost that grows with N and not with its square.

Beltagy, Peters, Cohan. "Longformer: The Long-Document Transformer." 2020. https://arxiv.org/abs/2004.05150
(sections 3.1 and 3.2)

A token looks at itself, at `window` / 2 tokens on each side and at the global token, which stands in front.
The global token looks at all, through queries, keys and values of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.types import UserError


class WindowedAttention(nn.Module):
    """Multi-head attention of a sequence whose first token is global.

    Args:
        dim: D, in and out.
        heads: How many; each has D / heads channels.
        window: Tokens that one looks at beside itself, half of them on each side.
        dropout: Share of the attention's weights that are zero in training.

    Raises:
        UserError: the heads do not divide D, or the window is no even number above 0.
    """

    def __init__(self, dim: int, heads: int, window: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError(f"model.heads is {heads}; it must divide model.dim, {dim}")
        if not isinstance(window, int) or window < 2 or window % 2:
            raise UserError(
                f"model.window is {window}; it must be an even number, at least 2:"
                " half of it lies on each side of a token"
            )
        self.heads, self.reach, self.dropout = heads, window // 2, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.query_global = nn.Linear(dim, dim)
        self.key_global = nn.Linear(dim, dim)
        self.value_global = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + N, D) -> the same, N at least 1."""
        first, others = x[:, :1], x[:, 1:]
        drop = self.dropout if self.training else 0.0
        local = (self.query(others), self.key(x), self.value(x))
        seen = windowed(*map(self._split, local), self.reach, drop)
        whole = (self.query_global(first), self.key_global(x), self.value_global(x))
        q, k, v = (self._split(part).transpose(1, 2) for part in whole)
        over_all = F.scaled_dot_product_attention(q, k, v, dropout_p=drop).transpose(1, 2)
        return self.proj(torch.cat([over_all, seen], 1).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, heads, d)."""
        return x.unflatten(2, (self.heads, -1))


def windowed(q: Tensor, k: Tensor, v: Tensor, reach: int, dropout: float = 0.0) -> Tensor:
    """Let each token look at those up to `reach` away, and at the global one.

    The queries are cut into blocks of `reach`. All that a block can see lies in itself and the blocks
    beside it, so that each is a small attention of its own over 1 + 3 reach keys, most of them masked at
    its corners.

    Args:
        q: (B, N, heads, d), without the global token.
        k: (B, 1 + N, heads, d), the global token in front.
        v: As k.
        reach: Tokens on each side.
        dropout: Share of the weights that are zero.

    Returns:
        (B, N, heads, d).
    """
    batch, length = q.shape[:2]
    blocks = -(-length // reach)
    spare = blocks * reach - length
    q = F.pad(q, (0, 0, 0, 0, 0, spare)).unflatten(1, (blocks, reach)).flatten(0, 1)
    k, v = (_beside(part, blocks, reach) for part in (k, v))
    mask = _mask(length, blocks, reach, q.device).expand(batch, -1, -1, -1).flatten(0, 1)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B · blocks, heads, ..., d)
    out = F.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1), dropout_p=dropout)
    out = out.transpose(1, 2).unflatten(0, (batch, blocks)).flatten(1, 2)
    return out[:, :length]


def _beside(x: Tensor, blocks: int, reach: int) -> Tensor:
    """Give each block what it can see: (B, 1 + N, heads, d) -> (B · blocks, 1 + 3 reach, heads, d)."""
    spare = blocks * reach - (x.shape[1] - 1)
    padded = F.pad(x[:, 1:], (0, 0, 0, 0, reach, reach + spare))
    near = padded.unfold(1, 3 * reach, reach).movedim(-1, 2)  # (B, blocks, 3 reach, heads, d)
    first = x[:, None, :1].expand(-1, blocks, -1, -1, -1)
    return torch.cat([first, near], 2).flatten(0, 1)


def _mask(length: int, blocks: int, reach: int, device: torch.device) -> Tensor:
    """Say which keys of `_beside` a query sees: (blocks, reach, 1 + 3 reach), the global token always."""
    query = torch.arange(reach, device=device)[:, None]
    key = torch.arange(-reach, 2 * reach, device=device)  # counted from the block's first token
    place = key + reach * torch.arange(blocks, device=device)[:, None]
    there = (place >= 0) & (place < length)
    near = ((key - query).abs() <= reach) & there[:, None]
    return torch.cat([torch.ones_like(near[..., :1]), near], -1)
