"""Vision transformers of other projects, by the names of their tensors alone, as in named_net.py.

Tokens are (B, N, D). Attention is written out: products, softmax, sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from named_net import Net
from torch import Tensor

QKV = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def dense(net: Net, x: Tensor, name: str, out: int, bias: bool = True) -> Tensor:
    return net.linear(x.flatten(0, -2), name, out, bias).unflatten(0, x.shape[:-1])


def norm(net: Net, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
    weight = net.tensor(f"{name}.weight", x.shape[-1], low=0.5, high=1.5)
    return F.layer_norm(x, x.shape[-1:], weight, net.tensor(f"{name}.bias", x.shape[-1]), eps)


def one_qkv(net: Net, name: str) -> QKV:
    """Queries, keys and values out of one layer."""
    return lambda x: dense(net, x, name, 3 * x.shape[-1]).chunk(3, -1)


def three(net: Net, *names: str) -> QKV:
    """Queries, keys and values out of a layer each."""
    return lambda x: tuple(dense(net, x, name, x.shape[-1]) for name in names)


def no_key_bias(net: Net, name: str) -> QKV:
    """One layer, whose biases of queries and values are tensors of their own: BEiT's way."""

    def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dim = x.shape[-1]
        q, k, v = dense(net, x, f"{name}.qkv", 3 * dim, bias=False).chunk(3, -1)
        return q + net.tensor(f"{name}.q_bias", dim), k, v + net.tensor(f"{name}.v_bias", dim)

    return qkv


def attend(qkv: QKV, x: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv(x))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)


def block(net: Net, x: Tensor, name: str, qkv: QKV, heads: int, parts: dict[str, str]) -> Tensor:
    """A block; `parts` says what norm1, proj, norm2, fc1 and fc2 are called, and how GELU is computed."""
    seen = attend(qkv, norm(net, x, name + parts["norm1"]), heads)
    x = x + dense(net, seen, name + parts["proj"], x.shape[-1])
    inner = dense(net, norm(net, x, name + parts["norm2"]), name + parts["fc1"], 4 * x.shape[-1])
    inner = F.gelu(inner, approximate=parts.get("gelu", "none"))
    return x + dense(net, inner, name + parts["fc2"], x.shape[-1])


TIMM = {
    "norm1": "norm1",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def tubelets(net: Net, clip: Tensor, name: str, dim: int, box: tuple[int, int, int]) -> Tensor:
    """(B, 3, T, H, W) -> (B, N, D), by a convolution."""
    return net.conv(clip, name, dim, box, box, 0, bias=True).flatten(2).transpose(1, 2)


def patches(net: Net, clip: Tensor, name: str, dim: int, size: int) -> Tensor:
    """(B, 3, T, H, W) -> (B, T, S, D), by a convolution over each frame."""
    bound = (1 / size**2) ** 0.5
    weight = net.tensor(f"{name}.weight", dim, 3, size, size, low=-bound, high=bound)
    frames = clip.transpose(1, 2)
    maps = F.conv2d(frames.flatten(0, 1), weight, net.tensor(f"{name}.bias", dim), stride=size)
    return maps.flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])


def sincos(places: int, dim: int) -> Tensor:
    """The table of "Attention Is All You Need", a number at a time."""
    table = torch.empty(places, dim)
    for place in range(places):
        for i in range(0, dim, 2):
            angle = torch.tensor(place / 10000 ** (i / dim), dtype=torch.float64)
            table[place, i], table[place, i + 1] = angle.sin(), angle.cos()
    return table
