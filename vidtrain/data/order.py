"""In which order the rows come: a pure function of seed, epoch and rank.

Because nothing else enters, a run that stopped in the middle of an epoch goes on with the very rows
and random draws that were still to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from vidtrain.data.multigrid import Shape

# The row of the split, the seed of its random draws, and its clip's shape where that is not the default.
Key = tuple[int, int] | tuple[int, int, Shape]


class TrainingOrder(Sampler[list[Key]]):
    """Batches of a shuffled epoch, dealt out to the ranks: every row once, as many batches a rank.

    Rows that do not fill a last batch make all batches a little smaller instead: no rank has fewer
    than the others and would leave them waiting, and none has one of a single row. Without
    `shuffle` every epoch is the first one again, to the clip: what learning by heart is tried on.

    Args:
        rows: how many there are.
        batch_size: of one rank, at most.
        seed: of shuffles and of the samples' random draws.
        rank: this one.
        world: how many ranks there are.
        shuffle: anew each epoch.
        weights: of the rows, which are then drawn by chance, again and again, in proportion; None: each once.
        drop_last: make every batch `batch_size` large, unless there is not even one; the rows that
            are left over wait for the next epoch's shuffle, and without `shuffle` for ever.
        cycle: of an epoch, the shapes that its batches have in turn, their sizes among them; None: all
            are of `batch_size`.

    Attributes:
        epoch: which shuffle.
        start: batches of this epoch that are done already; back to 0 after one pass.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        shuffle: bool = True,
        drop_last: bool = False,
        weights: np.ndarray | None = None,
        cycle: Callable[[int], Sequence[Shape]] | None = None,
    ) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world, self.shuffle = rank, world, shuffle
        self.drop_last = drop_last
        self.weights = None if weights is None else weights / weights.sum()
        self.cycle = cycle
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
        return len(self._edges()) - 1

    def _edges(self) -> np.ndarray:
        """Say where each batch of all ranks begins in the shuffled rows; and where the last one ends."""
        if not self.rows:
            return np.zeros(1, int)
        turns = [shape.videos for shape in self.cycle(self.epoch)] if self.cycle else []
        sizes = self.world * np.array(turns or [self.batch_size])
        most = np.resize(sizes, -(-self.rows // sizes.min())).cumsum()  # if all were full
        if self.drop_last:
            count = int(np.searchsorted(most, self.rows, "right"))
        else:
            # with batches of one row there may be too few left for every rank to have another
            count = min(int(np.searchsorted(most, self.rows)) + 1, self.rows // self.world)
        full = np.concatenate([[0], most[: max(1, count)]])
        used = min(self.rows, int(full[-1]))
        # A row for each rank first; of the others, all batches lack the same share.
        least = self.world * np.arange(len(full))
        lacking = max(1, int(full[-1] - least[-1]))
        edges: np.ndarray = least + (full - least) * (used - int(least[-1])) // lacking
        return edges

    def __iter__(self) -> Iterator[list[Key]]:
        start, self.start = self.start, 0
        edges = self._edges()
        rng = np.random.default_rng([self.seed, self.epoch if self.shuffle else 0])
        if self.weights is None:
            order = rng.permutation(self.rows)
        else:
            order = rng.choice(self.rows, self.rows, p=self.weights)
        seeds = rng.integers(2**62, size=self.rows)
        turns = [(shape,) for shape in self.cycle(self.epoch)] if self.cycle else [()]
        for batch in range(start, len(edges) - 1):
            rows = order[edges[batch] + self.rank : edges[batch + 1] : self.world]
            if not len(rows):  # fewer rows than ranks: nobody may wait for a rank without a batch
                rows = order[:1]
            shape = turns[batch % len(turns)]
            yield [
                (row, seed, *shape)
                for row, seed in zip(rows.tolist(), seeds[rows].tolist(), strict=True)
            ]


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
