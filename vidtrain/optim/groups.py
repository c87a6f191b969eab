"""Which parameters get which treatment: weight decay, a learning rate of their own, or none at all.

Parameters are chosen by patterns. A pattern is the dotted name of a submodule (`layer4`, `head.proj`)
or of a parameter, or has wildcards for either, as in a shell: `layer[34]`, `*.norm`, `*`. The word `backbone`
chooses all but the classifier, in every network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vidtrain.layers.blocks import block_of
from vidtrain.layers.head import backbone_names, head_names
from vidtrain.types import UserError

BACKBONE = "backbone"


def chosen(module: nn.Module, pattern: str, key: str) -> list[str]:
    """List the parameters that a pattern chooses: those of its name and all below, or the backbone's.

    Args:
        module: whose parameters they are.
        pattern: a name or one with wildcards.
        key: of the config, for the message: `freeze`.

    Raises:
        UserError: nothing has such a name; the message lists the names there are.
    """
    backbone = backbone_names(module) if pattern == BACKBONE else set()
    found = [
        name
        for name, _ in module.named_parameters()
        if (name in backbone if backbone else covers(pattern, name))
    ]
    if not found:
        names = ", ".join(name for name, child in module.named_children() if _holds(child))
        own = ", ".join(name for name, _ in module.named_parameters(recurse=False))
        raise UserError(
            f"{key}: no part of {type(module).__name__} is called '{pattern}';"
            f" at the top there are {', '.join(filter(None, (names, own)))}"
        )
    return found


def covers(pattern: str, name: str) -> bool:
    """Say whether a pattern names a parameter, or a module that it lies in."""
    parts = name.split(".")
    above = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return any(fnmatchcase(part, pattern) for part in above)


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def freeze(module: nn.Module, patterns: str | Sequence[str] | None) -> tuple[str, ...]:
    """Take parameters out of training: they get no gradient.

    Args:
        module: whose parameters they are.
        patterns: one or several; None: nothing is frozen.

    Returns:
        Names of the modules all of whose parameters are frozen and that a pattern chose, outermost
        only. They are to stay in eval mode, so that neither batch norm's statistics nor dropout
        change what they compute. Nothing of them is kept for a backward pass where all before them
        is frozen too.

    Raises:
        UserError: a pattern that chooses nothing, or nothing is left to train.
    """
    wanted = listed(patterns, "freeze")
    parameters = dict(module.named_parameters())
    frozen = {name for pattern in wanted for name in chosen(module, pattern, "freeze")}
    if frozen and len(frozen) == len(parameters):
        raise UserError(f"freeze={', '.join(wanted)} leaves nothing to train")
    for name in frozen:
        parameters[name].requires_grad = False
    backbone = backbone_names(module) if BACKBONE in wanted else set()
    named = [pattern for pattern in wanted if not (backbone and pattern == BACKBONE)]
    still: list[str] = []
    for name, child in module.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in still):
            continue
        tensors = {f"{name}.{below}" for below in _tensors(child)}
        if (tensors and tensors <= backbone) or (
            any(covers(pattern, name) for pattern in named)
            and all(f"{name}.{below}" in frozen for below, _ in child.named_parameters())
        ):
            still.append(name)
    return tuple(still)


def _tensors(module: nn.Module) -> list[str]:
    """Name a module's parameters and buffers."""
    names = [name for name, _ in module.named_parameters()]
    return names + [name for name, _ in module.named_buffers()]


def listed(patterns: str | Sequence[str] | None, key: str) -> list[str]:
    """Make a list of one pattern, several, or none.

    Raises:
        UserError: they are not words.
    """
    if patterns is None:
        return []
    words = [patterns] if isinstance(patterns, str) else list(patterns)
    if not all(isinstance(word, str) and word for word in words):
        raise UserError(f"{key} is {patterns!r}; it takes a name or several: {key}=[stem,layer1]")
    return words


def depths(module: nn.Module) -> tuple[dict[str, int], int]:
    """Count, for each parameter, how many layers come before it.

    A layer is a block of a numbered row of blocks (`res3.1`, `blocks.7`), and what lies beside such rows
    at the top, in the order of definition. What has neither kernels nor matrices, as a norm, belongs to
    the layer before it, and behind the last one to the classifier, which comes last. Pathways whose
    parts have the same names (SlowFast, two streams) run side by side: a layer of theirs is one layer.
    Parameters of the network itself (a class token, positions) belong to the first layer.

    Returns:
        The depth of each parameter by its name, 0 for the first layer; and the classifier's.
    """
    head, pathways = head_names(module), _pathways(module)
    layers: dict[str, str] = {}  # of each parameter
    wide: dict[str, bool] = {}  # whether a layer has kernels or matrices
    for name, parameter in module.named_parameters():
        if name not in head:
            layer = layers[name] = _layer(name, pathways)
            wide[layer] = wide.get(layer, False) or (parameter.ndim > 1 and layer != "")
    last = sum(wide.values())
    depth: dict[str, int] = {}
    count = 0
    for layer, is_wide in wide.items():
        count += is_wide
        depth[layer] = max(0, count - 1) if is_wide or count < last else last
    depth[""] = 0
    found = {name: depth[layer] for name, layer in layers.items()}
    return found | {name: last for name, _ in module.named_parameters() if name in head}, last


