"""Where time, height and width lie in a tensor, and what its units see of the input.

Notation: an *atom* is a factor of a dimension. Channels are one atom, `(b t)` is two, and the
tokens `(t h w)` of a transformer are three. An atom on an axis knows how many units of the input
lie between its places, so windows, strides and folding need no other bookkeeping.

What a unit sees is counted as if the input had no borders: the textbook receptive field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

AXES = ("T", "H", "W")


class Atom(NamedTuple):
    """A factor of a dimension: `size` places on one axis, `step` input units apart."""

    axis: str  # "T", "H", "W"; "B" for the batch; "" for channels and everything else
    size: int
    step: float = 0.0


class Tokens(NamedTuple):
    """Places on several axes, and `extra` tokens beside them, such as a class token."""

    atoms: tuple[Atom, ...]
    extra: int

    @property
    def size(self) -> int:
        """Count the tokens."""
        return math.prod(atom.size for atom in self.atoms) + self.extra


Dim = tuple[Atom | Tokens, ...]


class Span(NamedTuple):
    """What the first unit sees of one axis of the input: `size` units, from `first` on."""

    first: float
    size: float


Spans = tuple[Span, Span, Span]  # for T, H, W


@dataclass(frozen=True)
class Footprint:
    """Where the axes of the input lie in a tensor, and what its units see of them."""

    dims: tuple[Dim, ...]
    spans: Spans

    @property
    def shape(self) -> list[int]:
        """Size of every dimension."""
        return [length(dim) for dim in self.dims]

    def with_dim(self, at: int, dim: Dim, spans: Spans | None = None) -> Footprint:
        """Replace one dimension, and what the units see if it changes."""
        return Footprint((*self.dims[:at], dim, *self.dims[at + 1 :]), spans or self.spans)

    def with_dims(self, dims: Iterable[Dim]) -> Footprint:
        """Replace the dimensions; the units see what they saw."""
        return replace(self, dims=tuple(dims))

    def dissolve(self, at: int, size: int) -> Footprint:
        """Mix all along a dimension and forget which place was where."""
        return self.with_dim(at, plain(size), grow(self.spans, [self.dims[at]]))

    def slide(self, at: int, size: int, kernel: float, stride: float, padding: float) -> Footprint:
        """Slide a window along a dimension: `kernel` places wide, dilation included."""
        atom = only_atom(self.dims[at])
        if atom is None:
            same = kernel == 1 and size == length(self.dims[at])
            return self if same else self.dissolve(at, size)
        spans = shift(self.spans, atom.axis, -padding * atom.step, (kernel - 1) * abs(atom.step))
        return self.with_dim(at, (Atom(atom.axis, size, atom.step * stride),), spans)


def of_input(shape: Sequence[int]) -> Footprint:
    """`(B, C, T, H, W)`, `(B, C, H, W)` or `(B, C, T)`: every unit sees itself."""
    axes = {5: ("B", "", "T", "H", "W"), 4: ("B", "", "H", "W"), 3: ("B", "", "T")}[len(shape)]
    dims = tuple((Atom(axis, n, 1.0),) for axis, n in zip(axes, shape, strict=True))
    return Footprint(dims, (Span(0, 1), Span(0, 1), Span(0, 1)))


def of_everything(shape: Sequence[int], extents: Sequence[int]) -> Footprint:
    """No axis is left, and every unit sees the whole input."""
    t, h, w = (Span(0, extent) for extent in extents)
    return Footprint(tuple(plain(size) for size in shape), (t, h, w))


def plain(size: int) -> Dim:
    """Make a dimension that lies on no axis."""
    return (Atom("", size),)


def length(dim: Dim) -> int:
    """Count the places of a dimension."""
    return math.prod(part.size for part in dim)


def atoms_on_axes(dims: Iterable[Dim]) -> Iterator[Atom]:
    """Yield the atoms that lie on T, H or W."""
    for dim in dims:
        for part in dim:
            for atom in part.atoms if isinstance(part, Tokens) else (part,):
                if atom.axis in AXES:
                    yield atom


def on_axis(dim: Dim) -> bool:
    """Is there time, height or width in a dimension?"""
    return any(True for _ in atoms_on_axes([dim]))


def only_atom(dim: Dim) -> Atom | None:
    """Return the one atom of a dimension that is time, height or width and nothing else."""
    parts = [part for part in dim if part.size > 1] or list(dim[:1])
    if len(parts) == 1 and isinstance(parts[0], Atom) and parts[0].axis in AXES:
        return parts[0]
    return None


def travel(dims: Iterable[Dim], axis: str) -> float:
    """How far apart the first and the last unit are on an axis, in units of the input."""
    return sum((atom.size - 1) * atom.step for atom in atoms_on_axes(dims) if atom.axis == axis)


def grow(spans: Spans, dims: Iterable[Dim]) -> Spans:
    """Let every unit see all that lies along `dims`."""
    for atom in atoms_on_axes(dims):
        reach = (atom.size - 1) * atom.step
        spans = shift(spans, atom.axis, min(reach, 0), abs(reach))
    return spans


def shift(spans: Spans, axis: str, by: float, wider: float = 0) -> Spans:
    """Move what is seen of one axis, and widen it."""
    t, h, w = (
        Span(span.first + by, span.size + wider) if name == axis else span
        for name, span in zip(AXES, spans, strict=True)
    )
    return t, h, w


def union(parts: Sequence[Footprint]) -> Spans:
    """See what any of the parts sees.

    Where an axis is gone from one part and alive in another (a global context added to a map), the
    two move against each other, so they are compared at both ends of the axis.
    """
    spans = []
    for i, axis in enumerate(AXES):
        firsts = [part.spans[i].first for part in parts]
        lasts = [part.spans[i].first + part.spans[i].size for part in parts]
        moves = [travel(part.dims, axis) for part in parts]
        at_start = max(lasts) - min(firsts)
        at_end = max(map(sum, zip(lasts, moves, strict=True))) - min(
            map(sum, zip(firsts, moves, strict=True))
        )
        spans.append(Span(min(firsts), max(at_start, at_end)))
    t, h, w = spans
    return t, h, w


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Would a tensor of this shape be stretched to that one?"""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, other) for size, other in pairs)


