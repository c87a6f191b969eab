"""Published weights into a network: `model.weights=...`.

    open_parts    what the user wrote -> files, their layouts and what is known of them
    colours       the normalisation that they ask for
    fill          every tensor of a file into its place, or an error that names it

Nothing is left over in silence. A tensor of the file that has no place in the network, and one of the
network that the file does not fill, are errors; what may be new (the classifier of other classes) or
unused (ImageNet's auxiliary classifiers) is named in the line that `fill` returns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.models as tv
from torch import Tensor, nn

from vidtrain.layers.head import head_names, row_names
from vidtrain.types import UserError
from vidtrain.weights import (
    caffe_c3d,
    huggingface,
    image,
    mae_st,
    mmaction2,
    own,
    pyslowfast,
    pytorch_i3d,
    pytorchvideo,
    timesformer,
    torchvision,
    videomae,
    vit,
)
from vidtrain.weights.files import fetch, parse_url, read
from vidtrain.weights.layout import Colour, Facts, File, Layout, Renamed

# In the order in which a file's keys are compared with them.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        own.LAYOUT,
        pytorchvideo.LAYOUT,
        pyslowfast.LAYOUT,
        mmaction2.LAYOUT,
        pytorch_i3d.LAYOUT,
        caffe_c3d.LAYOUT,
        huggingface.LAYOUT,
        timesformer.LAYOUT,
        videomae.LAYOUT,
        mae_st.LAYOUT,
        vit.LAYOUT,
        vit.AVERAGE,  # by name alone
        torchvision.LAYOUT,
        image.LAYOUT,
    )
}
COUNTER = "num_batches_tracked"  # that older files lack; nothing here depends on it


class Part(NamedTuple):
    """A file for a network, or for a submodule of it."""

    at: str  # dotted name of the submodule; empty: the whole
    title: str  # as the user wrote it
    file: File
    layout: Layout
    facts: Facts


def named(node: Mapping[str, Any], at: str = "") -> dict[str, torchvision.Published]:
    """List the weights that a model's config can ask for by name: what torchvision publishes.

    Args:
        node: the model's config: its function, and which backbone it takes.
        at: the submodule that they are for.
    """
    inner = node.get("backbone3d")
    if isinstance(inner, Mapping) and at.startswith("backbone"):
        return named(inner)
    function = str(node.get("_target_", "")).rpartition(".")[2]
    function = torchvision.NAMES.get(function, function)
    found: dict[str, torchvision.Published] = {}
    if function in tv.list_models(module=tv.video):
        found = torchvision.published(function)
    backbone = node.get("temporal_backbone") if at.startswith("temporal") else None
    net = backbone or node.get("backbone") or inflated_from(node)
    if net in tv.list_models(module=tv):
        found |= torchvision.published(str(net))
    return found


def inflated_from(node: Mapping[str, Any]) -> str | None:
    """Name the image network that a network on clips is inflated from, or starts from, if from any."""
    module, _, function = str(node.get("_target_", "")).rpartition(".")
    if function.startswith("r2plus1d"):
        return None
    if (transformer := vit.image_network(function)) is not None:
        return transformer
    return image.INFLATED.get(module.rpartition(".")[2], (None,))[0]


def open_parts(node: Mapping[str, Any], cache: Path, say: Callable[[str], None]) -> list[Part]:
    """Find, fetch and read what `model.weights` names.

    Args:
        node: the model's config, resolved. `weights` is a path, an address with a checksum, a name,
            or a dictionary of these by submodule; `weights_from` a layout, or likewise.
        cache: the folder that fetched files are kept in.
        say: told what is being fetched.

    Raises:
        UserError: there is no such file, name or layout, or the file is not what it should be.
    """
    weights, forced = node.get("weights"), node.get("weights_from")
    if weights is None:
        return []
    parts = []
    for at, value in weights.items() if isinstance(weights, Mapping) else [("", weights)]:
        layout = forced.get(at) if isinstance(forced, Mapping) else forced
        parts.append(_open(node, str(at), str(value), layout, cache, say))
    return parts


def _open(
    node: Mapping[str, Any],
    at: str,
    value: str,
    forced: str | None,
    cache: Path,
    say: Callable[[str], None],
) -> Part:
    if forced is not None and forced not in LAYOUTS:
        raise UserError(
            f"model.weights_from is '{forced}'; it must be one of {', '.join(LAYOUTS)}, or null to"
            " tell by the file's keys"
        )
    names = named(node, at)
    if (item := names.get(value.lower())) is not None:
        file = read(fetch(item.address, cache, say))
        layout = LAYOUTS[forced] if forced else layout_of(file)
        return Part(at, f"{value} ({item.model} {item.weights})", file, layout, item.facts)
    path = _path(value, node, names, cache, say)
    file = read(path)
    layout = LAYOUTS[forced] if forced else layout_of(file)
    return Part(at, str(path), file, layout, layout.facts(file))


def _path(
    value: str,
    node: Mapping[str, Any],
    names: Mapping[str, Any],
    cache: Path,
    say: Callable[[str], None],
) -> Path:
    """Turn an address or a path into a file that is there."""
    if "://" in value:
        return fetch(parse_url(value), cache, say)
    path = Path(value).expanduser()
    if path.is_file():
        return path
    model = str(node.get("_target_", "this model")).rpartition(".")[2]
    near = get_close_matches(value.lower(), names, n=1)
    if names:
        have = f"no weights of {model}"
        have += f"; did you mean '{near[0]}'?" if near else f"; its names: {', '.join(names)}"
    else:
        have = f"{model} has no weights by name; give a file, or an address with #sha256=..."
    kind = "is a folder" if path.is_dir() else "is no file"
    raise UserError(f"model.weights={value} {kind if value else 'is empty'}, and {have}")


def layout_of(file: File) -> Layout:
    """Tell a file's layout by its keys.

    Raises:
        UserError: it has none that is known.
    """
    for layout in LAYOUTS.values():
        if layout.matches(file):
            return layout
    raise UserError(
        f"{file.path} has keys of no known layout ({_some(list(file.tensors))}); name it:"
        f" model.weights_from= one of {', '.join(LAYOUTS)}"
    )


def colours(parts: Sequence[Part]) -> tuple[Colour, Colour] | None:
    """Give the mean and deviation that the files ask frames to be normalised by, if they are known.

    Raises:
        UserError: two files ask for different ones.
    """
    asked = [part for part in parts if part.facts.mean is not None and part.facts.std is not None]
    # What sees flow has no colours.
    asked = [part for part in asked if not {"flow", "temporal"} & set(part.at.split("."))] or asked
    found: list[tuple[Colour, Colour]] = []
    for part in asked:
        assert part.facts.mean is not None and part.facts.std is not None
        found.append((part.facts.mean, part.facts.std))
        if not all(same(a, b) for a, b in zip(found[0], found[-1], strict=True)):
            raise UserError(
                f"model.weights: {asked[0].title} and {part.title} want frames normalised in two"
                " ways; take weights that agree"
            )
    return found[0] if found else None


def same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Compare two colours, rounded as people write them."""
    return all(abs(a - b) < 1e-3 for a, b in zip(ours, theirs, strict=True))


