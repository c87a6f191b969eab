"""How each operation moves footprints on.

A rule takes the call and the footprints of its tensor arguments that have one, and returns the
footprint of the result: one for all results, a list where they differ, or None when every unit of
the result must be taken to see the whole input. An operation without a rule is elementwise if the
shapes allow it.

Statistics of normalisation layers are not counted. A softmax is elementwise here: in attention, the
product that follows it does the mixing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from vidtrain.trace.footprint import (
    AXES,
    Atom,
    Dim,
    Footprint,
    Span,
    Spans,
    Tokens,
    atoms_on_axes,
    broadcast,
    broadcasts,
    grow,
    length,
    on_axis,
    only_atom,
    plain,
    regroup,
    shift,
    travel,
    union,
)

aten = torch.ops.aten

Result = Footprint | list[Footprint | None] | None


class Call:
    """One operation: its arguments by name, defaults filled in, and its result."""

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        see: Callable[[Any], Footprint | None],
    ) -> None:
        self.operation = func.overloadpacket
        self.see = see  # tensor -> its footprint, None for a weight or a constant
        self.out = out
        self.outs: list[Any] = list(out) if isinstance(out, (tuple, list)) else [out]
        declared = func._schema.arguments
        self.arguments = {a.name: a.default_value for a in declared if a.has_default_value()}
        self.arguments.update(zip((a.name for a in declared), args, strict=False))
        self.arguments.update(kwargs)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument that only some overloads have."""
        return self.arguments.get(name, default)

    @property
    def shape(self) -> list[int]:
        """Size of the (first) result."""
        return list(self.outs[0].shape)


# They take the size of a tensor, or its type, and none of its values.
CONSTANTS = {
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.rand_like,
    aten.randn_like, aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full,
    aten.new_empty_strided, aten.zero_, aten.fill_,
}  # fmt: skip

Rule = Callable[[Call, Sequence[Footprint]], Result]
_RULES: dict[Any, Rule] = {}


def rule_for(operation: Any) -> Rule:
    """Return the rule of an operation (an overload packet of `torch.ops`)."""
    return _RULES.get(operation, _elementwise)


