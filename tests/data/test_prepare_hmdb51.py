from __future__ import annotations

from pathlib import Path

import pytest

from vidtrain.data.prepare.hmdb51 import prepare
from vidtrain.types import UserError

NAMES = {
    "brush_hair": [
        "April_09_brush_hair_u_nm_np1_ba_goo_0",
        "#20_Rhythm_clap_u_nm_np1_fr_goo_1",
        "Aussie_Brunette_Brushing_Hair_II_brush_hair_u_nm_np2_le_goo_3",
    ],
    "shoot_ball": [
        "KELVIN_shoot_ball_u_cm_np1_ba_goo_4!",
        "(HQ)_Rock_&_Roll_shoot_ball_f_nm_np1_ri_med_8",
        "#20_Rhythm_clap_u_nm_np1_fr_goo_1",  # the name of another class's clip
    ],
}
KINDS = {1: (1, 2, 0), 2: (2, 1, 1), 3: (0, 1, 2)}


def lay_out(root: Path, lists: str = "testTrainMulti_7030_splits", videos: str = "") -> None:
    for label, names in NAMES.items():
        for fold, kinds in KINDS.items():
            path = root / lists / f"{label}_test_split{fold}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{n}.avi {k} \n" for n, k in zip(names, kinds, strict=True)))
        for name in names:
            video = root / videos / label / f"{name}.avi"
            video.parent.mkdir(parents=True, exist_ok=True)
            video.touch()


@pytest.mark.parametrize(
    ("lists", "videos"),
    [("testTrainMulti_7030_splits", ""), (".", "videos"), ("splits", "hmdb51_org")],
)
@pytest.mark.parametrize("fold", [1, 2, 3])
def test_folds_and_odd_names(tmp_path: Path, fold: int, lists: str, videos: str) -> None:
    lay_out(tmp_path, lists, videos)
    found = prepare(tmp_path, num_classes=2, fold=fold)
    assert found.label_names == ["brush_hair", "shoot_ball"]
    expected = {
        (str(Path(videos) / label / f"{name}.avi"), number, {1: "train", 2: "test"}[kind])
        for number, (label, names) in enumerate(NAMES.items())
        for name, kind in zip(names, KINDS[fold], strict=True)
        if kind
    }
    table = found.rows.to_pydict()
    rows = zip(table["path"], (n for (n,) in table["labels"]), table["split"], strict=True)
    assert set(rows) == expected
    assert found.official == {"train": 3570, "test": 1530}
    assert not found.notes


def test_missing_videos_are_counted(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "brush_hair" / f"{NAMES['brush_hair'][0]}.avi").unlink()
    found = prepare(tmp_path, num_classes=2)
    assert found.rows.num_rows == 3 and "1 of 4 rows" in found.notes[0]


def test_what_cannot_work_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"_test_split1\.txt is in .*7030_splits.*HMDB51 project"):
        prepare(tmp_path, num_classes=51)
    lay_out(tmp_path)
    with pytest.raises(UserError, match=r"data\.fold is 0"):
        prepare(tmp_path, num_classes=2, fold=0)
    with pytest.raises(UserError, match=r"2 classes, but data\.num_classes is 51"):
        prepare(tmp_path, num_classes=51)
    path = tmp_path / "testTrainMulti_7030_splits" / "shoot_ball_test_split1.txt"
    path.write_text("a.avi 1\nb.avi 3\n")
    with pytest.raises(UserError, match=r"shoot_ball_test_split1.txt: 'b\.avi 3' does not end"):
        prepare(tmp_path, num_classes=2)
    path.write_bytes(b"caf\xe9.avi 1\n")
    with pytest.raises(UserError, match=r"shoot_ball_test_split1.txt: .*utf-8"):
        prepare(tmp_path, num_classes=2)