def fill(network: nn.Module, part: Part, labels: Sequence[str] | None = None) -> str:
    """Put a file's tensors into a network, all or none.

    Args:
        network: as it was built; its classifier is kept where the file's does not fit.
        part: the file.
        labels: the data's class names, by class number: the classifier's rows are put in their order.

    Returns:
        A line that says what was filled, what is new and what was not used.

    Raises:
        UserError: a tensor has no place, or another size than its place, or a place has no tensor;
            or some of the classes have other names.
    """
    module = _submodule(network, part.at)
    renamed = part.layout.rename(part.file, module, part.at)
    places = module.state_dict()
    head = head_names(module) | _below(head_names(network), part.at)
    in_rows = row_names(module) | _below(row_names(network), part.at)
    ready, other_head = _sort(part, renamed, module, places, head)
    notes = []
    if other_head is not None:
        ready = {name: tensor for name, tensor in ready.items() if name not in head}
        ours = next((places[name].shape[0] for name in places if name in in_rows), 0)
        notes.append(f"its classifier has {other_head} classes, the data {ours}")
    elif rows := sorted(name for name in ready if name in head):
        note = _order(part, module, rows, in_rows, ready, labels)
        if note is not None:
            notes.append(note)
    if part.facts.bgr and (note := _turn(module, ready)):
        notes.append(note)
    notes += renamed.notes
    if new := [n for n in places if n not in ready and not n.endswith(COUNTER)]:
        notes.append(f"new here: {', '.join(_modules(new, ready))}")
    if renamed.dropped:
        counts = Counter(renamed.dropped.values())
        notes.append("not used: " + ", ".join(f"{what} ({n})" for what, n in counts.items()))
    with torch.no_grad():
        for name, tensor in ready.items():
            places[name].copy_(tensor)
    place = f" for {part.at}" if part.at else ""
    return "; ".join([f"weights{place} of {part.title}: {len(ready)} tensors", *notes])


