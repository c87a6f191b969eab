"""Your own videos: a folder per class, split folders with class folders, or a table; or without labels."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidtrain.data.manifest import MAX_CLASSES, OUTSIDE, Annotations, make_rows
from vidtrain.data.prepare.scan import check_root, find_videos, keep_found, leads_to
from vidtrain.data.prepare.splits import (
    carve_validation,
    check_fraction,
    groups_of,
    held_out,
    split_name,
)
from vidtrain.data.prepare.table import TABLE_EXTENSIONS, need_column, read_table
from vidtrain.types import UserError

COLUMNS = {"path": "path", "label": "label", "split": "split", "group": "group"}
COLUMNS |= {"start": "start", "end": "end"}
SPLITS = {"train", "val", "test"}


def prepare(
    root: Path,
    num_classes: int | None = None,
    annotations: str | None = None,
    path: str = "path",
    label: str | None = "label",
    split: str = "split",
    group: str = "group",
    start: str = "start",
    end: str = "end",
    multi_label: bool = False,
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    split_seed: int = 0,
) -> Annotations:
    """Read a folder of videos, with a table or without.

    Without splits, `test_fraction` of the videos become the test split; then, and also where there
    is a test split but no validation split, `val_fraction` of the training videos that one. Whole
    groups are moved, all classes in proportion.

    Args:
        root: the folder of the videos.
        num_classes: when the table has only some of them, as numbers below this.
        annotations: a csv, tsv, jsonl or Parquet table, relative to root (or to where the command
            runs). None takes the one `videos.*` or `annotations.*` in root, else the folders.
        path: column of the videos' paths: relative to root, or absolute below it.
        label: column of class names or numbers. Numbers are class numbers when they are exactly 0
            to K - 1 or when `num_classes` is more than there are, else names in numeric order. None: labels
            are not read, and without a table videos may lie in any folders, for `task=masked_pretraining`.
        split: column of `train`, `val`, `test`; may be absent.
        group: column of what must stay together (a person, a source video); may be absent.
        start: column of seconds where a piece begins; may be absent.
        end: column of seconds where it ends; may be absent.
        multi_label: several labels a row: `a|b` or a list.
        test_fraction: see above.
        val_fraction: see above.
        split_seed: of the splits that are made.

    Raises:
        UserError: naming the folder, file, column or row and what is wrong there.
    """
    root = check_root(root, "your videos: a folder per class, or a table beside them")
    check_fraction("data.test_fraction", test_fraction)
    check_fraction("data.val_fraction", val_fraction)
    found = _find_table(root, annotations)
    if found is None:
        result = from_class_folders(root) if label is not None else from_any_folders(root)
    else:
        names = dict(path=path, split=split, group=group, start=start, end=end)
        if label is not None:
            names["label"] = label
        result = from_table(root, found, names, multi_label, num_classes)
    if label is not None and len(result.label_names) < 2 and not multi_label:
        raise UserError(
            f"{found or root} has one class only, '{result.label_names[0]}';"
            " a classifier needs two: is data.root or data.label right?"
        )
    if result.rows["split"].unique().to_pylist() == [""]:
        result = _split(result, test_fraction, split_seed)
    return carve_validation(result, val_fraction, split_seed)


def from_class_folders(root: Path) -> Annotations:
    """Read `root/<class>/...` or `root/<split>/<class>/...`; the latter if all folders are splits.

    Without split folders the column `split` is empty text.
    """
    notes: list[str] = []
    paths = _videos(root, notes)
    parts = [p.split("/") for p in paths]
    tops = {p[0] for p in parts if len(p) > 1}
    are_splits = {split_name(top) for top in tops} <= SPLITS
    by_split = are_splits and any(len(p) > 2 for p in parts)
    if are_splits and not by_split and tops:
        notes.append(
            f"{', '.join(sorted(tops))} are taken for classes, as they hold no class folders;"
            " data.label=null takes them for splits of videos without labels"
        )
    depth = 1 if by_split else 0
    inside = [len(p) > depth + 1 for p in parts]
    if not any(inside):
        raise UserError(
            f"the videos lie directly in {root}; put them into a folder per class, or name a table with"
            " data.annotations=FILE; without labels, for a model named *_pretrain: data.label=null"
        )
    if not all(inside):
        notes.append(f"{inside.count(False):,} videos are left out: they are in no class folder")
    parts = [p for p, is_inside in zip(parts, inside, strict=True) if is_inside]
    label_names = sorted({p[depth] for p in parts})
    number = {name: i for i, name in enumerate(label_names)}
    rows = make_rows(
        ["/".join(p) for p in parts],
        [[number[p[depth]]] for p in parts],
        [split_name(p[0]) if by_split else "" for p in parts],
    )
    return Annotations(rows, label_names, notes=notes)


def from_any_folders(root: Path) -> Annotations:
    """Take every video below root, without labels.

    Where the folders in root are all splits (`train`, `val`, `test`), they say which; else `split` is empty.
    """
    notes: list[str] = []
    paths = _videos(root, notes)
    tops = [split_name(path.partition("/")[0]) for path in paths]
    by_split = set(tops) <= SPLITS
    rows = make_rows(paths, [[] for _ in paths], tops if by_split else [""] * len(paths))
    return Annotations(rows, [], notes=notes)


def _videos(root: Path, notes: list[str]) -> list[str]:
    """List the videos below root; there must be one."""
    paths: list[str] = find_videos(root, notes)["path"].to_pylist()
    if not paths:
        raise UserError(f"there is no video under {root} (looked for .mp4, .avi, .mkv, .webm, ...)")
    return paths


def from_table(
    root: Path,
    source: Path,
    names: dict[str, str],
    multi_label: bool = False,
    num_classes: int | None = None,
) -> Annotations:
    """Read a table whose columns are called `names`; `split` is empty text where it has none.

    Where `names` has no `label`, no row has one, and there are no classes.
    """
    table = read_table(source)
    notes: list[str] = []
    for key, name in names.items():
        if key in ("path", "label") or name != COLUMNS[key]:  # the others may be absent
            need_column(table, name, key, source)
    columns = {key: table[name] for key, name in names.items() if name in table.column_names}
    labels: Any = [[] for _ in range(len(table))]
    label_names: list[str] = []
    if "label" in names:
        labels, label_names = _labels(columns["label"], multi_label, num_classes, names, source)
    pieces: dict[str, Any] = {
        key: _seconds(columns[key], names[key], source)
        for key in ("start", "end")
        if key in columns and columns[key].null_count < len(table)
    }
    _check_pieces(pieces, source)
    rows = make_rows(
        _existing(columns["path"].cast(pa.string()).to_pylist(), root, source),
        labels,
        [split_name(s or "") for s in columns["split"].cast(pa.string()).to_pylist()]
        if "split" in columns
        else pa.repeat("", len(table)),
        **pieces,
        group=_text(columns["group"]) if "group" in columns else None,
    )
    official = {}
    if pc.any(pc.not_equal(rows["split"].cast(pa.string()), "")).as_py():
        rows = _drop(rows, pc.equal(rows["split"].cast(pa.string()), ""), "no split", source, notes)
        official = dict(Counter(rows["split"].to_pylist()))
    rows = keep_found(rows, root, str(source), notes)
    if not multi_label and "label" in names:
        unknown = pc.equal(pc.list_value_length(rows["labels"]), 0)
        tested = pc.equal(rows["split"].cast(pa.string()), "test")
        rows = _drop(rows, pc.and_not(unknown, tested), "no label", source, notes)
    return Annotations(rows, label_names, official, notes)


def _find_table(root: Path, annotations: str | None) -> Path | None:
    if annotations is not None:
        below = root / Path(annotations).expanduser()
        return below if below.is_file() else Path(annotations).expanduser()
    found = sorted(
        p
        for p in root.iterdir()
        if p.stem.lower() in ("videos", "annotations")
        and p.suffix.lower() in TABLE_EXTENSIONS
        and p.is_file()
    )
    if len(found) > 1:
        raise UserError(
            f"{root} has {', '.join(p.name for p in found)}; choose with data.annotations=FILE"
        )
    return found[0] if found else None


def _labels(
    column: pa.ChunkedArray,
    multi_label: bool,
    num_classes: int | None,
    names: dict[str, str],
    source: Path,
) -> tuple[pa.Array, list[str]]:
    """Give the class numbers of each row and the classes' names."""
    lists = _label_lists(column.combine_chunks(), multi_label)
    most = pc.max(pc.list_value_length(lists)).as_py()
    if most > 1 and not multi_label:
        raise UserError(
            f"{source}: rows have up to {most} labels in '{names['label']}';"
            " set data.multi_label=true, or name another column with data.label="
        )
    values = lists.flatten()
    if not len(values):
        raise UserError(f"{source}: column '{names['label']}' is empty")
    kinds: list[str] = pc.unique(values).to_pylist()
    if all(re.fullmatch("[0-9]+", kind) for kind in kinds):
        kinds.sort(key=lambda kind: (int(kind), kind))
        highest, more = int(kinds[-1]), (num_classes or 0) > len(kinds)
        if more and highest >= (num_classes or 0):
            raise UserError(
                f"{source}: column '{names['label']}' has the number {highest}, but"
                f" data.num_classes is {num_classes}: class numbers begin with 0 and stay below it"
            )
        if more or [int(kind) for kind in kinds] == list(range(len(kinds))):
            kinds = [str(i) for i in range(max(num_classes or 0, len(kinds)))]
            values = pc.cast(pc.cast(values, pa.int64()), pa.string())  # "007" is 7
    else:
        kinds.sort()
    if len(kinds) > MAX_CLASSES:
        raise UserError(
            f"{source}: column '{names['label']}' has {len(kinds):,} different values; a manifest"
            f" holds {MAX_CLASSES:,} classes: is data.label the right column?"
        )
    numbers = pc.index_in(values, value_set=pa.array(kinds))
    return pa.ListArray.from_arrays(lists.offsets, numbers), kinds


