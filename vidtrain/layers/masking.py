"""Which tokens of a clip are hidden from a masked autoencoder, and what is to be said of them.

Tong et al. "VideoMAE." NeurIPS 2022. https://arxiv.org/abs/2203.12602 (tubes, section 3.3)
Wang et al. "VideoMAE V2." CVPR 2023. https://arxiv.org/abs/2303.16727 (running cells, section 3.2)
Feichtenhofer et al. "Masked Autoencoders As Spatiotemporal Learners." NeurIPS 2022.
https://arxiv.org/abs/2205.09113 (random tokens, section 3)
Qing et al. "MAR: Masked Autoencoders for Efficient Action Recognition." 2022.
https://arxiv.org/abs/2207.11660 (running cells, where V2 has them from)

Numbers are drawn on the CPU, so that a mask hangs on the generator alone and not on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vidtrain.types import UserError

CELL = 2  # rows and columns of a running cell


class Chosen(NamedTuple):
    """Tokens of each clip, as many of every clip."""

    flags: Tensor  # (B, N) bool
    count: int  # of each clip, known without looking at the flags


class Mask(NamedTuple):
    """What a masked autoencoder sees of each clip and what it predicts: numbers of tokens, ascending."""

    visible: Tensor  # (B, n)
    predicted: Tensor  # (B, m)
    counted: Tensor  # (B, m) bool: the loss is over these; the encoder has seen the others

    def to(self, device: torch.device) -> Mask:
        """Move it."""
        return Mask(*(part.to(device, non_blocking=True) for part in self))


def check_share(share: float, key: str = "model.mask_ratio") -> float:
    """Refuse what is no share of tokens.

    Raises:
        UserError: it is not between 0 and 1, both excluded.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"{key} is {share!r}; it must be between 0 and 1, such as 0.9")
    return float(share)


def tube(
    batch: int, grid: Sequence[int], ratio: float, generator: torch.Generator | None = None
) -> Chosen:
    """Hide the same places of every slot in time, drawn anew for each clip.

    Args:
        batch: B.
        grid: t, h, w.
        ratio: Share of the h · w places that is hidden, rounded down to whole ones.
        generator: Where the numbers come from; None: torch's own.

    Returns:
        The hidden ones of the t · h · w tokens.

    Raises:
        UserError: nothing would be hidden, or nothing seen.
    """
    slots, count = grid[0], grid[1] * grid[2]
    hidden = _some(int(ratio * count), count, ratio)
    flags = _shuffled(batch, count, generator) < hidden
    return Chosen(flags.repeat(1, slots), hidden * slots)


def random(
    batch: int, grid: Sequence[int], ratio: float, generator: torch.Generator | None = None
) -> Chosen:
    """Hide any tokens, wherever they lie in space and time; what is left is rounded down.

    Arguments and result: as of `tube`, but `ratio` is a share of all t · h · w.
    """
    count = grid[0] * grid[1] * grid[2]
    hidden = _some(count - int(count * (1 - ratio)), count, ratio)
    return Chosen(_shuffled(batch, count, generator) < hidden, hidden)


def _some(hidden: int, count: int, ratio: float) -> int:
    """Refuse a mask that hides nothing or everything."""
    if not 0 < hidden < count:
        raise UserError(
            f"model.mask_ratio={ratio} hides {hidden} of {count} patches; some must be hidden and some seen:"
            " set another ratio, or a larger clip.size"
        )
    return hidden


def _shuffled(batch: int, count: int, generator: torch.Generator | None) -> Tensor:
    """Give each of `count` things a place in a row, in each clip in another order: (B, count)."""
    return torch.rand(batch, count, generator=generator, device="cpu").argsort(1).argsort(1)


def running_cells(
    batch: int, grid: Sequence[int], ratio: float, generator: torch.Generator | None = None
) -> Chosen:
    """Leave places out that take turns: cells of 2 x 2, in which the pattern moves on by one each slot.

    The four places of a cell, row by row, stand in a ring, a `ratio` of which is left out. Clips differ
    in where the ring begins.

    Args:
        batch: B.
        grid: t, h, w; h and w are even.
        ratio: Share that is left out: 0.25, 0.5 or 0.75.
        generator: Where the numbers come from; None: torch's own.

    Returns:
        Those of the t · h · w tokens that are left out.

    Raises:
        UserError: cells do not fill the grid, or a cell cannot be divided so.
    """
    slots, rows, columns = grid
    if rows % CELL or columns % CELL:
        raise UserError(
            f"the decoder's mask has cells of 2 x 2 patches, and frames have {rows} x {columns} of them;"
            " make clip.size (in a test views.size) a multiple of two patches"
        )
    ring = CELL * CELL
    left_out = ratio * ring
    if not 0 < left_out < ring or left_out != int(left_out):
        raise UserError(f"model.decoder_mask_ratio is {ratio}; it must be 0.25, 0.5 or 0.75")
    start = torch.randint(ring, (batch, 1, 1, 1), generator=generator, device="cpu")
    slot, row, column = (torch.arange(size, device="cpu") for size in grid)
    within = CELL * (row % CELL)[:, None] + column % CELL
    flags = (within + slot[:, None, None] + 1 + start) % ring < left_out
    return Chosen(flags.flatten(1), int(ratio * slots * rows * columns))


def make_mask(hidden: Chosen, left_out: Chosen | None = None) -> Mask:
    """Say what is seen and what is predicted.

    Args:
        hidden: From the encoder.
        left_out: What the decoder is not asked for; None: it is asked for what is hidden and no more.
    """
    visible, others = _divide(hidden)
    if left_out is None:
        return Mask(visible, others, torch.ones_like(others, dtype=torch.bool))
    predicted, _ = _divide(left_out)
    return Mask(visible, predicted, hidden.flags.gather(1, predicted))


def _divide(chosen: Chosen) -> tuple[Tensor, Tensor]:
    """List the numbers of the tokens that are not chosen, and of those that are."""
    numbers = chosen.flags.int().argsort(dim=1, stable=True)
    rest = numbers.shape[1] - chosen.count
    return numbers[:, :rest], numbers[:, rest:]


def pick(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Take tokens by their numbers: (B, N, D) or (1, N, D), and (B, n) -> (B, n, D)."""
    if len(tokens) != len(numbers):
        return tokens[0, numbers]
    return tokens.gather(1, numbers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
