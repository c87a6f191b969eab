"""Optimizers with their schedules: what `conf/optim/` points at.

Each takes a module and the number of optimizer steps to come, and returns the dictionary that
Lightning's `configure_optimizers` wants. Schedules are counted in shares of all steps, so that a
recipe holds for a longer run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from vidtrain.optim.groups import decay_groups
from vidtrain.types import UserError


class Pace(Protocol):
    """Tells, of a step, what share of training is done, and what the rate is multiplied by.

    Attributes:
        total: steps of the run.
    """

    total: int

    def __call__(self, step: int) -> tuple[float, float]:
        """Give both."""
        ...


def rate(
    step: float,
    total: int,
    schedule: str,
    warmup: float,
    milestones: Sequence[float],
    gamma: float,
    warmup_from: float = 0.0,
    floor: float = 0.0,
) -> float:
    """Give the learning rate of a step, as a multiple of the base rate.

    Linear warm-up, from `warmup_from` of the base rate, over the first `warmup` share of all steps,
    then `cosine` down to `floor`, `step` (times `gamma` at each milestone, shares of all steps) or
    `constant`.
    """
    done = step / max(1, total)
    if done < warmup:
        risen = (step + 1) / max(1.0, warmup * total + 1)
        return warmup_from + (1 - warmup_from) * risen
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return gamma ** sum(done >= milestone for milestone in milestones)
    if schedule == "cosine":
        fallen = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))
        return floor + (1 - floor) * fallen
    raise UserError(f"optim.schedule is '{schedule}'; it is cosine, step, one_cycle or constant")


def paced(step: int, pace: Pace, *schedule: Any) -> float:
    """Give the learning rate of a step, as a multiple of the base rate, at a pace; see `rate`."""
    done, factor = pace(step)
    # A hair more, so that what falls on a milestone is not before it.
    return factor * rate(done * pace.total + 1e-6, pace.total, *schedule)


def with_schedule(
    optimizer: torch.optim.Optimizer,
    total: int,
    schedule: str = "constant",
    warmup: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    warmup_from: float = 0.0,
    floor: float = 0.0,
    pace: Pace | None = None,
) -> dict[str, Any]:
    """Pair an optimizer with its schedule, stepped after every optimizer step.

    `pace` says how far training is at a step, where that is not `step / total`.
    """
    if not 0 <= warmup < 1:
        raise UserError(f"optim.warmup is {warmup}; it is a share of all steps, from 0 to below 1")
    if not 0 <= warmup_from <= 1:
        raise UserError(f"optim.warmup_from is {warmup_from}; it is a share of lr, from 0 to 1")
    if not 0 <= floor <= 1:
        raise UserError(f"optim.floor is {floor}; it is a share of lr, from 0 to 1")
    if floor and schedule != "cosine":
        raise UserError(
            f"optim.floor is where a cosine ends; schedule={schedule} has none: set it to 0"
        )
    if schedule == "one_cycle":
        assert pace is None, "build.multigrid_plan refuses it"
        return {
            "optimizer": optimizer,
            "lr_scheduler": one_cycle(optimizer, total, warmup, warmup_from),
        }
    rate(0, total, schedule, 0.0, milestones, gamma)  # refuse a wrong name before the first step
    factor: Callable[[int], float] = lambda step: rate(  # noqa: E731
        step, total, schedule, warmup, milestones, gamma, warmup_from, floor
    )
    if pace is not None:
        factor = lambda step: paced(  # noqa: E731
            step, pace, schedule, warmup, milestones, gamma, warmup_from, floor
        )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
    }


def one_cycle(
    optimizer: torch.optim.Optimizer, total: int, warmup: float, warmup_from: float
) -> dict[str, Any]:
    """Torch's one-cycle policy (Smith & Topin 2018): up and down by half a cosine each, momentum against it.

    Args:
        optimizer: its rates are the highest.
        total: steps.
        warmup: share of them in which the rate rises.
        warmup_from: where it begins, a share of the highest rate.

    Raises:
        UserError: nothing rises, or from nothing.
    """
    if not warmup or not warmup_from:
        raise UserError(
            "optim.schedule=one_cycle rises from a rate above 0: set optim.warmup=0.3 optim.warmup_from=0.04"
        )
    highest = [group["lr"] for group in optimizer.param_groups]
    cycle = OneCycleLR(
        optimizer, highest, total_steps=total + 1, pct_start=warmup, div_factor=1 / warmup_from
    )
    return {"scheduler": cycle, "interval": "step"}


def sgd(
    module: nn.Module,
    total: int,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    groups: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    **schedule: Any,
) -> dict[str, Any]:
    """SGD with momentum; `groups` multiplies the rate of parts: `{"fc": 10}`."""
    parts = decay_groups(module, weight_decay, lr, groups, layer_decay)
    optimizer = torch.optim.SGD(parts, lr=lr, momentum=momentum, nesterov=nesterov)
    return with_schedule(optimizer, total, **schedule)


def adamw(
    module: nn.Module,
    total: int,
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.05,
    groups: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    no_decay: Sequence[str] | None = None,
    **schedule: Any,
) -> dict[str, Any]:
    """AdamW (Loshchilov & Hutter 2019); `groups` multiplies the rate of parts: `{"fc": 10}`."""
    parts = decay_groups(module, weight_decay, lr, groups, layer_decay, no_decay)
    optimizer = torch.optim.AdamW(parts, lr=lr, betas=(betas[0], betas[1]))
    return with_schedule(optimizer, total, **schedule)


def rmsprop(
    module: nn.Module,
    total: int,
    *,
    lr: float,
    alpha: float = 0.9,
    momentum: float = 0.9,
    eps: float = 1.0,
    weight_decay: float = 0.0,
    groups: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    **schedule: Any,
) -> dict[str, Any]:
    """RMSprop with momentum (Tieleman & Hinton 2012); `groups` as above."""
    parts = decay_groups(module, weight_decay, lr, groups, layer_decay)
    optimizer = torch.optim.RMSprop(parts, lr=lr, alpha=alpha, momentum=momentum, eps=eps)
    return with_schedule(optimizer, total, **schedule)