def _submodule(network: nn.Module, at: str) -> nn.Module:
    try:
        return network.get_submodule(at)
    except AttributeError:
        names = ", ".join(name for name, _ in network.named_children())
        raise UserError(
            f"model.weights: {type(network).__name__} has no part '{at}'; at the top there are"
            f" {names}"
        ) from None


def _below(names: set[str], at: str) -> set[str]:
    prefix = f"{at}." if at else ""
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _sort(
    part: Part, renamed: Renamed, module: nn.Module, places: dict[str, Tensor], head: set[str]
) -> tuple[dict[str, Tensor], int | None]:
    """Find every tensor its place.

    Returns:
        Tensors by their names in the network; and how many classes the file's classifier has, where
        these are not the network's.

    Raises:
        UserError: naming what does not fit.
    """
    ready: dict[str, Tensor] = {}
    other_head: int | None = None
    lost, wrong, tables = [], [], True
    homes = {f"{above}." for name in head for above in _above(name) if above != name}
    homes = {top for top in homes if all(n in head for n in places if n.startswith(top))}
    for name, tensor in renamed.tensors.items():
        key = renamed.origin[name]
        if name in places:
            fitted = _reshaped(tensor, places[name])
            if fitted is not None:
                ready[name] = fitted
            elif name in head:
                other_head = int(tensor.shape[0])
            else:
                wrong.append(f"'{key}' is {_size(tensor)} there and {_size(places[name])} here")
                tables = tables and re.search(r"(pos|time)_\w+$", name) is not None
        elif name in head or name.startswith(tuple(homes)):  # of this kind, or of another
            renamed.dropped[key] = "its classifier"
        elif _cut_off(module, name):
            renamed.dropped[key] = "what this network does without"
        elif not key.endswith(COUNTER):
            lost.append(key)
    kind = f"{part.title} ({part.layout.name}) does not fit {type(module).__name__}"
    hint = "; is it the right model?"
    if part.layout is not own.LAYOUT:
        hint += " (model.weights_from= names another layout)"
    if wrong and tables:
        hint = (
            "; its positions are of clips of another shape: set model.num_frames and model.size, those there are,"
            " to what it was trained with, and the network spreads them over the clips that it gets"
        )
    if wrong:
        raise UserError(f"{kind}: {wrong[0]}{_more(len(wrong) - 1)}{hint}")
    if lost:
        raise UserError(f"{kind}, which has no place for {_some(lost)}{hint}")
    missing = [
        name
        for name in places
        if name not in ready
        and name not in head
        and not name.endswith(COUNTER)
        and not any(re.fullmatch(pattern, name) for pattern in renamed.new)
    ]
    halves = {name.rpartition(".")[0] for name in ready if name in head and other_head is None}
    missing += [
        name
        for name in places
        if name in head and name not in ready and name.rpartition(".")[0] in halves
    ]
    if missing:
        raise UserError(f"{kind}: it has nothing for {_some(missing)}{hint}")
    return ready, other_head


