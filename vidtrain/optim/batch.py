"""How many clips go into a step, and which learning rate that calls for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vidtrain.types import UserError

RULES = ("linear", "sqrt")
KEYS = ("reference_batch", "scaling")  # of `cfg.optim`: what the optimizer itself does not take


class Batch(NamedTuple):
    """What makes up one optimizer step."""

    videos: int  # of one rank
    repeats: int = 1  # clips of each
    ranks: int = 1
    accumulated: int = 1

    @property
    def clips(self) -> int:
        """All of them."""
        return math.prod(self)

    def __str__(self) -> str:
        parts = [f"{self.videos} videos"]
        parts += [f"{self.repeats} clips"] if self.repeats > 1 else []
        parts += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        parts += [f"{self.accumulated} accumulated"] if self.accumulated > 1 else []
        return f"{self.clips} clips a step" + (f" ({' x '.join(parts)})" if len(parts) > 1 else "")


def scaled(lr: float, batch: Batch, optim: Mapping[str, Any]) -> tuple[float, str]:
    """Scale a learning rate from the batch that it is stated for to the one that there is.

    `linear` (Goyal et al. 2017) for SGD, `sqrt` (Krizhevsky 2014) where noise is to stay the same.

    Args:
        lr: as stated.
        batch: of a step.
        optim: `reference_batch`, clips; None: the rate stays; and `scaling`.

    Returns:
        The rate, and a line that says what came out.

    Raises:
        UserError: a setting out of its range.
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not lr > 0:
        raise UserError(f"optim.lr is {lr!r}; it is a number above 0")
    reference, rule = optim.get("reference_batch"), optim.get("scaling", "linear")
    if rule not in RULES:
        raise UserError(f"optim.scaling is {rule!r}; it is one of {', '.join(RULES)}")
    if reference is None:
        return lr, f"{batch}; rate {lr:g}, whatever the batch (optim.reference_batch scales it)"
    if isinstance(reference, bool) or not isinstance(reference, int) or reference < 1:
        raise UserError(
            f"optim.reference_batch is {reference!r}; it is a number of clips, at least 1, or null"
        )
    share = batch.clips / reference
    rate = lr * (share if rule == "linear" else math.sqrt(share))
    how = "" if share == 1 else f", {'as the batch' if rule == 'linear' else 'as its root'}"
    return rate, f"{batch}; rate {rate:g}: optim.lr={lr:g} is for {reference}{how}"
