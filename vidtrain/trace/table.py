"""Walk a network layer by layer: output sizes, receptive fields, parameters, multiply-adds.

The network runs once on the meta device, so nothing is computed. A dispatch mode sees every
operation, counts its multiply-adds, and keeps beside each tensor what its units see of the input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from vidtrain.trace.footprint import (
    AXES,
    Atom,
    Dim,
    Footprint,
    atoms_on_axes,
    broadcast,
    length,
    of_everything,
    of_input,
    only_atom,
    plain,
    shift,
    travel,
)
from vidtrain.trace.rules import CONSTANTS, POOLS, REDUCTIONS, Call, rule_for, slice_start

aten = torch.ops.aten

# Operations that join two paths through the network.
_JOINS = {
    aten.add, aten.add_, aten.sub, aten.mul, aten.mul_, aten.cat, aten.stack, aten.maximum,
}  # fmt: skip
_NAMES = {
    aten.convolution: "conv", aten.addmm: "linear", aten.mm: "linear",
    aten.bmm: "matmul", aten.baddbmm: "matmul",
    aten.max_pool2d_with_indices: "max_pool2d", aten.max_pool3d_with_indices: "max_pool3d",
}  # fmt: skip


@dataclass
class Layer:
    """One row of the table.

    Attributes:
        name: Path of the module; where an operation is meant, its name is the last part.
        type: Class of the module, or name of the operation.
        output: Size without the batch: `[C, T, H, W]`, less the axes that are gone.
        receptive_field: `[T, H, W]` of the input that one unit sees; zeros if it sees none.
        params: Parameters, each counted at the first layer that holds it.
        macs: Multiply-adds of all its calls, for one clip.
    """

    name: str
    type: str
    output: list[int]
    receptive_field: list[int]
    params: int = 0
    macs: int = 0


def layer_table(model: nn.Module, *input_shapes: Sequence[int]) -> list[Layer]:
    """List every layer in the order of its first call, as the network runs at test time.

    A layer is a module without children, or an operation that a larger module does by itself (a
    residual add, a concatenation, a product in attention). One that is called several times is one
    row: its last output, its widest receptive field, the multiply-adds of all calls. The sums over
    the rows are the network's parameters and half of what
    `torch.utils.flop_counter.FlopCounterMode` counts.

    Args:
        model: On any device; it is left as it was. On the meta device it costs no memory.
        input_shapes: `(C, T, H, W)` of each input, without the batch; an image is `(C, H, W)`, a
            sequence of features `(C, T)`.
    """
    inputs = [torch.empty(1, *shape, device="meta") for shape in input_shapes]
    state = {
        name: tensor.detach().to("meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    footprints = [of_input(tensor.shape) for tensor in inputs]
    extents = [int(max(travel(f.dims, axis) for f in footprints)) + 1 for axis in AXES]
    tracer = _Tracer(model, state, extents)
    tracer.seen.update(zip(inputs, footprints, strict=True))
    training = model.training
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide attention in one opaque call
    try:
        model.eval()
        with torch.no_grad(), tracer.hooks(), tracer:
            torch.func.functional_call(model, state, tuple(inputs))
    finally:
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return tracer.table()


@dataclass
class _Frame:
    """A module that is being called."""

    name: str
    module: nn.Module
    whole: bool  # one row for all that happens inside
    operations: Counter[str] = field(default_factory=Counter)


class _Tracer(TorchDispatchMode):
    def __init__(self, model: nn.Module, state: dict[str, Tensor], extents: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.extents = extents
        self.rows: dict[str, Layer] = {}
        self.frames: list[_Frame] = []
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> Footprint
        self.slices: WeakIdKeyDictionary = WeakIdKeyDictionary()  # slice -> the call that cut it
        self.holder: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weight -> its full name
        for name, tensor in state.items():
            self.holder[tensor] = name
        self.unclaimed = {name: p.numel() for name, p in model.named_parameters()}
        # A shared parameter has several names; it is listed under the first.
        first: dict[int, str] = {}
        every = model.named_parameters(remove_duplicate=False)
        self.first_name = {name: first.setdefault(id(p), name) for name, p in every}

    # rows

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow which module is running."""
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, _: Any) -> None:
            # Multi-head attention has a child that it never calls; a recurrence has rows for every
            # step, and says so.
            whole = isinstance(module, nn.MultiheadAttention) or not list(module.children())
            whole = whole or getattr(module, "one_row", False)
            if not whole and not self._inside_whole():
                self._list_own_parameters(name, module)
            self.frames.append(_Frame(name, module, whole))

        return enter

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        frame = self.frames.pop()
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        silent = self._inside_whole() or isinstance(module, nn.Identity) or not tensors
        if frame.whole and not silent:
            names = [key for key, _ in module.named_parameters(remove_duplicate=False)]
            row = self._row(frame.name or type(module).__name__, type(module).__name__)
            self._fill(row, tensors[0], [_join(frame.name, key) for key in names])

    def _inside_whole(self) -> _Frame | None:
        return next((frame for frame in self.frames if frame.whole), None)

    def _list_own_parameters(self, name: str, module: nn.Module) -> None:
        """Give a class token, a position embedding and their like a row each."""
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = _join(name, key)
            if self.first_name[full] in self.unclaimed:
                row = self._row(full, "Parameter")
                row.output = list(parameter.shape)
                row.params = self.unclaimed.pop(self.first_name[full])

    def _row(self, name: str, kind: str) -> Layer:
        return self.rows.setdefault(name, Layer(name, kind, [], [0, 0, 0]))

    def _fill(self, row: Layer, output: Tensor, parameters: Iterable[str]) -> None:
        footprint = self.seen.get(output)
        row.output = _size(output.shape, footprint)
        if footprint is not None:
            sees = [math.ceil(span.size - 1e-6) for span in footprint.spans]
            sees = [min(size, extent) for size, extent in zip(sees, self.extents, strict=True)]
            row.receptive_field = [
                max(size, before) for size, before in zip(sees, row.receptive_field, strict=True)
            ]
        row.params += sum(self.unclaimed.pop(self.first_name[p], 0) for p in parameters)

    def table(self) -> list[Layer]:
        """Return the rows, and at the end those of parameters that no call has met."""
        for name, parameter in self.model.named_parameters():
            if name in self.unclaimed:
                row = self._row(name, "Parameter")
                row.output = list(parameter.shape)
                row.params = self.unclaimed.pop(name)
        return list(self.rows.values())

    # operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func.overloadpacket
        count = flop_registry.get(operation)
        macs = count(*args, **kwargs, out_val=out) // 2 if count else 0
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        call = Call(func, args, kwargs, out, self.seen.get)
        self._follow(call, tensors)
        held = [self.holder[tensor] for tensor in tensors if tensor in self.holder]
        if held and len(tensors) == 1 and isinstance(out, Tensor):
            self.holder[out] = held[0]  # a weight transposed is still that weight
        if operation in (aten.slice, aten.select):
            self.slices[out] = call
        elif operation is aten.copy_:
            self._write_through(args[0])
        self._account(operation, out, tensors, held, macs)
        return out

    def _follow(self, call: Call, tensors: Sequence[Tensor]) -> None:
        known = [self.seen[tensor] for tensor in tensors if tensor in self.seen]
        if not known or call.operation in CONSTANTS:
            return
        result = rule_for(call.operation)(call, known)
        results = result if isinstance(result, list) else [result] * len(call.outs)
        for tensor, footprint in zip(call.outs, results, strict=True):
            if isinstance(tensor, Tensor):
                if footprint is None or footprint.shape != list(tensor.shape):
                    footprint = of_everything(tensor.shape, self.extents)
                self.seen[tensor] = footprint

    def _write_through(self, part: Tensor) -> None:
        """`whole[:, 1:] = x` writes into `whole` through a slice that nobody keeps."""
        while part in self.slices and part in self.seen:
            call, source = self.slices[part], self.seen[part]
            part = call["self"]
            dims, spans = [plain(size) for size in part.shape], source.spans
            if call.operation is aten.slice:
                for at, dim in enumerate(source.dims):
                    if atom := only_atom(dim):
                        dims[at] = (atom._replace(size=part.shape[at]),)
                        if at == call["dim"] % part.ndim:
                            start = slice_start(call, part.shape[at])
                            spans = shift(spans, atom.axis, -start * atom.step)
            parts = [Footprint(tuple(dims), spans)]
            if part in self.seen:
                parts.append(self.seen[part])
            self.seen[part] = broadcast(parts, part.shape)

    def _account(
        self, operation: Any, out: Any, tensors: Sequence[Tensor], held: Sequence[str], macs: int
    ) -> None:
        """Add the multiply-adds to the running layer, or open a row for the operation."""
        if whole := self._inside_whole():
            module = whole.module
            self._row(whole.name or type(module).__name__, type(module).__name__).macs += macs
            return
        result = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if result is None or not (macs or self._telling(operation, result, tensors)):
            return
        frame = self.frames[-1]
        name, kind = frame.name, _NAMES.get(operation, operation.__name__.strip("_"))
        owner = held[0].rpartition(".")[0] if held and macs else name
        if owner != name:  # the weight of a child, used without calling the child
            name, kind = owner, type(self.model.get_submodule(owner)).__name__
        else:
            frame.operations[kind] += 1
            times = frame.operations[kind]
            name = _join(name, kind if times == 1 else f"{kind}_{times}")
        row = self._row(name, kind)
        row.macs += macs
        self._fill(row, result, held)

    def _telling(self, operation: Any, result: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Is an operation without multiply-adds worth a row: does it pool, or join two paths?"""
        seen = {id(tensor): self.seen[tensor].dims for tensor in tensors if tensor in self.seen}
        if operation in _JOINS or not seen:
            return len(seen) > 1
        before = _axes_alive(next(iter(seen.values())))
        pools = operation in REDUCTIONS and _axes_alive(self.seen[result].dims) < before
        return pools or operation in POOLS


def _axes_alive(dims: Iterable[Dim]) -> int:
    return sum(travel(dims, axis) != 0 for axis in AXES)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _size(shape: Sequence[int], footprint: Footprint | None) -> list[int]:
    """Size for the table: channels first, then what is left of T, H and W.

    Where these are mixed up (flattened features, attention weights), the size is the tensor's own.
    """
    own = list(shape[1:] if shape[0] == 1 else shape)  # the batch is 1
    if footprint is None or (len(shape) == 2 and shape[0] == 1):
        return own
    alive: list[Atom] = []
    channels = 1
    for dim in footprint.dims:
        here = [part for part in dim if part.size > 1 or part in atoms_on_axes([dim])]
        axes = [part for part in here if isinstance(part, Atom) and part.axis in AXES]
        if axes and len(axes) < len(here):
            return own
        alive += axes
        channels *= 1 if axes else length(dim)
    alive.sort(key=lambda atom: AXES.index(atom.axis))
    if not alive or len({atom.axis for atom in alive}) < len(alive):
        return own
    return [channels, *(atom.size for atom in alive)]