def broadcast(parts: Sequence[Footprint], shape: Sequence[int]) -> Footprint:
    """Combine place by place, by the rules of broadcasting."""
    dims = []
    for i, size in enumerate(shape):
        back = len(shape) - i  # counted from the right, as broadcasting does
        here = [part.dims[-back] for part in parts if len(part.dims) >= back]
        here = [dim for dim in here if length(dim) == size]
        dims.append(([dim for dim in here if on_axis(dim)] + here + [plain(size)])[0])
    return Footprint(tuple(dims), union(parts))


def regroup(dims: Iterable[Dim], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """Regroup the atoms, in row-major order, into dimensions of the given sizes.

    Returns:
        None when a dimension would hold a part of an atom that is no factor of it.
    """
    parts = [part for dim in dims for part in dim]
    result = []
    for i, size in enumerate(shape):
        dim: list[Atom | Tokens] = []
        while (want := size // length(tuple(dim))) > 1:
            if not parts:
                return None
            part = parts.pop(0)
            if want % part.size == 0:
                dim.append(part)
            elif isinstance(part, Atom) and part.size % want == 0:
                inner = part.size // want
                dim.append(Atom(part.axis, want, part.step * inner))
                parts.insert(0, Atom(part.axis, inner, part.step))
            else:
                return None
        # Atoms of size 1 fit anywhere: dimensions of size 1 take them from the left, and what
        # finds no place further on stays here.
        ones, room = _leading_ones([p.size for p in parts]), _leading_ones(shape[i + 1 :])
        keep = max(ones - room, min(ones, 1) if size == 1 else 0)
        dim += parts[:keep]
        del parts[:keep]
        result.append(_fuse(dim))
    return None if parts else tuple(result)


def _leading_ones(sizes: Sequence[int]) -> int:
    return next((n for n, size in enumerate(sizes) if size != 1), len(sizes))


def _fuse(parts: Sequence[Atom | Tokens]) -> Dim:
    """Join neighbours that a view had split: windows and places in them are one axis again."""
    dim: list[Atom | Tokens] = []
    for part in parts:
        last = dim[-1] if dim else None
        if (
            isinstance(part, Atom)
            and isinstance(last, Atom)
            and part.axis == last.axis
            and (not part.axis or math.isclose(last.step, part.size * part.step))
        ):
            dim[-1] = Atom(part.axis, last.size * part.size, part.step)
        else:
            dim.append(part)
    return tuple(dim) or plain(1)
