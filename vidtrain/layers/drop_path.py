"""Stochastic depth: in training, some samples skip a residual block.

Huang, Sun, Liu, Sedra, Weinberger. "Deep Networks with Stochastic Depth." ECCV 2016.
https://arxiv.org/abs/1603.09382
"""

from __future__ import annotations

from torch import nn
from torchvision.ops import StochasticDepth

from vidtrain.types import UserError


def drop_path(rate: float) -> nn.Module:
    """Make what a block's branch goes through before its shortcut is added.

    In training a sample's whole branch is 0 with probability `rate`, and is scaled by 1 / (1 - rate)
    otherwise. In a test, and with rate 0, nothing is done.
    """
    return StochasticDepth(rate, "row") if rate else nn.Identity()


def path_rates(rate: float, blocks: int) -> list[float]:
    """Give each block's rate: from 0 of the first block they rise by equal steps to `rate` of the last.

    The paper's own count (section 3, equation 4) begins one step later, with the stem for the block of
    rate 0: that is `path_rates(rate, blocks + 1)[1:]`.

    Raises:
        UserError: `rate` is no share below 1.
    """
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not is_number or not 0 <= rate < 1:
        raise UserError(
            f"model.drop_path is {rate}; it is the share of samples that skip the last block,"
            " from 0 to below 1"
        )
    return [rate * number / max(blocks - 1, 1) for number in range(blocks)]