def _rule(*operations: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


def _elementwise(call: Call, known: Sequence[Footprint]) -> Result:
    results: list[Footprint | None] = []
    for out in call.outs:
        shape = list(out.shape) if isinstance(out, Tensor) else []
        fits = all(broadcasts(footprint.shape, shape) for footprint in known)
        results.append(broadcast(known, shape) if fits else None)
    return results


@_rule(
    aten.gather, aten.topk, aten.grid_sampler_2d, aten.grid_sampler_3d, aten.as_strided,
    aten._fft_r2c, aten._fft_c2c, aten._fft_c2r, aten.scatter, aten.im2col, aten.col2im,
)  # fmt: skip
def _anything(call: Call, known: Sequence[Footprint]) -> Result:
    return None


def _numbers(value: Any, count: int = 1) -> list[int]:
    """Spell out `3` or `[3]` as `[3, 3, 3]`."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * count if len(values) == 1 else values


@_rule(aten.convolution)
def _convolution(call: Call, known: Sequence[Footprint]) -> Result:
    x, kernel = call.see(call["input"]), list(call["weight"].shape[2:])
    if x is None or len(known) > 1:  # its weights were computed from the input
        return None
    n = len(kernel)
    settings = (_numbers(call[key], n) for key in ("stride", "padding", "dilation"))
    for i, (k, s, p, d) in enumerate(zip(kernel, *settings, strict=True)):
        wide, size = (k - 1) * d + 1, call.shape[i + 2]
        if call["transposed"]:
            x = x.slide(i + 2, size, math.ceil(wide / s), 1 / s, (wide - 1 - p) / s)
        else:
            x = x.slide(i + 2, size, wide, s, p)
    return x.dissolve(1, call.shape[1])  # time folded into channels ends here


POOLS = {
    aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d,
    aten.max_pool2d_with_indices, aten.max_pool3d_with_indices,
    aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d,
    aten.adaptive_max_pool2d, aten.adaptive_max_pool3d,
}  # fmt: skip


@_rule(*POOLS)
def _pool(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    adaptive = call.get("output_size")
    n = len(call["kernel_size"] if adaptive is None else adaptive)
    for i in range(n):
        at = len(x.dims) - n + i
        before, size = length(x.dims[at]), call.shape[at]
        if adaptive is None:
            kernel = _numbers(call["kernel_size"], n)[i]
            stride = _numbers(call["stride"] or call["kernel_size"], n)[i]
            dilation = _numbers(call.get("dilation", 1), n)[i]
            padding = _numbers(call["padding"], n)[i]
            x = x.slide(at, size, (kernel - 1) * dilation + 1, stride, padding)
        elif before % size == 0:
            x = x.slide(at, size, before // size, before // size, 0)
        else:  # windows of two sizes that overlap
            x = x.slide(at, size, math.ceil(before / size) + 1, before / size, 0)
    return x


@_rule(
    aten.constant_pad_nd,
    aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
    aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d,
)  # fmt: skip
def _pad(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    pad = call.get("pad") or call["padding"]
    for i, before in enumerate(pad[::2]):
        at = len(x.dims) - 1 - i
        if call.shape[at] != length(x.dims[at]):
            x = x.slide(at, call.shape[at], 1, 1, before)
    return x


# How many places of the input, along each axis, make one of the output.
_TAPS = {
    aten.upsample_nearest1d: 1, aten.upsample_nearest2d: 1, aten.upsample_nearest3d: 1,
    aten._upsample_nearest_exact1d: 1, aten._upsample_nearest_exact2d: 1,
    aten._upsample_nearest_exact3d: 1,
    aten.upsample_linear1d: 2, aten.upsample_bilinear2d: 2, aten.upsample_trilinear3d: 2,
    aten._upsample_bilinear2d_aa: 2, aten.upsample_bicubic2d: 4,
}  # fmt: skip


@_rule(*_TAPS)
def _interpolate(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    for at in range(2, len(x.dims)):
        before, size = length(x.dims[at]), call.shape[at]
        if before != size:
            taps = _TAPS[call.operation]
            x = x.slide(at, size, taps, before / size, (taps - 1) / 2)
    return x


REDUCTIONS = {
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.var, aten.std, aten.prod,
    aten.logsumexp, aten.var_mean, aten.std_mean, aten.linalg_vector_norm, aten.any, aten.all,
    aten.argmax, aten.argmin, aten.median,
}  # fmt: skip


@_rule(*REDUCTIONS)
def _reduce(call: Call, known: Sequence[Footprint]) -> Result:
    if call.get("other") is not None:  # max(x, y)
        return _elementwise(call, known)
    (x,) = known
    dim = call.get("dim")
    rank = len(x.dims)
    gone = range(rank) if dim in (None, []) else [at % rank for at in _numbers(dim)]
    spans = grow(x.spans, [x.dims[at] for at in gone])
    dims: list[Dim] = []
    for at, kept in enumerate(x.dims):
        if at not in gone:
            dims.append(kept)
        elif call.get("keepdim"):
            dims.append(tuple(a._replace(size=1) for a in atoms_on_axes([kept])) or plain(1))
    return Footprint(tuple(dims), spans)


@_rule(aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin, aten.sort)
def _accumulate(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    return Footprint(x.dims, grow(x.spans, [x.dims[call["dim"]]]))


@_rule(aten.view, aten._unsafe_view, aten._reshape_alias)
def _view(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    dims = regroup(x.dims, call.shape)
    return None if dims is None else x.with_dims(dims)


@_rule(aten.unsqueeze)
def _unsqueeze(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    at = call["dim"] % (len(x.dims) + 1)
    return x.with_dims((*x.dims[:at], plain(1), *x.dims[at:]))


@_rule(aten.squeeze)
def _squeeze(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    rank, dim = len(x.dims), call.get("dim")
    chosen = range(rank) if dim is None else [at % rank for at in _numbers(dim)]
    return x.with_dims(d for at, d in enumerate(x.dims) if at not in chosen or length(d) > 1)


@_rule(aten.permute, aten.transpose, aten.t)
def _permute(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    order = list(range(len(x.dims)))
    if call.operation is aten.permute:
        order = [at % len(order) for at in call["dims"]]
    elif call.operation is aten.transpose:
        a, b = call["dim0"], call["dim1"]
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return x.with_dims(x.dims[at] for at in order)


@_rule(aten.repeat)
def _repeat(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    times = call["repeats"]
    added = len(times) - len(x.dims)
    x = x.with_dims([*(plain(1) for _ in range(added)), *x.dims])
    for at, n in enumerate(times):
        if n != 1:
            x = x.dissolve(at, n * length(x.dims[at]))
    return x


@_rule(aten.select, aten.unbind)
def _select(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    at = call["dim"] % len(x.dims)
    size = length(x.dims[at])
    kept = (*x.dims[:at], *x.dims[at + 1 :])
    if call.operation is aten.unbind:
        return [Footprint(kept, _at_place(x, at, place)) for place in range(size)]
    return Footprint(kept, _at_place(x, at, call["index"] % size))


def _at_place(x: Footprint, at: int, index: int) -> Spans:
    """See what one place of a dimension sees."""
    spans = x.spans
    for part in reversed(x.dims[at]):
        index, place = divmod(index, part.size)
        if isinstance(part, Tokens):
            place = max(place - part.extra, 0)
        for atom in reversed(part.atoms if isinstance(part, Tokens) else (part,)):
            place, here = divmod(place, atom.size)
            spans = shift(spans, atom.axis, here * atom.step)
    return spans


@_rule(aten.slice, aten.split, aten.split_with_sizes, aten.unsafe_split)
def _slice(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    at = call["dim"] % len(x.dims)
    if call.operation is aten.slice:
        start = slice_start(call, length(x.dims[at]))
        return _cut(x, at, start, call.shape[at], call["step"])
    start, parts = 0, []
    for out in call.outs:
        parts.append(_cut(x, at, start, out.shape[at], 1))
        start += out.shape[at]
    return parts


def slice_start(call: Call, size: int) -> int:
    """Find the first place that a slice keeps of a dimension."""
    start = call["start"] or 0
    return max(start + size, 0) if start < 0 else min(start, size)


def _cut(x: Footprint, at: int, start: int, size: int, step: int) -> Footprint:
    """Keep `size` places of a dimension, every `step`-th from `start` on."""
    dim = x.dims[at]
    first, inner = dim[0], length(dim[1:])
    if size == length(dim):
        return x
    if len(dim) == 1 and isinstance(first, Tokens) and step == 1:
        if size == first.size - first.extra:  # the class token is taken off
            return x.with_dim(at, first.atoms)
        if size <= first.extra:
            return x.with_dim(at, plain(size))
    if atom := only_atom(dim):
        spans = shift(x.spans, atom.axis, start * atom.step)
        return x.with_dim(at, (Atom(atom.axis, size, atom.step * step),), spans)
    if isinstance(first, Atom) and step == 1 and start % inner == 0 and size % inner == 0:
        spans = shift(x.spans, first.axis, start // inner * first.step)
        return x.with_dim(at, (first._replace(size=size // inner), *dim[1:]), spans)
    return x.dissolve(at, size)


@_rule(aten.flip)
def _flip(call: Call, known: Sequence[Footprint]) -> Result:
    (x,) = known
    for dim in call["dims"]:
        at = dim % len(x.dims)
        if atom := only_atom(x.dims[at]):
            spans = shift(x.spans, atom.axis, (atom.size - 1) * atom.step)
            x = x.with_dim(at, (atom._replace(step=-atom.step),), spans)
        elif on_axis(x.dims[at]):
            x = x.dissolve(at, length(x.dims[at]))
    return x


@_rule(aten.roll)
def _roll(call: Call, known: Sequence[Footprint]) -> Result:
    """Shift along a dimension; what comes round at the other end is overlooked."""
    (x,) = known
    for dim, by in zip(_numbers(call["dims"]), _numbers(call["shifts"]), strict=True):
        if atom := only_atom(x.dims[dim % len(x.dims)]):
            x = Footprint(x.dims, shift(x.spans, atom.axis, -by * atom.step))
    return x


@_rule(aten.index_select, aten.index)
def _index(call: Call, known: Sequence[Footprint]) -> Result:
    """Pick places by number; the numbers are not known, so take them to be spread evenly."""
    x = call.see(call["self"])
    if call.operation is aten.index:
        chosen = [(at, index) for at, index in enumerate(call["indices"]) if index is not None]
    else:
        chosen = [(call["dim"], call["index"])]
    if x is None or len(known) > 1 or len(chosen) > 1 or chosen[0][1].ndim > 1:
        return None
    at = chosen[0][0] % len(x.dims)
    before, size = length(x.dims[at]), call.shape[at]
    if atom := only_atom(x.dims[at]):
        return x.with_dim(at, (Atom(atom.axis, size, atom.step * before / size),))
    return x if before == size else x.dissolve(at, size)


@_rule(aten.unfold)
def _unfold(call: Call, known: Sequence[Footprint]) -> Result:
    """Cut a dimension into windows that may overlap; the places in a window come last."""
    (x,) = known
    at = call["dimension"] % len(x.dims)
    atom = only_atom(x.dims[at])
    if atom is None:
        return None
    windows = (Atom(atom.axis, call.shape[at], atom.step * call["step"]),)
    places = (Atom(atom.axis, call["size"], atom.step),)
    return x.with_dims((*x.dims[:at], windows, *x.dims[at + 1 :], places))


@_rule(aten.stack)
def _stack(call: Call, known: Sequence[Footprint]) -> Result:
    """Stack; where each part saw a frame further on, as in a loop over time, time is back."""
    count, at = len(call["tensors"]), call["dim"] % len(call.shape)
    joined = broadcast(known, [*call.shape[:at], *call.shape[at + 1 :]])
    new, spans = plain(count), list(joined.spans)
    for i, axis in enumerate(AXES):
        gone = all(atom.axis != axis for part in known for atom in atoms_on_axes(part.dims))
        own = [part.spans[i] for part in known]
        for places in ([s.first for s in own], [s.first + s.size for s in own]):
            steps = [b - a for a, b in pairwise(places)]
            if gone and count == len(known) and not on_axis(new) and steps and min(steps) > 0:
                new = (Atom(axis, count, sum(steps) / len(steps)),)
                spans[i] = Span(own[0].first, max(s.size for s in own))
    t, h, w = spans
    return Footprint((*joined.dims[:at], new, *joined.dims[at:]), (t, h, w))


@_rule(aten.cat)
def _cat(call: Call, known: Sequence[Footprint]) -> Result:
    at = call["dim"] % len(call.shape)
    total = call.shape[at]
    placed, start = [], 0  # the parts that lie on an axis here, and where they start
    for tensor in call["tensors"]:
        part = call.see(tensor)
        if part is not None and on_axis(part.dims[at]):
            placed.append((start, part))
        start += tensor.shape[at] if tensor.ndim == len(call.shape) else 0
    if not placed:  # channels, most often
        flat = [part.with_dim(at, plain(1)) for part in known]
        shape = [*call.shape[:at], 1, *call.shape[at + 1 :]]
        return broadcast(flat, shape).with_dim(at, plain(total))
    base = placed[0][1]
    atom = only_atom(base.dims[at])
    others = [only_atom(part.dims[at]) for _, part in placed]
    if atom and all(o and (o.axis, o.step) == (atom.axis, atom.step) for o in others):
        dim = (atom._replace(size=total),)  # frames after frames, or padding around them
        moved = [
            part.with_dim(at, dim, shift(part.spans, atom.axis, -begin * atom.step))
            for begin, part in placed
        ]
        return Footprint(base.with_dim(at, dim).dims, union(moved))
    if len(placed) == 1:
        atoms = tuple(atoms_on_axes([base.dims[at]]))
        places = math.prod(a.size for a in atoms)
        if all(isinstance(p, Tokens) or p.axis in AXES for p in base.dims[at]):
            return base.with_dim(at, (Tokens(atoms, total - places),))
    mixed = [part.dissolve(at, total) for _, part in placed]
    return Footprint(mixed[0].dims, union(mixed))


_PRODUCTS = {
    aten.mm: ("self", "mat2"),
    aten.bmm: ("self", "mat2"),
    aten.addmm: ("mat1", "mat2"),
    aten.baddbmm: ("batch1", "batch2"),
}


@_rule(*_PRODUCTS)
def _matmul(call: Call, known: Sequence[Footprint]) -> Result:
    a, b = (call.see(call[name]) for name in _PRODUCTS[call.operation])
    parts = []
    if a:
        grown = grow(a.spans, a.dims[-1:])
        parts.append(Footprint((*a.dims[:-1], plain(1)), grown))
    if b:
        grown = grow(b.spans, b.dims[-2:-1])
        parts.append(Footprint((*b.dims[:-2], plain(1), b.dims[-1]), grown))
    if not parts:
        return None
    out = broadcast(parts, call.shape)
    if a:
        out = _attend(out, a, b, a.dims[-2], a.dims[-1])
    if b:
        out = _attend(out, b, a, b.dims[-1], b.dims[-2])
    return out


def _attend(
    out: Footprint, weights: Footprint, values: Footprint | None, queries: Dim, keys: Dim
) -> Footprint:
    """Correct the axes that queries and keys share.

    Weights between places of one axis sum over the keys. A query then sees from the first key of
    its window to the last, wherever in the window it lies; that window is drawn around the query.
    """
    spans = list(out.spans)
    for i, axis in enumerate(AXES):
        shared = all(
            any(atom.axis == axis for atom in atoms_on_axes([dim])) for dim in (queries, keys)
        )
        if shared:
            seen = [part.spans[i] for part in (weights, values) if part]
            reach = abs(travel([keys], axis))
            spans[i] = Span(seen[-1].first - reach / 2, max(s.size for s in seen) + reach)
    t, h, w = spans
    return Footprint(out.dims, (t, h, w))


@_rule(
    aten._scaled_dot_product_flash_attention_for_cpu,  # torch 2.11 does not count it
    *(op for op in flop_registry if "scaled_dot_product" in str(op)),
)
def _scaled_dot_product(call: Call, known: Sequence[Footprint]) -> Result:
    """Attention as one operation, as some versions and devices have it."""
    q, k, v = (call.see(call[name]) for name in ("query", "key", "value"))
    if not (q and k and v):
        return None
    pooled = [part.dissolve(len(part.dims) - 2, 1) for part in (k, v)]
    dims = (*q.dims[:-1], v.dims[-1])
    out = Footprint(dims, union([q, *pooled]))
    return [_attend(out, q, v, q.dims[-2], k.dims[-2])] + [None] * (len(call.outs) - 1)
