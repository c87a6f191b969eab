"""Kinetics-400, -600 and -700: clips of ten seconds off YouTube, one action each.

Kay et al. 2017, https://arxiv.org/abs/1705.06950 (400); Carreira et al. 2018,
https://arxiv.org/abs/1808.01340 (600); Smaira et al. 2020, https://arxiv.org/abs/2010.10864
(700-2020).

A row is joined with a file by the file's name, `<id>_<start>_<end>` with six digits each, or `<id>`
alone, wherever it lies below the root: flat or in class folders, whose spelling (spaces,
underscores, quotes dropped) so does not matter.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vidtrain.data.manifest import Annotations, make_rows, single_labels
from vidtrain.data.prepare.folder import from_class_folders
from vidtrain.data.prepare.scan import check_classes, check_root, find_videos, keep_found, match
from vidtrain.data.prepare.splits import ONE_NAME, SPLITS
from vidtrain.data.prepare.table import read_csv, read_lines
from vidtrain.types import UserError

# Rows of the csv files (400); files of the CVDF copy (600), whose csv files are incomplete. For 700
# there is no one count: the editions of 2019 and 2020 share a name.
OFFICIAL = {
    400: {"train": 246_534, "val": 19_906, "test": 39_805},
    600: {"train": 427_549, "val": 29_793, "test": 72_924},
}
NAMES = ("{}", "kinetics_{}", "kinetics{n}_{}", "kinetics-{n}_{}", "kinetics{n}_{}_list_videos")
CLIP = re.compile(r"^(?P<id>.{11})_\d{6}_\d{6}$")
NONE = pa.scalar(None, pa.string())
SPARE = r"(^|/)replacement"
CLIPS = pa.schema(
    [
        ("stem", pa.string()),  # the file's name, without extension
        ("id", pa.string()),  # on YouTube
        ("label", pa.string()),  # a name,
        ("number", pa.int64()),  # or a number, or neither
        ("folder", pa.string()),  # that a list's path names
    ]
)
LINE = re.compile(r"(?P<path>.*?)(?:[ \t,]+(?P<label>\d+))?")


def prepare(root: Path, num_classes: int, annotations: str | None = None) -> Annotations:
    """Read Kinetics: the official csv or json files, or lists of `path label`.

    Class numbers are places in the sorted class names. Files that the copies of CVDF keep in
    `replacement/` for corrupted ones are taken in their place.

    Args:
        root: with `train`, `val`, `test` and `annotations/{train,val,test}.csv` (CVDF's layout);
            lists of PySlowFast or MMAction2, or class folders without any list, will do too.
        num_classes: 400, 600 or 700, or what a subset's lists name.
        annotations: the folder of the annotation files (relative to root), if they are neither in
            root nor in root/annotations.

    Raises:
        UserError: files are missing or not as they should be.
    """
    root = check_root(root, "Kinetics, as the CVDF kinetics-dataset project lays it out")
    folders = [root / "annotations", root] if annotations is None else [root / annotations]
    notes: list[str] = []
    sources = {split: _find_list(folders, split, num_classes) for split in SPLITS}
    lists = {split: _read_list(path) for split, path in sources.items() if path is not None}
    if not lists:
        return _without_lists(root, folders, num_classes)
    clips = pa.concat_tables(lists.values())  # in the order of lists, as splits
    splits = pa.concat_arrays([pa.repeat(split, len(part)) for split, part in lists.items()])
    source = f"the annotation files in {next(p for p in sources.values() if p).parent}"

    files = find_videos(root, notes)
    paths = _find_clips(clips, splits, files)
    numbers, label_names = _number(clips, num_classes, folders, source, notes)
    _count_unlisted(clips, files, notes)
    rows = make_rows(paths, single_labels(numbers), splits)
    rows = keep_found(rows, root, source, notes)
    official = OFFICIAL.get(num_classes, {})
    return Annotations(rows, label_names, {s: official[s] for s in lists if s in official}, notes)


def _find_list(folders: list[Path], split: str, num_classes: int) -> Path | None:
    # CVDF marks its csv files of Kinetics-600 as incomplete, and gives complete ones as txt.
    endings = (".txt", ".csv", ".json") if num_classes == 600 else (".csv", ".txt", ".json")
    for folder in folders:
        for name in NAMES:
            for alias in SPLITS[split]:
                for ending in endings:
                    path = folder / (name.format(alias, n=num_classes) + ending)
                    if path.is_file():
                        return path
    return None


def _read_list(path: Path) -> pa.Table:
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.readline()
        if head.lstrip().startswith("{"):
            return _read_json(path)
        if "youtube_id" in head:
            return _read_official(path)
        return _read_lines(path)
    except (pa.ArrowException, ValueError, OSError, LookupError, TypeError) as error:
        raise UserError(f"{path} cannot be understood: {str(error).splitlines()[0]}") from None


def _read_official(path: Path) -> pa.Table:
    """Read `label,youtube_id,time_start,time_end,split[,is_cc]`; a test set may lack the label."""
    table = read_csv(path)
    names = pc.utf8_trim(table["youtube_id"], " '\"")
    label: Any = pa.nulls(len(table), pa.string())
    if "label" in table.column_names:
        label = pc.utf8_trim(table["label"], " '\"")
        label = pc.if_else(pc.equal(label, ""), NONE, label)
    start, end = (_six_digits(table[name]) for name in ("time_start", "time_end"))
    stems = pc.binary_join_element_wise(names, start, end, "_")
    return _clips(pc.fill_null(pc.coalesce(stems, names), ""), names, label)


def _six_digits(column: pa.ChunkedArray) -> pa.ChunkedArray:
    text = pc.utf8_trim(column, " '\"")
    seconds = pc.if_else(pc.equal(text, ""), NONE, text).cast(pa.float64())
    return pc.utf8_lpad(pc.floor(seconds).cast(pa.int64()).cast(pa.string()), 6, "0")


def _read_json(path: Path) -> pa.Table:
    """Read `{id: {"annotations": {"label": .., "segment": [start, end]}}}`."""
    names, stems, labels = [], [], []
    for name, entry in json.loads(path.read_text(encoding="utf-8-sig")).items():
        about = entry["annotations"] or {}
        start, end = (int(float(second)) for second in about.get("segment") or (-1, -1))
        names.append(name)
        stems.append(f"{name}_{start:06d}_{end:06d}" if end >= 0 else name)
        labels.append(about.get("label") or None)
    return _clips(stems, names, labels)


def _read_lines(path: Path) -> pa.Table:
    """Read `path number` a line (PySlowFast, MMAction2); without a number, the folder is the label."""
    stems, names, labels, numbers, folders = [], [], [], [], []
    for line in read_lines(path):
        found = LINE.fullmatch(line)
        assert found  # it takes any text
        folder, _, name = found["path"].rpartition("/")
        folder = folder.rpartition("/")[2]
        stem = re.sub(r"\.\w{2,4}$", "", name)
        clip = CLIP.match(stem)
        stems.append(stem)
        names.append(clip["id"] if clip else stem)
        folders.append("" if folder in ONE_NAME else folder)
        numbers.append(int(found["label"]) if found["label"] else None)
        labels.append(None if found["label"] else folders[-1] or None)
    if not stems:
        raise ValueError("the list is empty")
    return _clips(stems, names, labels, numbers, folders)


def _clips(stem: Any, name: Any, label: Any, number: Any = None, folder: Any = None) -> pa.Table:
    columns = {"stem": stem, "id": name, "label": label}
    columns |= {"number": number or [None] * len(stem), "folder": folder or [""] * len(stem)}
    return pa.Table.from_pydict(columns, CLIPS)


def _find_clips(clips: pa.Table, splits: pa.Array, files: pa.Table) -> pa.ChunkedArray:
    """Find each clip's file; null where there is none."""
    paths, stems = files["path"], files["stem"]
    name = pc.struct_field(pc.extract_regex(stems, CLIP.pattern), "id")
    spare = pc.match_substring_regex(paths, SPARE)
    tries = [  # a replacement stands for a file that is there and broken, so it comes first
        match(clips["id"], pc.fill_null(name, "").filter(spare), paths.filter(spare))
    ]
    for split in SPLITS:  # the same name may lie in two splits' folders
        alias = "|".join(SPLITS[split])
        here = pc.match_substring_regex(paths, rf"(^|/)(videos_)?({alias})(_\d+)?/")
        mine = pc.if_else(pc.equal(splits, split), clips["stem"].combine_chunks(), NONE)
        tries.append(match(mine, stems.filter(here), paths.filter(here)))
    tries += [match(clips["stem"], stems, paths), match(clips["id"], stems, paths)]
    return pc.coalesce(*tries)


def _number(
    clips: pa.Table, num_classes: int, folders: list[Path], source: str, notes: list[str]
) -> tuple[pa.Array, list[str]]:
    """Give the class number of each clip, null where unknown, and the classes' names."""
    named = sorted(pc.unique(clips["label"].drop_null()).to_pylist())
    if named:
        check_classes(named, num_classes, source)
        numbers = pc.index_in(clips["label"], value_set=pa.array(named, pa.string()))
        return pc.coalesce(clips["number"].cast(pa.int32()), numbers), named
    if clips["number"].null_count == len(clips):
        raise UserError(f"{source} hold no labels")
    highest = pc.max(clips["number"]).as_py()
    if highest >= num_classes:
        raise UserError(f"{source} hold the label {highest}, but data.num_classes={num_classes}")
    return clips["number"].cast(pa.int32()), _names(clips, num_classes, folders, notes)


def _names(clips: pa.Table, num_classes: int, folders: list[Path], notes: list[str]) -> list[str]:
    """Name numbered classes: by a label map, else by the folders in the list, else by number."""
    for path in sorted(p for folder in folders for p in folder.glob("*label_map*.txt")):
        names = read_lines(path)
        if len(names) == num_classes:
            return names
        notes.append(f"{path} has {len(names)} names for {num_classes} classes; it is not used")
    seen: dict[int, set[str]] = defaultdict(set)
    for number, folder in set(
        zip(*(clips[c].to_pylist() for c in ("number", "folder")), strict=True)
    ):
        if number is not None:
            seen[number].add(folder)
    by_folder = [next(iter(seen[i])) for i in range(num_classes) if len(seen[i]) == 1]
    if len(set(by_folder) - {""}) == num_classes:
        return by_folder
    notes.append("the lists name no classes, so they are called by their numbers")
    return [str(i) for i in range(num_classes)]


def _count_unlisted(clips: pa.Table, files: pa.Table, notes: list[str]) -> None:
    listed = pa.concat_arrays([clips[c].combine_chunks() for c in ("stem", "id")])
    spare = pc.match_substring_regex(files["path"], SPARE)
    unlisted = pc.invert(pc.or_(pc.is_in(files["stem"], value_set=listed), spare))
    count = pc.sum(unlisted).as_py() or 0
    if count:
        first = files["path"].filter(unlisted)[0]
        notes.append(f"{count:,} files are in none of the annotation files, such as {first}")


def _without_lists(root: Path, folders: list[Path], num_classes: int) -> Annotations:
    """Read `root/<split>/<class>/*`, as torchvision arranges it."""
    tops = {child.name for child in root.iterdir() if child.is_dir()}
    if any(grand.is_dir() for top in tops & ONE_NAME.keys() for grand in (root / top).iterdir()):
        result = from_class_folders(root)
        check_classes(result.label_names, num_classes, f"the class folders under {root}")
        note = "no annotation files: classes are numbered by the order of their folders' names"
        return Annotations(result.rows, result.label_names, {}, [*result.notes, note])
    wanted = ", ".join(f"{split}.csv" for split in SPLITS)
    raise UserError(
        f"no annotation file in {' or '.join(map(str, folders))}: looked for {wanted};"
        " they are on the page of the CVDF kinetics-dataset project"
    )
