"""Activation checkpointing: a block keeps its input alone, and is computed again in the backward pass.

Chen, Xu, Zhang, Guestrin. "Training Deep Nets with Sublinear Memory Cost." 2016.
https://arxiv.org/abs/1604.06174

The second time a block draws the same random numbers, and its buffers (batch norm's statistics) are
copies of what they were before the first: what is learned is the same to the last bit, where the device
computes the same twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidtrain.layers.blocks import blocks
from vidtrain.types import UserError

LISTS = (nn.ModuleList, nn.ModuleDict)  # which nothing calls


def recompute(network: nn.Module, parts: bool | str | Sequence[str]) -> int:
    """Have parts of a network computed again in the backward pass, in place of keeping their activations.

    Neither modules nor tensors get other names. A part is computed again where it is called as a module;
    other methods of it, as the step of a stream, keep what they have always kept.

    Args:
        network: Any; it is changed in place.
        parts: True for the blocks of its numbered rows, else names of modules, or patterns as in a shell.

    Returns:
        How many parts.

    Raises:
        UserError: there are no such blocks, or nothing has such a name.
    """
    chosen = _blocks(network) if parts is True else _named(network, parts)
    for part in chosen:
        part.forward = partial(_checkpointed, part, part.forward)
    return len(chosen)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """List the blocks of several layers: one layer alone keeps no more than its input anyway."""
    found = [block for block in blocks(network).values() if any(block.children())]
    if not found:
        names = [name for name, part in network.named_children() if any(part.children())]
        say = f"name parts of it: checkpointing=[{','.join(names)}]" if names else "leave it out"
        raise UserError(
            f"checkpointing=true: {type(network).__name__} has no numbered blocks"
            f" (as layer1.0, layer1.1); {say}"
        )
    return found


def _named(network: nn.Module, patterns: Any) -> list[nn.Module]:
    """List the modules that patterns choose, the outermost alone; of a list of modules, what is in it."""
    words = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise UserError(f"checkpointing is {patterns!r}; it takes true, false or names of parts")
    modules = {name: part for name, part in network.named_modules() if name}
    wanted: set[str] = set()
    for word in words:
        matching = {name for name in modules if fnmatchcase(name, word)}
        if not matching:
            top = ", ".join(name for name, _ in network.named_children())
            raise UserError(
                f"checkpointing: no part of {type(network).__name__} is called '{word}';"
                f" at the top there are {top}"
            )
        wanted |= matching
    chosen: dict[str, nn.Module] = {}
    for name, part in modules.items():  # from the outside in
        if name not in wanted or any(name.startswith(f"{outer}.") for outer in chosen):
            continue
        if isinstance(part, LISTS):
            wanted |= {f"{name}.{below}" for below, _ in part.named_children()}
        else:
            chosen[name] = part
    return list(chosen.values())


def _checkpointed(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stand in for a part's `forward`."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    how: dict[str, Any] = {"use_reentrant": False}
    if not torch.compiler.is_compiling():  # a compiler takes statistics once by itself
        how["context_fn"] = partial(_contexts, part)
    return checkpoint(forward, *args, **how, **kwargs)


def _contexts(part: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Give what surrounds the first time that a part is computed, and the second."""
    return nullcontext(), _Before(part)


class _Before(AbstractContextManager[None]):
    """Puts copies of a part's buffers, as they are now, in their place for a while."""

    def __init__(self, part: nn.Module) -> None:
        self.copies: list[tuple[dict[str, Tensor | None], str, Tensor]] = [
            (module._buffers, name, buffer.clone())
            for module in part.modules()
            if module.training  # else they stay as they are
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def __enter__(self) -> None:
        self.now = [buffers[name] for buffers, name, _ in self.copies]
        for buffers, name, copy in self.copies:
            buffers[name] = copy.clone()  # a second backward pass needs them as they were, too

    def __exit__(self, *error: object) -> None:
        for (buffers, name, _), tensor in zip(self.copies, self.now, strict=True):
            buffers[name] = tensor
