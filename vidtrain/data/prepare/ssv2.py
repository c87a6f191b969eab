"""Something-Something v2: 220,847 short clips of hands doing 174 things with objects.

Goyal et al. ICCV 2017, https://arxiv.org/abs/1706.04261. Left and right are classes here: no flip.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from vidtrain.data.manifest import Annotations, make_rows
from vidtrain.data.prepare.scan import check_classes, check_root, find_videos, keep_found, match
from vidtrain.types import UserError

FOLDERS = ("labels", "annotations", "")
NAMES = ("{}.json", "something-something-v2-{}.json")
SPLITS = {"train": "train", "val": "validation", "test": "test"}
OFFICIAL = {"train": 168_913, "val": 24_777, "test": 27_157}


def prepare(root: Path, num_classes: int) -> Annotations:
    """Read Something-Something v2's json files; the test set has no labels.

    Class numbers are those of `labels.json`.

    Args:
        root: holds the json files, in `labels/` or directly, and somewhere `<id>.webm` or `.mp4`.
        num_classes: 174.

    Raises:
        UserError: files are missing or not as they should be.
    """
    root = check_root(root, "Something-Something v2: its json files and <id>.webm")
    path = _find(root, "labels")
    if path is None:
        raise UserError(
            f"labels.json (or something-something-v2-labels.json) is neither in {root / FOLDERS[0]}"
            f" nor in {root}; it is on the Something-Something v2 page of its authors"
        )
    number = _read_classes(path)
    label_names = sorted(number, key=lambda name: number[name])
    check_classes(label_names, num_classes, str(path))

    ids, labels, splits = [], [], []
    for split, name in SPLITS.items():
        source = _find(root, name)
        for video, template in _read_split(source) if source else ():
            if template and template not in number:
                raise UserError(f"{source}: '{template}' of video {video} is not in {path}")
            ids.append(video)
            labels.append([number[template]] if template else [])
            splits.append(split)
    if not ids:
        raise UserError(f"train.json, validation.json and test.json: none is beside {path}")

    notes: list[str] = []
    files = find_videos(root, notes)
    paths = match(pa.array(ids, pa.string()), files["stem"], files["path"], notes)
    rows = make_rows(paths, labels, splits)
    rows = keep_found(rows, root, f"the json files in {path.parent}", notes)
    official = {split: count for split, count in OFFICIAL.items() if split in splits}
    return Annotations(rows, label_names, official, notes)


def _find(root: Path, name: str) -> Path | None:
    for folder in FOLDERS:
        for pattern in NAMES:
            path = root / folder / pattern.format(name)
            if path.is_file():
                return path
    return None


def _read_classes(path: Path) -> dict[str, int]:
    """Read `{"Approaching something with your camera": "0", ...}`: numbers as text."""
    try:
        number = {name: int(value) for name, value in _load(path).items()}
    except (AttributeError, ValueError, TypeError):
        raise UserError(f'{path} is not like {{"Holding something": "0", ...}}') from None
    if sorted(number.values()) != list(range(len(number))):
        raise UserError(f"{path}: the numbers do not run from 0 to {len(number) - 1}")
    return number


def _read_split(path: Path) -> list[tuple[str, str]]:
    """Read id and label of each `{"id": "78687", "template": "Holding [something]", ...}`."""
    try:
        return [
            (str(entry["id"]), re.sub(r"[\[\]]", "", entry.get("template", "")))
            for entry in _load(path)
        ]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f'{path} is not a list of {{"id": .., "template": ..}}') from None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
