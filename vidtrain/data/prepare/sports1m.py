"""Sports-1M: 1,133,158 videos on YouTube, 487 sports, one in twenty with several.

Karpathy et al. CVPR 2014, https://cs.stanford.edu/people/karpathy/deepvideo. What is published is
addresses; what can be trained on is what was fetched and is still there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from vidtrain.data.manifest import Annotations, make_rows
from vidtrain.data.prepare.scan import check_classes, check_root, find_videos, keep_found, match
from vidtrain.types import UserError

FOLDERS = ("original", "")
LINE = r"(?:^|v=|/)(?P<id>[\w-]{11})\S*\s+(?P<labels>\d+(?:,\d+)*)\s*$"
# <id>.mp4; what download programs write by themselves: title-<id>.mp4 and title [<id>].mp4
FILE = r"(?:^|-|\[)(?P<id>[\w-]{11})\]?$"


def prepare(root: Path, num_classes: int) -> Annotations:
    """Read Sports-1M's partition files (or the JSON variant), joined on what exists on disk.

    Args:
        root: holds `labels.txt` and `original/{train,test}_partition.txt`, gzipped or not, or
            `sports1m_{train,test}.json`, and somewhere the videos, called by their YouTube ids.
        num_classes: 487.

    Raises:
        UserError: files are missing or not as they should be.
    """
    root = check_root(root, "the sports-1m-dataset project's files and videos called <id>.mp4")
    label_names = _read_names(root)
    check_classes(label_names, num_classes, str(root / "labels.txt"))
    notes: list[str] = []
    read = {split: _read_part(root, split, notes) for split in ("train", "test")}
    parts = {split: part for split, part in read.items() if part is not None}
    if not parts:
        raise UserError(
            f"train_partition.txt(.gz) and test_partition.txt(.gz) are neither in {root / 'original'}"
            f" nor in {root}, and sports1m_train.json and sports1m_test.json not in {root};"
            " they are in the sports-1m-dataset project"
        )
    videos = pa.concat_tables(parts.values()).combine_chunks()
    _check_numbers(videos["labels"].chunk(0), len(label_names), root)
    splits = pa.chunked_array([pa.repeat(split, len(part)) for split, part in parts.items()])

    files = find_videos(root, notes)
    ids = pc.struct_field(pc.extract_regex(files["stem"], FILE), "id")
    paths = match(videos["id"].chunk(0), pc.fill_null(ids, ""), files["path"], notes)
    rows = make_rows(paths, videos["labels"], splits)
    rows = keep_found(rows, root, "Sports-1M", notes)
    official = {split: len(part) for split, part in parts.items()}
    return Annotations(rows, label_names, official, notes)


def _read_names(root: Path) -> list[str]:
    path = _find(root, ("labels.txt", "labels.txt.gz"), ("", "original"))
    if path is None:
        raise UserError(f"{root / 'labels.txt'} is missing; it is in the sports-1m-dataset project")
    with pa.input_stream(str(path), compression="detect") as stream:
        text = stream.read().decode("utf-8-sig")
    names = [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    return names


def _find(root: Path, names: tuple[str, ...], folders: tuple[str, ...] = FOLDERS) -> Path | None:
    places = (root / folder / name for folder in folders for name in names)
    return next((path for path in places if path.is_file()), None)


def _read_part(root: Path, split: str, notes: list[str]) -> pa.Table | None:
    """Read one partition: columns `id` and `labels`."""
    path = _find(root, (f"{split}_partition.txt", f"{split}_partition.txt.gz"))
    if path is not None:
        return _read_lines(path, notes)
    path = _find(root, (f"sports1m_{split}.json",), ("", "json", "original"))
    return _read_json(path) if path is not None else None


def _read_lines(path: Path, notes: list[str]) -> pa.Table:
    """Read `https://www.youtube.com/watch?v=UDqivjS-lpI 168,169` a line, a million a second."""
    parse = pa.csv.ParseOptions(delimiter="\x01", quote_char=False)  # whole lines, one column
    with pa.input_stream(str(path), compression="detect") as stream:
        try:
            lines = pa.csv.read_csv(
                stream,
                read_options=pa.csv.ReadOptions(column_names=["line"]),
                parse_options=parse,
                convert_options=pa.csv.ConvertOptions(column_types={"line": pa.string()}),
            )["line"]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    found = pc.extract_regex(lines, LINE)
    wrong = pc.sum(pc.is_null(found)).as_py()
    if wrong == len(lines):
        raise UserError(f"{path}: no line is like 'https://www.youtube.com/watch?v=ID 168,169'")
    if wrong:
        notes.append(f"{wrong:,} lines of {path} are not a video with labels; they are left out")
    found = found.drop_null().combine_chunks()
    labels = pc.split_pattern(pc.struct_field(found, "labels"), ",")
    numbers = pa.ListArray.from_arrays(labels.offsets, labels.flatten().cast(pa.int32()))
    return pa.table({"id": pc.struct_field(found, "id"), "labels": numbers})


def _read_json(path: Path) -> pa.Table:
    """Read `[{"id": .., "label487": [205], "thumbnail": .., ...}, ...]`."""

    def keep(entry: dict[str, Any]) -> tuple[str | None, list[int]]:
        # Of each entry two values stay: a million whole ones would take gigabytes.
        for key in ("id", "video_id", "videoid", "youtube_id", "url", "thumbnail"):
            place = str(entry.get(key) or "")
            found = re.search(r"(?:^|v=|/vi/|/)([\w-]{11})(?:$|[&?/])", place)
            if found:
                return found[1], entry.get("label487") or []
        return None, []

    try:
        with path.open(encoding="utf-8-sig") as file:
            entries = [e for e in json.load(file, object_hook=keep) if e[0]]
        ids = pa.array([name for name, _ in entries], pa.string())
        labels = pa.array([numbers for _, numbers in entries], pa.list_(pa.int32()))
    except (ValueError, TypeError, IndexError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a list of videos with ids and label487 ({error})") from None
    if not entries:
        raise UserError(f"{path}: no entry has an id that could be found")
    return pa.table({"id": ids, "labels": labels})


def _check_numbers(labels: pa.ListArray, num_classes: int, root: Path) -> None:
    bounds = pc.min_max(labels.flatten()).as_py()
    if bounds["max"] is not None and not 0 <= bounds["min"] <= bounds["max"] < num_classes:
        raise UserError(
            f"the partition files under {root} have labels from {bounds['min']} to {bounds['max']},"
            f" but labels.txt names {num_classes} classes"
        )
