"""A network's classifier: how it is made, and which tensors it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def head_names(network: nn.Module) -> set[str]:
    """Name the tensors of a network's classifier: those that `reset_classifier` puts and takes away.

    They are named also where the network has none at the moment.
    """
    if not hasattr(network, "reset_classifier"):
        return set()
    empty: dict[int, Any] = {}  # stands in for what a deep copy would copy: no memory is taken
    for parameter in network.parameters():
        blank = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = nn.Parameter(blank, requires_grad=False)
    for buffer in network.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    model: Any = copy.deepcopy(network, empty)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model.reset_classifier(2)
        with_head = set(model.state_dict())
        model.reset_classifier(0)
    return with_head - set(model.state_dict())


def linear(dim: int, num_classes: int) -> nn.Module:
    """Make a linear layer with first weights from a Gaussian of 0.01; for 0 classes what changes nothing."""
    if not num_classes:
        return nn.Identity()
    made = nn.Linear(dim, num_classes)
    nn.init.normal_(made.weight, std=0.01)
    nn.init.zeros_(made.bias)
    return made
