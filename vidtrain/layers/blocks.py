"""The blocks of a network, told by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

NUMBERED = re.compile(r"(\w*_)?\d+")  # 3, encoder_layer_3


def block_of(parts: Sequence[str]) -> str | None:
    """Give the outermost block that a path lies in, as `res3.1` or `blocks.7`: its parts up to a number.

    None where the path has no number.
    """
    for place, part in enumerate(parts):
        if NUMBERED.fullmatch(part):
            return ".".join(parts[: place + 1])
    return None


def blocks(network: nn.Module) -> dict[str, nn.Module]:
    """Find the blocks of a network's numbered rows that hold parameters, by their names.

    The outermost number counts (`res3.1`), but where it stands for a mere list of modules, which nothing
    calls, the next one does: `blocks.7.0`, if `blocks.7` is a ModuleList.
    """
    found: dict[str, nn.Module] = {}
    for name, _ in network.named_parameters():
        path, rest = "", name.split(".")[:-1]
        while (below := block_of(rest)) is not None:
            path, rest = f"{path}.{below}".lstrip("."), rest[below.count(".") + 1 :]
            block = network.get_submodule(path)
            if not isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                found[path] = block
                break
    return found
