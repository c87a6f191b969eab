"""The non-local block: each place of a map looks at all places of all frames.

Wang, Girshick, Gupta, He. "Non-local Neural Networks." CVPR 2018. https://arxiv.org/abs/1711.07971

    z_i = x_i + norm(out(y_i))      y_i = sum over j of w(x_i, x_j) g(x_j)

(section 3; theta, phi, g and out are convolutions of one place, the first three to half the channels.)
What is called `pairwise` is how w comes about, with N places j:

    embedded_gaussian   softmax over j of theta_i . phi_j / sqrt(C / 2), as self-attention
    gaussian            softmax over j of x_i . x_j; without theta and phi
    dot_product         theta_i . phi_j / N
    concatenation       relu(pair . [theta_i, phi_j]) / N

With `pool`, the places j are those of the map after a max pool (section 3.3); y keeps its size.

Departs from the paper: the embedded Gaussian has the scale of self-attention, as the code that the
paper's numbers were made with has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.types import UserError

PAIRWISE = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")


class NonLocal(nn.Module):
    """A block to put behind any other: it starts as the identity, since the norm's scale starts at 0.

    Until that scale has moved, no gradient reaches what lies before it: theta, phi, g and out.

    Args:
        dim: Channels, in and out.
        pairwise: How the weights come about, as above.
        pool: Kernel and stride in t, h, w of the max pool before phi and g; None for all places.

    Raises:
        UserError: there is no such pairwise function.
    """

    def __init__(
        self, dim: int, pairwise: str = "embedded_gaussian", pool: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if pairwise not in PAIRWISE:
            raise UserError(
                f"model.non_local is '{pairwise}'; it must be null or one of {', '.join(PAIRWISE)}"
            )
        self.pairwise = pairwise
        self.pool = None if pool is None else tuple(pool)
        inner = dim // 2
        if pairwise != "gaussian":
            self.theta = nn.Conv3d(dim, inner, 1)
            self.phi = nn.Conv3d(dim, inner, 1)
        self.g = nn.Conv3d(dim, inner, 1)
        if pairwise == "concatenation":
            self.pair = nn.Parameter(torch.empty(2, inner))  # what meets theta, and phi
        self.out = nn.Conv3d(inner, dim, 1)
        self.norm = nn.BatchNorm3d(dim)
        self._init_weights()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same."""
        others = x
        if self.pool is not None:  # a map that is smaller than the kernel is pooled whole
            kernel = [min(k, n) for k, n in zip(self.pool, x.shape[2:], strict=True)]
            others = F.max_pool3d(x, kernel)
        if self.pairwise == "gaussian":
            query, key = _places(x), _places(others)
        else:
            query, key = _places(self.theta(x)), _places(self.phi(others))
        y = self._look(query, key, _places(self.g(others)))
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm(self.out(y))

    def _look(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, M, D), (B, N, D), (B, N, E) -> (B, M, E)."""
        if self.pairwise in ("embedded_gaussian", "gaussian"):
            scale = None if self.pairwise == "embedded_gaussian" else 1.0
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)  # one head
            return F.scaled_dot_product_attention(query, key, value, scale=scale).squeeze(1)
        value = value / value.shape[1]
        if self.pairwise == "concatenation":
            rows, columns = query @ self.pair[0], key @ self.pair[1]  # (B, M), (B, N)
            return F.relu(rows.unsqueeze(2) + columns.unsqueeze(1)) @ value
        # Nothing lies between the two products, so they can be taken from the right: where the map is
        # large that is many times fewer multiply-adds, and no (M, N). Where it gains less than half,
        # they stay as they are written, which published counts are of.
        m, n, d, e = query.shape[1], key.shape[1], key.shape[2], value.shape[2]
        if 2 * (m * d * e + n * d * e) < m * n * d + m * n * e:
            return query @ (key.transpose(1, 2) @ value)
        return (query @ key.transpose(1, 2)) @ value

    def _init_weights(self) -> None:
        """Gaussians of 0.01, no biases, and a norm that lets nothing through (section 4.1)."""
        for module in self.children():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        if self.pairwise == "concatenation":
            nn.init.normal_(self.pair, std=0.01)
        nn.init.zeros_(self.norm.weight)


def _places(x: Tensor) -> Tensor:
    """(B, D, T, H, W) -> (B, T·H·W, D), without a copy."""
    return x.flatten(2).transpose(1, 2)


def non_local_blocks(
    dim: int, pairwise: str | None, at: Sequence[int], pool: Sequence[int] | None
) -> dict[int, nn.Module]:
    """Make a stage's non-local blocks, by the number of the block that each comes after.

    `pairwise=None` makes none.
    """
    if pairwise is None:
        return {}
    return {number: NonLocal(dim, pairwise, pool) for number in at}
