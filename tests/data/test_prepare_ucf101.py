from __future__ import annotations

from pathlib import Path

import pytest

from vidtrain.data.prepare.ucf101 import prepare
from vidtrain.types import UserError

# In the order of classInd.txt, which is not that of sorted folders.
CLASSES = ["Hammering", "HammerThrow", "HandstandPushups", "JumpingJack", "JumpRope"]


def lay_out(root: Path, lists: str = "ucfTrainTestlist", videos: str = "UCF-101") -> None:
    (root / lists).mkdir(parents=True, exist_ok=True)
    lines = [f"{i} {name}" for i, name in enumerate(CLASSES, 1)]
    (root / lists / "classInd.txt").write_bytes("\r\n".join([*lines, ""]).encode())
    for fold in (1, 2, 3):
        parts: dict[str, list[str]] = {"train": [], "test": []}
        for number, name in enumerate(CLASSES, 1):
            file_name = name.replace("stand", "Stand")
            for group in range(1, 5):
                path = f"{name}/v_{file_name}_g{group:02d}_c01.avi"
                if group == fold:
                    parts["test"].append(path)
                else:
                    parts["train"].append(f"{path} {number}")
                (root / videos / path).parent.mkdir(parents=True, exist_ok=True)
                (root / videos / path).touch()
        for split, entries in parts.items():
            (root / lists / f"{split}list{fold:02d}.txt").write_bytes(
                "\r\n".join([*entries, ""]).encode()
            )


@pytest.mark.parametrize(
    ("lists", "videos"),
    [("ucfTrainTestlist", "UCF-101"), (".", "."), ("annotations", "videos")],
)
def test_classes_keep_the_official_order(tmp_path: Path, lists: str, videos: str) -> None:
    lay_out(tmp_path, lists, videos)
    found = prepare(tmp_path, num_classes=5)
    assert found.label_names == CLASSES
    assert sorted(CLASSES) != CLASSES
    for path, labels in zip(
        *found.rows.select(["path", "labels"]).to_pydict().values(), strict=True
    ):
        assert CLASSES[labels[0]] == Path(path).parent.name
    assert found.rows.num_rows == 20 and not found.notes


@pytest.mark.parametrize(
    ("fold", "official"), [(1, (9537, 3783)), (2, (9586, 3734)), (3, (9624, 3696))]
)
def test_folds(tmp_path: Path, fold: int, official: tuple[int, int]) -> None:
    lay_out(tmp_path)
    found = prepare(tmp_path, num_classes=5, fold=fold)
    table = found.rows.to_pydict()
    tested = {g for g, s in zip(table["group"], table["split"], strict=True) if s == "test"}
    assert tested == {f"{name}_g{fold:02d}" for name in CLASSES}
    assert not tested & {
        g for g, s in zip(table["group"], table["split"], strict=True) if s != "test"
    }
    assert found.official == dict(zip(("train", "test"), official, strict=True))


def test_the_misspelt_class_is_found(tmp_path: Path) -> None:
    lay_out(tmp_path)
    folder = tmp_path / "UCF-101" / "HandstandPushups"
    assert (folder / "v_HandStandPushups_g01_c01.avi").exists()
    for path in list(folder.iterdir()):  # as some copies spell it
        path.rename(folder / path.name.replace("Stand", "stand"))
    assert prepare(tmp_path, num_classes=5).rows.num_rows == 20


def test_frames_and_missing_videos(tmp_path: Path) -> None:
    lay_out(tmp_path)
    gone = tmp_path / "UCF-101" / "Hammering" / "v_Hammering_g01_c01.avi"
    gone.unlink()
    frames = tmp_path / "UCF-101" / "JumpRope" / "v_JumpRope_g02_c01.avi"
    frames.unlink()
    frames.with_suffix("").mkdir()
    (frames.with_suffix("") / "img_00001.jpg").touch()
    found = prepare(tmp_path, num_classes=5)
    assert "UCF-101/JumpRope/v_JumpRope_g02_c01" in found.rows["path"].to_pylist()
    assert found.rows.num_rows == 19
    assert ["1 of 20 rows" in note for note in found.notes] == [True]


def test_a_second_copy_is_noted(tmp_path: Path) -> None:
    lay_out(tmp_path)
    copy = tmp_path / "UCF-101-small" / "JumpRope" / "v_JumpRope_g02_c01.avi"
    copy.parent.mkdir(parents=True)
    copy.touch()
    (copy.parent / "unrelated.avi").touch()
    found = prepare(tmp_path, num_classes=5)
    assert found.notes == [
        "1 more files have the name of another; the first is taken, such as"
        " UCF-101-small/JumpRope/v_JumpRope_g02_c01.avi"
        " and not UCF-101/JumpRope/v_JumpRope_g02_c01.avi"
    ]
    assert "UCF-101-small/JumpRope/v_JumpRope_g02_c01.avi" in found.rows["path"].to_pylist()


def test_what_cannot_work_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"classInd\.txt .* trainlist02\.txt .* UCF-101 project"):
        prepare(tmp_path, num_classes=101, fold=2)
    lay_out(tmp_path)
    with pytest.raises(UserError, match=r"data\.fold is 4"):
        prepare(tmp_path, num_classes=5, fold=4)
    with pytest.raises(UserError, match=r"5 classes, but data\.num_classes is 101"):
        prepare(tmp_path, num_classes=101)
    lists = tmp_path / "ucfTrainTestlist"
    (lists / "testlist01.txt").write_text("Unknown/v_Unknown_g01_c01.avi\n")
    with pytest.raises(UserError, match="'Unknown' is not a class"):
        prepare(tmp_path, num_classes=5)
    (lists / "classInd.txt").write_text("0 A\n1 B\n")
    with pytest.raises(UserError, match="numbered from 1"):
        prepare(tmp_path, num_classes=2)
