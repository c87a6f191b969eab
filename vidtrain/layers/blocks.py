"""The blocks of a network, told by the names of its modules."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERED = re.compile(r"(\w*_)?\d+")  # 3, encoder_layer_3


def block_of(parts: Sequence[str]) -> str | None:
    """Give the outermost block that a path lies in, as `res3.1` or `blocks.7`: its parts up to a number.

    None where the path has no number.
    """
    for place, part in enumerate(parts):
        if NUMBERED.fullmatch(part):
            return ".".join(parts[: place + 1])
    return None