def _label_lists(column: pa.Array, multi_label: bool) -> pa.Array:
    """Bring labels of any type to lists of text, empty where there is no label."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        values = _text(column.flatten())
    elif multi_label:
        split = pc.split_pattern(pc.fill_null(_text(column), ""), "|")
        lengths, values = pc.list_value_length(split).to_numpy(), _text(split.flatten())
    else:
        lengths, values = np.ones(len(column), np.int64), _text(column)
    owner = np.repeat(np.arange(len(column)), lengths)
    known = np.asarray(pc.is_valid(values))
    counts = np.bincount(owner[known], minlength=len(column))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values.filter(pa.array(known)))


def _text(column: Any) -> Any:
    """Bring values to text without spaces around, null where nothing is left; 3.0 is 3."""
    if pa.types.is_floating(column.type):
        whole = pc.all(pc.equal(column, pc.floor(column))).as_py()
        column = column.cast(pa.int64()) if whole else column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _seconds(column: pa.ChunkedArray, name: str, source: Path) -> Any:
    try:
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        return (_text(column) if text else column).cast(pa.float64())
    except pa.ArrowInvalid:
        raise UserError(f"{source}: column '{name}' should hold seconds, as numbers") from None


def _check_pieces(pieces: dict[str, Any], source: Path) -> None:
    start, end = (
        np.asarray(pieces[key], dtype=float) if key in pieces else np.array(np.nan)
        for key in ("start", "end")
    )
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero((start < 0) | (end <= np.nan_to_num(start)) | np.isinf(end - start))
    if len(wrong):
        raise UserError(
            f"{source}: {len(wrong):,} rows have an end that is not after their start, or a start"
            f" below 0; the first is row {wrong[0] + 1}"
        )


def _existing(paths: list[str | None], root: Path, source: Path) -> list[str | None]:
    """Make paths relative to root; None where no file or folder (of frames) is there.

    Each folder is listed once: on a network's disk that is much faster than a look per file.
    """
    tops = [os.path.abspath(root), os.path.realpath(root)]
    listed: dict[str, set[str]] = {}
    result: list[str | None] = []
    for number, path in enumerate(paths, 1):
        if not path:
            result.append(None)
            continue
        inner = path
        if path.startswith("/"):
            below = [os.path.relpath(path, top) for top in tops if _is_below(path, top)]
            inner = below[0] if below else path
        if OUTSIDE.search(inner):
            raise UserError(
                f"{source}, row {number}: '{path}' lies outside data.root={root}; give a root above"
                f" all videos (data.root=/ for absolute paths, with data.annotations={source})"
            )
        inner = posixpath.normpath(inner)
        folder, _, name = inner.rpartition("/")
        if folder not in listed:
            try:
                with os.scandir(root / folder) as entries:
                    listed[folder] = {
                        entry.name
                        for entry in entries
                        if leads_to(entry, os.DirEntry.is_file)
                        or leads_to(entry, os.DirEntry.is_dir)
                    }
            except OSError:
                listed[folder] = set()
        result.append(inner if name in listed[folder] else None)
    return result


def _is_below(path: str, top: str) -> bool:
    return path.startswith(top.rstrip("/") + "/")


def _drop(rows: pa.Table, which: Any, why: str, source: Path, notes: list[str]) -> pa.Table:
    count = pc.sum(which).as_py() or 0
    if count == rows.num_rows:
        raise UserError(f"{source}: every row has {why}")
    if count:
        notes.append(f"{count:,} rows of {source} have {why}; they are left out")
    return rows.filter(pc.invert(which)) if count else rows


def _split(annotations: Annotations, test_fraction: float, seed: int) -> Annotations:
    rows = annotations.rows
    test = held_out(groups_of(rows), rows["labels"].to_pylist(), test_fraction, seed)
    names = pc.if_else(pa.array(test), "test", "train").dictionary_encode()
    notes = list(annotations.notes)
    if test_fraction and not test.any():
        notes.append("no test split: too few groups of videos to take one from")
    rows = rows.set_column(rows.column_names.index("split"), "split", names)
    return Annotations(rows, annotations.label_names, annotations.official, notes)
