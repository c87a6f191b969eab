"""The order of the rows: everyone once, on one rank, and the same again after a stop."""

import itertools

import numpy as np
import pytest

from vidtrain.data.order import EvaluationOrder, TrainingOrder


def epoch(order, number):
    order.set_epoch(number)
    return list(order)


@pytest.mark.parametrize(
    ("rows", "world", "batch"),
    [(64, 1, 8), (64, 4, 2), (67, 4, 2), (7, 2, 3), (65, 64, 2), (129, 64, 1), (1000, 7, 33)],
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_training_sees_each_row_once_and_ranks_are_even(rows, world, batch, drop_last):
    orders = [
        TrainingOrder(rows, batch, 0, rank, world, drop_last=drop_last) for rank in range(world)
    ]
    batches = [epoch(order, 0) for order in orders]
    seen = [row for rank in batches for part in rank for row, _ in part]
    sizes = {len(part) for rank in batches for part in rank}
    assert len(seen) == len(set(seen))
    assert len({len(part) for part in batches}) == 1
    assert all(len(order) == len(part) for order, part in zip(orders, batches, strict=True))
    assert max(sizes) <= batch and min(sizes) >= 1
    if drop_last:
        assert len(seen) >= rows - world * batch + 1
        assert len(sizes) == 1 or len(batches[0]) == 1
    else:
        assert len(seen) == rows or batch == 1 and len(seen) == rows - rows % world
        assert max(sizes) - min(sizes) <= 1


def test_64_ranks_of_8_workers_see_every_video_of_sports_1m_once():
    rows, world, workers, batch = 1_133_158, 64, 8, 32
    seen = np.zeros(rows, np.uint8)
    steps = set()
    for rank in range(world):
        order = TrainingOrder(rows, batch, 0, rank, world)
        shares = [0] * workers
        for number, part in enumerate(order):
            seen[[row for row, _ in part]] += 1
            shares[number % workers] += len(part)  # the loader deals batches out in turn
        steps.add(len(order))
        assert max(shares) - min(shares) <= batch
    assert (seen == 1).all()
    assert len(steps) == 1  # nobody waits for a rank that has no more
    seen[:] = 0
    for rank in range(world):
        for part in EvaluationOrder(rows, batch, rank, world):
            seen[[row for row, _ in part]] += 1
    assert (seen == 1).all()


def test_epochs_and_seeds_differ_and_can_be_had_again():
    order = TrainingOrder(32, 4, 1, 0, 1)
    first, second = epoch(order, 0), epoch(order, 1)
    assert first != second
    assert epoch(TrainingOrder(32, 4, 1, 0, 1), 0) == first
    assert epoch(TrainingOrder(32, 4, 2, 0, 1), 0) != first
    seeds = [seed for part in first + second for _, seed in part]
    assert len(set(seeds)) == len(seeds)  # a row is not augmented alike in two epochs


def test_a_stopped_epoch_goes_on_with_what_was_left():
    order = TrainingOrder(32, 4, 0, 0, 1)
    whole = epoch(order, 3)
    order.start = 5
    assert epoch(order, 3) == whole[5:]
    assert len(order) == 8  # the length stays that of a whole epoch
    assert epoch(order, 3) == whole  # and the next pass starts at the beginning


def test_fewer_rows_than_a_batch_still_make_one():
    assert len(epoch(TrainingOrder(3, 8, 0, 0, 1), 0)[0]) == 3
    assert len(epoch(TrainingOrder(1, 8, 0, 1, 2), 0)[0]) == 1  # nobody waits for a rank without


@pytest.mark.parametrize(("rows", "world", "batch"), [(10, 1, 4), (10, 3, 2), (2, 4, 1)])
def test_evaluation_sees_every_row_exactly_once(rows, world, batch):
    orders = [EvaluationOrder(rows, batch, rank, world) for rank in range(world)]
    seen = sorted(row for part in itertools.chain(*orders) for row, _ in part)
    assert seen == list(range(rows))
    assert [len(list(order)) for order in orders] == [len(order) for order in orders]


def test_weighted_rows_come_in_proportion():
    weights = np.array([1.0] * 90 + [9.0] * 10)
    order = TrainingOrder(100, 10, seed=0, rank=0, world=1, weights=weights)
    seen: list[int] = []
    for epoch in range(40):
        order.set_epoch(epoch)
        rows = [row for batch in order for row, _ in batch]
        assert len(rows) == 100
        seen += rows
    assert 0.45 < np.mean(np.array(seen) >= 90) < 0.55
    halves = [TrainingOrder(100, 5, 0, rank, 2, weights=weights) for rank in (0, 1)]
    both = sorted(key for half in halves for batch in half for key in batch)
    assert both == sorted(
        key for batch in TrainingOrder(100, 10, 0, 0, 1, weights=weights) for key in batch
    )
