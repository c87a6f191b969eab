"""UCF-101: 13,320 clips off YouTube, 101 actions, three official splits.

Soomro, Zamir, Shah 2012, https://arxiv.org/abs/1212.0402.
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

FOLDERS = ("ucfTrainTestlist", "annotations", "splits", "")
OFFICIAL = {1: (9_537, 3_783), 2: (9_586, 3_734), 3: (9_624, 3_696)}  # train, test
GROUP = re.compile(r"_(g\d+)_c\d+$")


def prepare(root: Path, num_classes: int, fold: int = 1) -> Annotations:
    """Read UCF-101's split lists.

    Class numbers are those of `classInd.txt` less one. Sorted folder names would swap two pairs:
    Hammering with HammerThrow, JumpingJack with JumpRope.

    Args:
        root: holds the lists, in `ucfTrainTestlist/` or directly, and somewhere the videos.
        num_classes: 101.
        fold: which of the three official splits.

    Raises:
        UserError: files are missing or not as they should be.
    """
    root = check_root(root, "the folders UCF-101 and ucfTrainTestlist of the UCF-101 project")
    if fold not in OFFICIAL:
        raise UserError(f"data.fold is {fold}; UCF-101 has the splits 1, 2 and 3")
    lists = {"train": f"trainlist{fold:02d}.txt", "test": f"testlist{fold:02d}.txt"}
    folder = _find_lists(root, ["classInd.txt", *lists.values()])
    label_names = _read_classes(folder / "classInd.txt")
    check_classes(label_names, num_classes, str(folder / "classInd.txt"))
    number = {name: i for i, name in enumerate(label_names)}

    stems, labels, splits, groups = [], [], [], []
    for split, name in lists.items():
        for line in read_lines(folder / name):
            # The class is the folder's: HandstandPushups/v_HandStandPushups_g01_c01.avi 37
            label, _, video = line.split()[0].rpartition("/")
            if label not in number:
                raise UserError(f"{folder / name}: '{label}' is not a class of classInd.txt")
            stem = video.rpartition(".")[0]
            found = GROUP.search(stem)
            stems.append(stem)
            labels.append([number[label]])
            splits.append(split)
            groups.append(f"{label}_{found[1]}" if found else None)

    notes: list[str] = []
    files = find_videos(root, notes)
    # Without case: copies differ in v_HandStandPushups, and no two clips differ in case alone.
    keys = pc.utf8_lower(pa.array(stems, pa.string()))
    paths = match(keys, pc.utf8_lower(files["stem"]), files["path"], notes)
    rows = make_rows(paths, labels, splits, group=groups)
    rows = keep_found(rows, root, f"{lists['train']} and {lists['test']}", notes)
    return Annotations(rows, label_names, dict(zip(lists, OFFICIAL[fold], strict=True)), notes)


def _find_lists(root: Path, names: list[str]) -> Path:
    for folder in FOLDERS:
        if all((root / folder / name).is_file() for name in names):
            return root / folder
    raise UserError(
        f"{' and '.join(names)} are neither in {root / FOLDERS[0]} nor in {root};"
        " they are in 'Train/Test Splits for Action Recognition' on the UCF-101 project's page"
    )


def _read_classes(path: Path) -> list[str]:
    """Read `1 ApplyEyeMakeup` a line."""
    names: dict[int, str] = {}
    for line in read_lines(path):
        number, _, name = line.partition(" ")
        names[int(number) if number.isdigit() else 0] = name.strip()
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{path}: expected lines '1 ApplyEyeMakeup', '2 ...', numbered from 1")
    return [names[i] for i in sorted(names)]