def _cut_off(module: nn.Module, name: str) -> bool:
    """Say whether a tensor's part of the network was taken out of it, right at the top."""
    top = name.partition(".")[0]
    return type(getattr(module, top, None)) is nn.Identity


def _reshaped(tensor: Tensor, places: Tensor) -> Tensor | None:
    """Give a tensor its place's size: a linear layer is a convolution of 1 x 1 x 1. None: it cannot."""
    if tensor.shape == places.shape:
        return tensor
    short, long = sorted((tuple(tensor.shape), tuple(places.shape)), key=len)
    if 2 <= len(short) < len(long) and long == (*short, *(1,) * (len(long) - len(short))):
        return tensor.reshape(places.shape)
    return None


def _order(
    part: Part,
    module: nn.Module,
    rows: Sequence[str],
    in_rows: set[str],
    ready: dict[str, Tensor],
    labels: Sequence[str] | None,
) -> str | None:
    """Put the classifier's rows in the order of the data's classes, or take it out.

    Raises:
        UserError: most of the classes are the file's, but not all: they are spelled otherwise.
    """
    theirs = part.facts.labels
    if labels is None:
        return None
    if theirs is None:
        return "its classes are taken for the data's, in their order: the file does not name them"
    numbers = {_plain(label): number for number, label in enumerate(theirs)}
    unknown = [label for label in labels if _plain(label) not in numbers]
    if not unknown and len(numbers) == len(labels):
        order = [numbers[_plain(label)] for label in labels]
        if order == sorted(order):
            return None
        parameters = dict(module.named_parameters())
        with_rows = {name.rpartition(".")[0] for name in in_rows}
        for name in rows:
            if name.rpartition(".")[0] not in with_rows:  # of a probe, before its last layer
                continue
            if name in parameters:
                ready[name] = ready[name].index_select(0, torch.tensor(order))
            else:  # a fitted SVM, whose columns are classes as well: it is fitted anew
                del ready[name]
        return "its classifier's rows were put in the order of the data's classes"
    if 2 * len(unknown) < len(labels):
        raise UserError(
            f"{part.title} has {len(labels) - len(unknown)} of the data's {len(labels)} classes, but"
            f" not {_some(unknown)}; its places names, such as '{theirs[0]}', are told apart by letters"
            " and digits alone: spell the data's so"
        )
    for name in rows:
        del ready[name]
    return f"its classes ('{theirs[0]}', ...) are others than the data's"


def _plain(label: str) -> str:
    """Letters and digits alone: folders and tables spell spaces, quotes and brackets in many ways."""
    return re.sub(r"[^a-z0-9]", "", label.lower())


def _turn(module: nn.Module, ready: dict[str, Tensor]) -> str | None:
    """Turn the first convolution round, so that it takes red, green, blue."""
    for name, layer in module.named_modules():
        key = f"{name}.weight"
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and key in ready and ready[key].shape[1] == 3:
            ready[key] = ready[key].flip(1)
            return "its first convolution was turned from BGR to RGB"
    return None


def _modules(new: Sequence[str], filled: Mapping[str, Tensor]) -> list[str]:
    """Name the outermost modules that have nothing but new tensors: a few words for many.

    Of blocks that are numbered through, those that have the same new part are one: `blocks.*.temporal_fc`.
    """
    taken = {above for name in filled for above in _above(name)}
    outermost = [next(a for a in _above(name) if a not in taken) for name in new]
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in outermost))


def _above(name: str) -> list[str]:
    """List the modules that a tensor lies in, outermost first, and itself."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + _more(len(names) - 3)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
