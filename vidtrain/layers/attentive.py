"""Classifiers that measure a frozen network: a linear and an attentive probe.

linear      batch norm without scale and shift, then a linear layer. He et al. "Masked Autoencoders Are Scalable
            Vision Learners." CVPR 2022, appendix A.1. https://arxiv.org/abs/2111.06377
attentive   a learned query looks at all tokens, then an MLP and a linear layer. Bardes et al. "Revisiting
            Feature Prediction for Learning Visual Representations from Video." 2024 (V-JEPA), section 4.
            https://arxiv.org/abs/2404.08471

Of the attentive probe's two descriptions, the paper's and its code's, this is the code's: the layer norm
lies before the MLP and both branches have a shortcut. Left out is the linear layer that the code puts on the
query: of a learned vector it makes a learned vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtrain.layers.attention import EPS, MLP, init_linear
from vidtrain.types import UserError

PROBES = ("linear", "attentive")


class LinearProbe(nn.Module):
    """Batch norm without scale and shift, then a linear layer.

    Args:
        dim: D.
        num_classes: K.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, K).

        Raises:
            UserError: one clip alone in training, which has no variance.
        """
        if self.training and len(x) < 2:
            raise UserError(
                "model.probe=linear norms its inputs over a batch of at least two clips and got one;"
                " set data.batch_size=4 or more, as some batches have a clip less"
            )
        return self.linear(self.norm(x))


class AttentiveProbe(nn.Module):
    """A learned query that looks at all tokens, then an MLP and a linear layer.

        q = query + proj(softmax(query k^T / sqrt(d)) v)     k and v of the tokens, every head by itself
        q = q + mlp(norm(q))
        logits = linear(q)

    Args:
        dim: D of the tokens, which come in normed.
        heads: Of the attention; each has D / heads channels.
        num_classes: K.

    Raises:
        UserError: the heads do not divide D.
    """

    def __init__(self, dim: int, heads: int, num_classes: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UserError(f"model.heads is {heads}; it must divide model.dim, {dim}")
        self.heads = heads
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, 4 * dim)
        self.linear = nn.Linear(dim, num_classes)
        init_linear(self)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, K)."""
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query = self.query.expand(len(x), -1, -1)  # (B, 1, D)
        q = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        query = query + self.proj(seen)
        query = query + self.mlp(self.norm(query))
        return self.linear(query.squeeze(1))


def make_probe(kind: str, dim: int, heads: int, num_classes: int) -> nn.Module:
    """Make a probe: `linear` of the tokens' mean, `attentive` of the tokens; for 0 classes what changes nothing.

    Args:
        kind: One of the two.
        dim: D.
        heads: Of the attentive one.
        num_classes: K.

    Raises:
        UserError: there is no such probe.
    """
    check_probe(kind)
    if not num_classes:
        return nn.Identity()
    if kind == "attentive":
        return AttentiveProbe(dim, heads, num_classes)
    return LinearProbe(dim, num_classes)


def check_probe(kind: str | None) -> None:
    """Refuse what is no probe.

    Raises:
        UserError: it is none.
    """
    if kind is not None and kind not in PROBES:
        raise UserError(
            f"model.probe is {kind!r}; it is one of {', '.join(PROBES)}, or null for the paper's classifier"
        )


def pooled(tokens: Tensor, head: nn.Module) -> Tensor:
    """Give a classifier what it takes: all tokens (B, N, D) to an attentive probe, else their mean (B, D)."""
    return tokens if isinstance(head, AttentiveProbe) else tokens.mean(1)
