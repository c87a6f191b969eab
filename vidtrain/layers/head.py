"""A network's classifier: how it is made, and which tensors it is.

A network may name, in `readout`, parts that stay when the classifier is taken away and yet are new with it,
since pretraining does not fill them: VideoMAE's norm of the tokens' mean.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def head_names(network: nn.Module) -> set[str]:
    """Name the tensors of a network's classifier: those that `reset_classifier` puts and takes away.

    They are named also where the network has none at the moment.
    """
    return set(_with_classes(network, 2)) - set(_with_classes(network, 0))


def row_names(network: nn.Module) -> set[str]:
    """Name those of the classifier's tensors that have a row for each class."""
    two, three = _with_classes(network, 2), _with_classes(network, 3)
    return {name for name, shape in two.items() if shape != three.get(name)}


def _with_classes(network: nn.Module, num_classes: int) -> dict[str, torch.Size]:
    """Give the sizes of all tensors that a network would have with so many classes."""
    if not hasattr(network, "reset_classifier"):
        return {}
    empty: dict[int, Any] = {}  # stands in for what a deep copy would copy: no memory is taken
    for parameter in network.parameters():
        blank = torch.empty_like(parameter, device="meta")
        empty[id(parameter)] = nn.Parameter(blank, requires_grad=False)
    for buffer in network.buffers():
        empty[id(buffer)] = torch.empty_like(buffer, device="meta")
    model: Any = copy.deepcopy(network, empty)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model.reset_classifier(num_classes)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def backbone_names(network: nn.Module) -> set[str]:
    """Name the tensors of what comes before a network's classifier; none where it has no classifier.

    In a network of which a part is called `backbone` (an image network per frame, before an LSTM), these are
    that part's own.
    """
    head = head_names(network)
    if not head:
        return set()
    readout = tuple(f"{name}." for name in getattr(network, "readout", ()))
    has_part = hasattr(network, "backbone")
    tensors = [name for name, _ in network.named_parameters()]
    tensors += [name for name, _ in network.named_buffers()]
    return {
        name
        for name in tensors
        if name not in head
        and not name.startswith(readout)
        and (not has_part or name.startswith("backbone."))
    }


def linear(dim: int, num_classes: int) -> nn.Module:
    """Make a linear layer with first weights from a Gaussian of 0.01; for 0 classes what changes nothing."""
    if not num_classes:
        return nn.Identity()
    made = nn.Linear(dim, num_classes)
    nn.init.normal_(made.weight, std=0.01)
    nn.init.zeros_(made.bias)
    return made
