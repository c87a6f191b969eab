"""In which order the rows come: a pure function of seed, epoch and rank.

Because nothing else enters, a run that stopped in the middle of an epoch goes on with the very rows
and random draws that were still to come.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]  # the row of the split, and the seed of its random draws


class TrainingOrder(Sampler[list[Key]]):
    """Batches of a shuffled epoch, dealt out to the ranks; each rank has as many as the others.

    The last rows that do not fill a batch on every rank wait for the next epoch's shuffle, unless
    there is not even one full batch. Without `shuffle` every epoch is the first one again, to the
    clip: what learning by heart is tried on.

    Attributes:
        epoch: which shuffle.
        start: batches of this epoch that are done already; back to 0 after one pass.
    """

    def __init__(
        self, rows: int, batch_size: int, seed: int, rank: int, world: int, shuffle: bool = True
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world, self.shuffle = rank, world, shuffle
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle."""
        self.epoch = epoch

    @property
    def sampler(self) -> TrainingOrder:
        """Where Lightning looks for `set_epoch`: the sampler inside a batch sampler, here itself."""
        return self

    def __len__(self) -> int:
        """Count a rank's batches in a whole epoch, wherever it starts."""
        return max(1, self.rows // (self.batch_size * self.world)) if self.rows else 0

    def __iter__(self) -> Iterator[list[Key]]:
        start, self.start = self.start, 0
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        order = rng.permutation(self.rows)
        seeds = rng.integers(2**62, size=self.rows)
        share = order[self.rank :: self.world]
        if not len(share):  # fewer rows than ranks: nobody may wait for a rank without a batch
            share = order[:1]
        for batch in range(start, len(self)):
            rows = share[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(int(row), int(seeds[row])) for row in rows]


class EvaluationOrder(Sampler[list[Key]]):
    """Every row once, on one rank or another; nothing is repeated to make the ranks even."""

    def __init__(self, rows: int, batch_size: int, rank: int, world: int) -> None:
        self.rows, self.batch_size, self.rank, self.world = rows, batch_size, rank, world

    def __len__(self) -> int:
        """Count this rank's batches."""
        return -(-len(range(self.rank, self.rows, self.world)) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        share = range(self.rank, self.rows, self.world)
        for first in range(0, len(share), self.batch_size):
            yield [(row, row) for row in share[first : first + self.batch_size]]