def _layer(name: str, pathways: set[str]) -> str:
    """Name the layer that a parameter lies in: its path up to a number, else its module at the top."""
    top, *rest = name.split(".")[:-1] or [""]
    parts = rest if top in pathways else [top, *rest]
    return block_of(parts) or (parts[0] if parts else top)


def _pathways(module: nn.Module) -> set[str]:
    """Name the children that are whole networks side by side: they have parts of the same names."""
    inside = {
        name: {
            below
            for below, part in child.named_children()
            if not below.isdigit() and _holds_blocks(part)
        }
        for name, child in module.named_children()
    }
    return {
        name
        for name, parts in inside.items()
        if any(parts & other for key, other in inside.items() if key != name)
    }


def _holds_blocks(part: nn.Module) -> bool:
    """Say whether a part is more than a block: its own parts have parts."""
    return any(next(child.children(), None) is not None for child in part.children())


def decay_groups(
    module: nn.Module,
    weight_decay: float,
    lr: float | None = None,
    groups: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    no_decay: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Split parameters in two: matrices and kernels decay, biases and norms (1-D) do not.

    Args:
        module: whose parameters they are; those without a gradient are left out.
        weight_decay: of the first part.
        lr: the base learning rate, which `groups` multiplies.
        groups: factor of the learning rate by pattern; a parameter that several patterns choose
            gets the last one's. Each factor's parameters are split in two as well.
        layer_decay: factor from one layer to the one before it (Clark et al. 2020; BEiT, VideoMAE): the
            classifier learns at `lr`, layer k of n at `lr · layer_decay^(n - k)`. Multiplies with `groups`.
        no_decay: patterns of what does not decay besides, such as tables of positions.

    Raises:
        UserError: a pattern that chooses nothing, a factor that is no number above 0, or no
            parameter is left to train.
    """
    if groups is not None and not isinstance(groups, Mapping):
        raise UserError(
            f"optim.groups is {groups!r}; it takes factors by pattern, such as {{fc: 10}}"
        )
    factors: dict[str, float] = {}
    for pattern, factor in (groups or {}).items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
            raise UserError(
                f"optim.groups: '{pattern}' has the factor {factor}; it must be a number above 0"
                " (freeze= takes a part out of training)"
            )
        factors |= dict.fromkeys(chosen(module, str(pattern), "optim.groups"), float(factor))
    if layer_decay is not None:
        if isinstance(layer_decay, bool) or not 0 < layer_decay <= 1:
            raise UserError(f"optim.layer_decay is {layer_decay}; it is from above 0 to 1, or null")
        depth, last = depths(module)
        for name, layer in depth.items():
            factors[name] = factors.get(name, 1.0) * layer_decay ** (last - layer)
    if no_decay is not None and (
        isinstance(no_decay, str) or not all(isinstance(pattern, str) for pattern in no_decay)
    ):
        raise UserError(f"optim.no_decay is {no_decay!r}; it takes a list of names or patterns")
    kept = {
        name for pattern in no_decay or () for name in chosen(module, pattern, "optim.no_decay")
    }
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            place = (factors.get(name, 1.0), parameter.ndim > 1 and name not in kept)
            parts.setdefault(place, []).append(parameter)
    if not parts:
        raise UserError(f"{type(module).__name__} has no parameter to train")
    made: list[dict[str, Any]] = []
    for factor in _factors(parts):
        for decays in (True, False):
            if (factor, decays) in parts:
                group: dict[str, Any] = {"params": parts[factor, decays]}
                group["weight_decay"] = weight_decay if decays else 0.0
                if lr is not None and factor != 1.0:
                    group["lr"] = lr * factor
                made.append(group)
    return made


def _factors(parts: Iterable[tuple[float, bool]]) -> list[float]:
    """Order the factors: the base rate first, so that its group is the optimizer's first."""
    return sorted({factor for factor, _ in parts}, key=lambda factor: (factor != 1.0, factor))
