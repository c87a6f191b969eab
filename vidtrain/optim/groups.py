"""Which parameters get which treatment: weight decay, a learning rate of their own, or none at all.

Parameters are chosen by patterns. A pattern is the dotted name of a submodule (`layer4`, `head.proj`)
or of a parameter, or has wildcards for either, as in a shell: `layer[34]`, `*.norm`, `*`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vidtrain.types import UserError


def chosen(module: nn.Module, pattern: str, key: str) -> list[str]:
    """List the parameters that a pattern chooses: those of its name and all below.

    Args:
        module: whose parameters they are.
        pattern: a name or one with wildcards.
        key: of the config, for the message: `freeze`.

    Raises:
        UserError: nothing has such a name; the message lists the names there are.
    """
    found = [name for name, _ in module.named_parameters() if covers(pattern, name)]
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
        change what they compute.

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
    still: list[str] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in still)
        if not name or inside or not any(covers(pattern, name) for pattern in wanted):
            continue
        if all(f"{name}.{below}" in frozen for below, _ in child.named_parameters()):
            still.append(name)
    return tuple(still)


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


def decay_groups(
    module: nn.Module,
    weight_decay: float,
    lr: float | None = None,
    groups: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Split parameters in two: matrices and kernels decay, biases and norms (1-D) do not.

    Args:
        module: whose parameters they are; those without a gradient are left out.
        weight_decay: of the first part.
        lr: the base learning rate, which `groups` multiplies.
        groups: factor of the learning rate by pattern; a parameter that several patterns choose
            gets the last one's. Each factor's parameters are split in two as well.

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
    parts: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            place = (factors.get(name, 1.0), parameter.ndim > 1)
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
