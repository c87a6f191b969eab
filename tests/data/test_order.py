"""The order of the rows: everyone once, on one rank, and the same again after a stop."""

import itertools

import pytest

from vidtrain.data.order import EvaluationOrder, TrainingOrder


def epoch(order, number):
    order.set_epoch(number)
    return list(order)


@pytest.mark.parametrize(
    ("rows", "world", "batch"), [(64, 1, 8), (64, 4, 2), (67, 4, 2), (7, 2, 3)]
)
def test_training_sees_each_row_at_most_once_and_ranks_are_even(rows, world, batch):
    orders = [TrainingOrder(rows, batch, 0, rank, world) for rank in range(world)]
    batches = [epoch(order, 0) for order in orders]
    seen = [row for rank in batches for part in rank for row, _ in part]
    assert len(seen) == len(set(seen))
    assert len({len(part) for part in batches}) == 1
    assert len(seen) >= rows - world * batch + 1
    assert all(len(order) == len(part) for order, part in zip(orders, batches, strict=True))


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
