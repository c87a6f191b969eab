"""HMDB51: 6,766 clips out of films and off the web, 51 actions, three official splits.

Kuehne et al. ICCV 2011, https://doi.org/10.1109/ICCV.2011.6126543.
"""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from vidtrain.data.manifest import Annotations, make_rows
from vidtrain.data.prepare.scan import check_classes, check_root, find_videos, keep_found, match
from vidtrain.data.prepare.table import read_lines
from vidtrain.types import UserError

FOLDERS = ("testTrainMulti_7030_splits", "test_train_splits", "annotations", "splits", "")
OFFICIAL = {"train": 3_570, "test": 1_530}  # 70 and 30 a class, in each of the three
SPLIT = {"1": "train", "2": "test"}  # 0: in neither


def prepare(root: Path, num_classes: int, fold: int = 1) -> Annotations:
    """Read HMDB51's split files, `<class>_test_split<fold>.txt`.

    Class numbers are places in the sorted class names.

    Args:
        root: holds the split files, in `testTrainMulti_7030_splits/` or directly, and somewhere a
            folder per class.
        num_classes: 51.
        fold: which of the three official splits.

    Raises:
        UserError: files are missing or not as they should be.
    """
    root = check_root(root, "HMDB51: a folder per class and testTrainMulti_7030_splits")
    if fold not in (1, 2, 3):
        raise UserError(f"data.fold is {fold}; HMDB51 has the splits 1, 2 and 3")
    lists = _find_lists(root, fold)
    label_names = sorted(lists)
    source = f"the split files in {next(iter(lists.values())).parent}"
    check_classes(label_names, num_classes, source)

    keys, labels, splits = [], [], []
    for number, label in enumerate(label_names):
        for line in read_lines(lists[label]):
            # Names hold #, !, & and brackets: only the last word is not the name.
            video, _, kind = line.rpartition(" ")
            if kind in SPLIT:
                keys.append(f"{label}/{video.strip().rpartition('.')[0]}")
                labels.append([number])
                splits.append(SPLIT[kind])
            elif kind != "0":
                raise UserError(f"{lists[label]}: '{line}' does not end in 0, 1 or 2")

    notes: list[str] = []
    files = find_videos(root, notes)
    parents = pc.struct_field(
        pc.extract_regex(files["path"], r"(?:^|/)(?P<parent>[^/]*)/[^/]*$"), "parent"
    )
    places = pc.binary_join_element_wise(pc.fill_null(parents, ""), files["stem"], "/")
    paths = match(pa.array(keys, pa.string()), places, files["path"], notes)
    rows = make_rows(paths, labels, splits)
    rows = keep_found(rows, root, source, notes)
    return Annotations(rows, label_names, dict(OFFICIAL), notes)


def _find_lists(root: Path, fold: int) -> dict[str, Path]:
    """Find the split file of each class."""
    name = re.compile(rf"(.+)_test_split{fold}\.txt")
    for folder in FOLDERS:
        if (root / folder).is_dir():
            found = {
                m[1]: path for path in (root / folder).iterdir() if (m := name.fullmatch(path.name))
            }
            if found:
                return found
    raise UserError(
        f"no file <class>_test_split{fold}.txt is in {root / FOLDERS[0]} or {root};"
        " they are in 'three splits' on the HMDB51 project's page"
    )
