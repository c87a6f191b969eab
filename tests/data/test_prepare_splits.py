from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from vidtrain.data.manifest import Annotations, make_rows
from vidtrain.data.prepare.splits import carve_validation, held_out, split_name
from vidtrain.types import UserError


def test_single_files_are_taken_in_proportion_to_each_class() -> None:
    labels = [[0]] * 100 + [[1]] * 50 + [[2]] * 10
    chosen = held_out([f"{i}.mp4" for i in range(160)], labels, 0.2, seed=0)
    counts = Counter(c for (c,), is_chosen in zip(labels, chosen, strict=True) if is_chosen)
    assert counts == {0: 20, 1: 10, 2: 2}


def test_the_choice_is_the_same_on_every_machine() -> None:
    names = [f"{i}.mp4" for i in range(10)]
    chosen = held_out(names, [[0]] * 10, 0.3, seed=0)
    assert [n for n, c in zip(names, chosen, strict=True) if c] == ["1.mp4", "2.mp4", "4.mp4"]
    assert (held_out(names[::-1], [[0]] * 10, 0.3, seed=0)[::-1] == chosen).all()
    assert any((held_out(names, [[0]] * 10, 0.3, seed=s) != chosen).any() for s in (1, 2))


def test_whole_groups_are_taken_and_classes_stay_near_their_share() -> None:
    rng = np.random.default_rng(0)
    groups, labels = [], []
    for group in range(60):
        for _ in range(rng.integers(1, 12)):
            groups.append(f"g{group}")
            labels.append([int(rng.integers(0, 3))])
    for seed in range(5):
        chosen = held_out(groups, labels, 0.2, seed)
        sides = defaultdict(set)
        for group, is_chosen in zip(groups, chosen, strict=True):
            sides[group].add(bool(is_chosen))
        assert all(len(side) == 1 for side in sides.values())
        for c in range(3):
            mine = np.array([label == [c] for label in labels])
            assert abs(chosen[mine].mean() - 0.2) < 0.06


def test_every_class_keeps_a_group_and_three_groups_give_one() -> None:
    labels = [[0]] + [[1]] * 2 + [[2]] * 3 + [[3, 0]] * 3
    chosen = held_out([str(i) for i in range(9)], labels, 0.1, seed=3)
    counts = Counter(c for row, taken in zip(labels, chosen, strict=True) if taken for c in row)
    assert counts[1] == 0
    assert counts[2] == 1
    assert counts[3] == 1
    big = held_out(["a", "b"], [[0], [0]], 0.9, seed=0)
    assert big.sum() == 1  # the last group of a class stays


def test_rows_without_labels_are_spread_too() -> None:
    assert held_out([str(i) for i in range(50)], [[]] * 50, 0.2, seed=0).sum() == 10
    assert held_out([str(i) for i in range(50)], [[0]] * 50, 0.0, seed=0).sum() == 0


def annotations(**kwargs: object) -> Annotations:
    rows = make_rows(
        [f"{i}.mp4" for i in range(40)],
        [[i % 2] for i in range(40)],
        ["train"] * 30 + ["test"] * 10,
        **kwargs,
    )
    return Annotations(rows, ["a", "b"], {"train": 31, "test": 10}, ["a note"])


def test_validation_is_carved_out_of_training() -> None:
    carved = carve_validation(annotations(), 0.2, seed=0)
    splits = carved.rows["split"].to_pylist()
    assert Counter(splits) == {"train": 24, "val": 6, "test": 10}
    assert splits[30:] == ["test"] * 10
    assert Counter(i % 2 for i, s in enumerate(splits) if s == "val") == {0: 3, 1: 3}
    # one training video was missing, and still is
    assert carved.official == {"train": 25, "val": 6, "test": 10}
    assert carved.label_names == ["a", "b"] and carved.notes == ["a note"]
    again = carve_validation(carved, 0.2, seed=1)
    assert again.rows["split"].to_pylist() == splits  # there is a validation split now


def test_groups_and_pieces_of_a_file_stay_together() -> None:
    carved = carve_validation(annotations(group=[f"g{i // 4}" for i in range(40)]), 0.25, seed=0)
    sides = defaultdict(set)
    for i, split in enumerate(carved.rows["split"].to_pylist()):
        sides[i // 4].add(split)
    assert {"train", "val"} not in sides.values()
    assert sum(side == {"val"} for side in sides.values()) >= 1

    rows = make_rows(
        [f"{i // 5}.mp4" for i in range(50)],
        [[i % 2] for i in range(50)],
        ["train"] * 50,
        start=[float(i % 5) for i in range(50)],
    )
    splits = carve_validation(Annotations(rows, ["a", "b"]), 0.2, seed=0).rows["split"].to_pylist()
    assert all(len(set(splits[i : i + 5])) == 1 for i in range(0, 50, 5))
    assert splits.count("val") == 10


def test_nothing_is_carved_where_nothing_should_be() -> None:
    given = annotations()
    assert carve_validation(given, 0.0, seed=0) is given
    one = Annotations(make_rows(["a"], [[0]], ["train"]), ["a"])
    assert "no validation split" in carve_validation(one, 0.5, seed=0).notes[-1]
    for fraction in (-0.1, 1.0, 20):
        with pytest.raises(UserError, match=r"data\.val_fraction"):
            carve_validation(given, fraction, seed=0)


def test_split_names() -> None:
    names = ["Training", " validate", "VAL", "valid", "testing", "holdout", ""]
    assert [split_name(n) for n in names] == ["train", "val", "val", "val", "test", "holdout", ""]
