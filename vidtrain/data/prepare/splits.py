"""Splits where the authors give none: whole groups, every class in proportion, always the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from vidtrain.data.manifest import Annotations
from vidtrain.types import UserError

SPLITS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validate", "validation", "dev"),
    "test": ("test", "testing", "testset"),
}
ONE_NAME = {alias: name for name, aliases in SPLITS.items() for alias in aliases}


def split_name(name: str) -> str:
    """Bring `Training`, `validate` and their like to `train`, `val`, `test`; leave other names."""
    return ONE_NAME.get(name.strip().lower(), name.strip())


def carve_validation(annotations: Annotations, val_fraction: float, seed: int) -> Annotations:
    """Move a share of the training rows into a validation split, where the dataset has none.

    Rows of one group, and pieces of one file, stay together. A dataset that has rows in `val`, or
    none in `train`, comes back as it is, and so does any with a `val_fraction` of 0.

    Raises:
        UserError: `val_fraction` is not a share.
    """
    check_fraction("data.val_fraction", val_fraction)
    if not val_fraction:
        return annotations
    splits = np.array(annotations.rows["split"].to_pylist(), dtype=object)
    train = np.flatnonzero(splits == "train")
    if not len(train) or (splits == "val").any():
        return annotations
    rows = annotations.rows.take(train)
    chosen = train[held_out(groups_of(rows), rows["labels"].to_pylist(), val_fraction, seed)]
    if not len(chosen):
        note = "no validation split: too few groups of training videos to take one from"
        return replace(annotations, notes=[*annotations.notes, note])
    splits[chosen] = "val"
    official = dict(annotations.official)
    if "train" in official:  # what is missing of the training set stays missing from the rest of it
        official |= {"train": official["train"] - len(chosen), "val": len(chosen)}
    at = annotations.rows.column_names.index("split")
    column = pa.array(splits, pa.string()).dictionary_encode()
    return replace(
        annotations, rows=annotations.rows.set_column(at, "split", column), official=official
    )


def groups_of(rows: pa.Table) -> list[str]:
    """Name the group of each row: its own where it has one, else its file."""
    paths: list[str] = rows["path"].to_pylist()
    if "group" not in rows.column_names:
        return paths
    named = rows["group"].to_pylist()
    # "\0" keeps a file apart from a group that happens to have its name
    return [f"\0{p}" if g is None else g for g, p in zip(named, paths, strict=True)]


def held_out(
    groups: Sequence[str], labels: Sequence[Sequence[int]], fraction: float, seed: int
) -> np.ndarray:
    """Choose whole groups that hold about `fraction` of every class.

    Groups come in the order of a hash of seed and name, which no machine and no other group
    changes. First those are taken that fit into what each class still lacks, then those that bring
    the counts nearer to what is wanted. A class of three groups or more gives at least one row.

    Returns:
        (N,) bool, which rows are chosen.
    """
    members: dict[str, dict[int, int]] = defaultdict(dict)  # group -> class -> rows
    for group, classes in zip(groups, labels, strict=True):
        counts = members[group]
        # a row without a label counts as a class of its own, so that such rows are spread too
        for c in classes or (-1,):
            counts[c] = counts.get(c, 0) + 1
    sizes: dict[int, int] = defaultdict(int)
    spread: dict[int, int] = defaultdict(int)  # in how many groups not chosen a class is
    for counts in members.values():
        for c, n in counts.items():
            sizes[c] += n
            spread[c] += 1
    wanted = {
        c: max(fraction * size, 1.0 if fraction and spread[c] > 2 else 0.0)
        for c, size in sizes.items()
    }
    held = dict.fromkeys(sizes, 0)
    chosen: set[str] = set()

    def fits(counts: dict[int, int]) -> bool:
        return all(held[c] + n <= wanted[c] for c, n in counts.items())

    def helps(counts: dict[int, int]) -> bool:
        before = sum(abs(held[c] - wanted[c]) for c in counts)
        return sum(abs(held[c] + n - wanted[c]) for c, n in counts.items()) < before

    order = sorted(members, key=lambda group: (_hash(seed, group), group))
    for wants in (fits, helps):
        for group in order:
            counts = members[group]
            # the last group of a class stays: what was never trained cannot be recognised
            if group not in chosen and wants(counts) and all(spread[c] > 1 for c in counts):
                chosen.add(group)
                for c, n in counts.items():
                    held[c] += n
                    spread[c] -= 1
    return np.array([group in chosen for group in groups], dtype=bool)


def check_fraction(key: str, fraction: float) -> None:
    """Refuse a fraction that is none.

    Raises:
        UserError: not in `0 <= fraction < 1`.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"{key} is {fraction}; it is a share of the videos, from 0 up to below 1")


def _hash(seed: int, group: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{group}".encode(), digest_size=8).digest()
