from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from vidtrain.data.prepare.sports1m import prepare
from vidtrain.types import UserError

NAMES = ["boomerang", "hornussen", "bédminton", "model aircraft"]
URL = "https://www.youtube.com/watch?v="
TRAIN = {"UDqivjS-lpI": [1, 3], "-_abcdefgh-": [0], "00000000001": [2], "gone-gone-g": [1]}
TEST = {"_9_8_7_6_5_": [3], "lost-lost-l": [0, 1, 2]}
FILES = [
    "UDqivjS-lpI.mp4",
    "deep/down/-_abcdefgh-.mkv",
    "some title [00000000001].webm",
    "downloads/A Title - with dashes-_9_8_7_6_5_.mp4",
    "unrelated.mp4",
]
EXPECTED = {
    "path": [FILES[0], FILES[1], FILES[2], FILES[3]],
    "labels": [[1, 3], [0], [2], [3]],
    "split": ["train", "train", "train", "test"],
}


def write(path: Path, text: str, zipped: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def lay_out(root: Path, folder: str = "original", zipped: bool = False, end: str = "\n") -> None:
    for name in FILES:
        write(root / "videos" / name, "")
    write(root / "labels.txt", "\n".join([*NAMES, ""]), zipped)
    for split, videos in (("train", TRAIN), ("test", TEST)):
        lines = [f"{URL}{name} {','.join(map(str, n))}{end}" for name, n in videos.items()]
        write(root / folder / f"{split}_partition.txt", "".join(lines), zipped)


@pytest.mark.parametrize("folder", ["original", "."])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("end", ["\n", " \r\n"])
def test_partition_files(tmp_path: Path, folder: str, zipped: bool, end: str) -> None:
    lay_out(tmp_path, folder, zipped, end)
    found = prepare(tmp_path, num_classes=4)
    expected = EXPECTED | {"path": [f"videos/{path}" for path in EXPECTED["path"]]}
    assert found.rows.to_pydict() == expected
    assert found.label_names == NAMES
    assert found.official == {"train": 4, "test": 2}
    assert found.notes == [
        f"2 of 6 rows of Sports-1M have no file under {tmp_path}; they are left out"
    ]


@pytest.mark.parametrize("key", ["id", "url", "thumbnail"])
def test_json_variant(tmp_path: Path, key: str) -> None:
    lay_out(tmp_path)
    for split, videos in (("train", TRAIN), ("test", TEST)):
        (tmp_path / "original" / f"{split}_partition.txt").unlink()
        entries = []
        for name, numbers in videos.items():
            place = {
                "id": name,
                "url": URL + name,
                "thumbnail": f"https://i1.ytimg.com/vi/{name}/hqdefault.jpg",
            }[key]
            entries.append(
                {"stitle": "a title", "label487": numbers, key: place, "extra": {"id": "x"}}
            )
        write(tmp_path / f"sports1m_{split}.json", json.dumps(entries))
    found = prepare(tmp_path, num_classes=4)
    assert found.rows["labels"].to_pylist() == EXPECTED["labels"]
    assert found.rows["split"].to_pylist() == EXPECTED["split"]


def test_lines_that_are_no_videos_are_counted(tmp_path: Path) -> None:
    lay_out(tmp_path)
    path = tmp_path / "original" / "train_partition.txt"
    path.write_text(f"{path.read_text()}# a comment\n{URL}short 3\n{URL}abcdefghijk\n\n")
    found = prepare(tmp_path, num_classes=4)
    assert found.rows.num_rows == 4
    assert f"3 lines of {path} are not a video with labels; they are left out" in found.notes


def test_what_cannot_work_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.txt is missing.*sports-1m-dataset project"):
        prepare(tmp_path, num_classes=487)
    write(tmp_path / "labels.txt", "\n".join(NAMES))
    with pytest.raises(UserError, match=r"4 classes, but data\.num_classes is 487"):
        prepare(tmp_path, num_classes=487)
    with pytest.raises(UserError, match=r"train_partition\.txt.*sports1m_train\.json"):
        prepare(tmp_path, num_classes=4)
    lay_out(tmp_path)
    path = tmp_path / "original" / "test_partition.txt"
    for text, message in {
        f"{URL}_9_8_7_6_5_ 4\n": "labels from 0 to 4",
        "nothing here\n": "no line is like",
        "": "test_partition",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            prepare(tmp_path, num_classes=4)
    lay_out(tmp_path)
    for name in FILES:
        (tmp_path / "videos" / name).unlink()
    with pytest.raises(UserError, match="none of the 6 videos"):
        prepare(tmp_path, num_classes=4)
    for split in ("train", "test"):
        (tmp_path / "original" / f"{split}_partition.txt").unlink()
    for text in (
        "{",
        "{}",
        "[1, 2]",
        '[{"stitle": "x"}]',
        '[{"id": "_9_8_7_6_5_", "label487": "x"}]',
    ):
        write(tmp_path / "sports1m_train.json", text)
        with pytest.raises(UserError, match=r"sports1m_train\.json"):
            prepare(tmp_path, num_classes=4)
