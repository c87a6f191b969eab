from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidtrain.data.manifest import Annotations
from vidtrain.data.prepare.kinetics import prepare
from vidtrain.types import UserError

CLASSES = ["abseiling", "hurling (sport)", "massaging person's head", "tying knot (not on a tie)"]
# label, id, start, end: ids that hold "_" and "-", begin with either, and look like numbers
CLIPS = {
    "train": [
        ("abseiling", "-7O581Lzrb4", 154, 164),
        ("hurling (sport)", "_a_b_c-d_e-", 0, 10),
        ("massaging person's head", "00000000012", 9, 19),
        ("tying knot (not on a tie)", "0wR5jVB-WPk", 417, 427),
        ("abseiling", "--gone-gone", 1, 11),
    ],
    "val": [("abseiling", "1e10_000000", 3, 13), ("hurling (sport)", "lqciwm6gDrk", 659, 669)],
    "test": [("", "--6bJUbfpnQ", 17, 27)],
}


def stem(clip: tuple[str, str, int, int]) -> str:
    return f"{clip[1]}_{clip[2]:06d}_{clip[3]:06d}"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def lay_out(root: Path, how: str = "flat", ending: str = "mp4") -> None:
    """Write all the videos but one."""
    for split, clips in CLIPS.items():
        for clip in clips:
            label = clip[0]
            folder = {
                "flat": split,
                "classes": f"{split}/{label or 'test'}",
                "underscores": f"videos_{split}/{label.replace(' ', '_')}",
                "bare": f"{split}_256/" + label.translate(dict.fromkeys(map(ord, "()'"))),
                "mixed": "all",
            }[how]
            if clip[1] != "--gone-gone":
                touch(root, f"{folder}/{stem(clip)}.{ending}")


def write_csv(folder: Path, cc: bool = False, split_of_val: str = "val") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, clips in CLIPS.items():
        head = "youtube_id,time_start,time_end,split"
        lines = [f"{c[1]},{c[2]},{c[3]},{split}" for c in clips]
        if split != "test":
            head = "label," + head
            lines = [f'"{c[0]}",{line}' for c, line in zip(clips, lines, strict=True)]
        if cc:
            head, lines = head + ",is_cc", [line + ",0" for line in lines]
        name = split_of_val if split == "val" else split
        (folder / f"{name}.csv").write_text("\r\n".join([head, *lines, ""]))


def rows(found: Annotations) -> dict[str, tuple[list[int], str, str]]:
    table = found.rows.to_pydict()
    stems = [path.rpartition("/")[2].rpartition(".")[0] for path in table["path"]]
    columns = (table["labels"], table["split"], table["path"])
    return dict(zip(stems, zip(*columns, strict=True), strict=True))


def check(found: Annotations) -> None:
    assert found.label_names == CLASSES
    there = rows(found)
    for split, clips in CLIPS.items():
        for clip in clips:
            if clip[1] == "--gone-gone":
                assert stem(clip) not in there
                continue
            labels, in_split, path = there[stem(clip)]
            assert labels == ([CLASSES.index(clip[0])] if clip[0] else [])
            assert in_split == split
            assert Path(path).stem == stem(clip)
    assert any("1 of 8 rows" in note for note in found.notes)


@pytest.mark.parametrize("how", ["flat", "classes", "underscores", "bare", "mixed"])
@pytest.mark.parametrize("cc", [True, False])
def test_official_csv(tmp_path: Path, how: str, cc: bool) -> None:
    lay_out(tmp_path, how)
    write_csv(tmp_path / "annotations", cc)
    found = prepare(tmp_path, num_classes=4)
    check(found)
    assert found.official == {}  # nobody states counts of four classes
    assert len(found.notes) == 1


@pytest.mark.parametrize("ending", ["mkv", "webm", "avi"])
def test_csv_in_root_and_other_endings(tmp_path: Path, ending: str) -> None:
    lay_out(tmp_path, ending=ending)
    write_csv(tmp_path, split_of_val="validate")
    check(prepare(tmp_path, num_classes=4))


def test_annotations_elsewhere(tmp_path: Path) -> None:
    lay_out(tmp_path / "videos")
    write_csv(tmp_path / "lists")
    check(prepare(tmp_path / "videos", num_classes=4, annotations=str(tmp_path / "lists")))


def test_quotes_and_float_times(tmp_path: Path) -> None:
    lay_out(tmp_path)
    write_csv(tmp_path)
    quoted = ["label,youtube_id,time_start,time_end,split,is_cc"]
    quoted += [f"\"'{c[0]}'\",'{c[1]}',{c[2]}.0,{c[3]}.0,'train',0" for c in CLIPS["train"]]
    (tmp_path / "train.csv").write_text("\n".join(quoted))
    check(prepare(tmp_path, num_classes=4))


def test_deepmind_json(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "annotations").mkdir()
    for split, clips in CLIPS.items():
        entries = {
            c[1]: {
                "annotations": {
                    "segment": [float(c[2]), float(c[3])],
                    **({"label": c[0]} if c[0] else {}),
                },
                "duration": 10.0,
                "subset": split,
                "url": f"https://www.youtube.com/watch?v={c[1]}",
            }
            for c in clips
        }
        name = "validate" if split == "val" else split
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(entries))
    check(prepare(tmp_path, num_classes=4))


@pytest.mark.parametrize("kind", ["pyslowfast", "mmaction2", "no extension"])
def test_lists_of_path_and_label(tmp_path: Path, kind: str) -> None:
    lay_out(tmp_path, "underscores")
    for split, clips in CLIPS.items():
        lines = []
        for clip in clips:
            label, number = clip[0].replace(" ", "_"), CLASSES.index(clip[0]) if clip[0] else ""
            path = {
                "pyslowfast": f"/elsewhere/{split}/{label}/{stem(clip)}.mp4",
                "mmaction2": f"{label}/{stem(clip)}.mp4",
                "no extension": f"{stem(clip)}",
            }[kind]
            lines.append(f"{path} {number}")
        name = {
            "pyslowfast": f"{split}.csv",
            "mmaction2": f"kinetics4_{split}_list_videos.txt",
            "no extension": f"annotations/{split}.txt",
        }[kind]
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    found = prepare(tmp_path, num_classes=4)
    if kind == "no extension":
        assert found.label_names == ["0", "1", "2", "3"]
        assert "called by their numbers" in " ".join(found.notes)
        (tmp_path / "annotations" / "label_map_k4.txt").write_text("\n".join(CLASSES))
        found = prepare(tmp_path, num_classes=4)
    else:
        assert found.label_names == [name.replace(" ", "_") for name in CLASSES]
        found.label_names = CLASSES
    check(found)


def test_labels_that_a_list_may_not_have(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "train.csv").write_text("train/-7O581Lzrb4_000154_000164.mp4 4\n")
    with pytest.raises(UserError, match=r"hold the label 4, but data\.num_classes=4"):
        prepare(tmp_path, num_classes=4)
    (tmp_path / "train.csv").write_text("train/-7O581Lzrb4_000154_000164.mp4\n")
    with pytest.raises(UserError, match="hold no labels"):
        prepare(tmp_path, num_classes=4)


def test_replacements_stand_for_corrupted_files(tmp_path: Path) -> None:
    lay_out(tmp_path)
    write_csv(tmp_path / "annotations")
    spare = "replacement/replacement_for_corrupted_k400"
    touch(
        tmp_path, f"{spare}/-7O581Lzrb4_000154_000164.mp4", f"{spare}/0wR5jVB-WPk_000416_000427.mp4"
    )
    found = prepare(tmp_path, num_classes=4)
    table = found.rows.to_pydict()
    assert table["path"][0] == f"{spare}/-7O581Lzrb4_000154_000164.mp4"
    assert table["path"][3] == f"{spare}/0wR5jVB-WPk_000416_000427.mp4"  # by its id
    assert table["path"][1] == "train/_a_b_c-d_e-_000000_000010.mp4"
    assert len(found.notes) == 1  # no word of files that are not listed


def test_files_called_by_their_id_alone(tmp_path: Path) -> None:
    write_csv(tmp_path)
    touch(tmp_path, *(f"{s}/{c[1]}.mp4" for s, clips in CLIPS.items() for c in clips))
    found = prepare(tmp_path, num_classes=4)
    assert found.rows.num_rows == 8 and not found.notes


def test_a_clip_in_two_splits_is_found_in_each(tmp_path: Path) -> None:
    touch(tmp_path, "train/lqciwm6gDrk_000659_000669.mp4", "val/lqciwm6gDrk_000659_000669.mp4")
    head = "label,youtube_id,time_start,time_end,split\n"
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"{head}a,lqciwm6gDrk,659,669,{split}\n")
    assert prepare(tmp_path, num_classes=1).rows["path"].to_pylist() == [
        "train/lqciwm6gDrk_000659_000669.mp4",
        "val/lqciwm6gDrk_000659_000669.mp4",
    ]


def test_files_in_no_list_are_counted(tmp_path: Path) -> None:
    lay_out(tmp_path)
    write_csv(tmp_path)
    touch(tmp_path, "train/zzzzzzzzzzz_000000_000010.mp4", "train/aaaaaaaaaaa_000000_000010.mp4")
    notes = prepare(tmp_path, num_classes=4).notes
    assert (
        "2 files are in none of the annotation files, such as"
        " train/aaaaaaaaaaa_000000_000010.mp4" in notes
    )


def test_torchvision_layout_without_lists(tmp_path: Path) -> None:
    for split in ("train", "val"):
        touch(
            tmp_path,
            *(f"{split}/{c}/{split}-----_{i:06d}_000010.mp4" for i, c in enumerate(CLASSES)),
        )
    found = prepare(tmp_path, num_classes=4)
    assert found.label_names == CLASSES
    assert sorted(found.rows["split"].to_pylist()) == ["train"] * 4 + ["val"] * 4
    assert "folders' names" in found.notes[-1]
    with pytest.raises(UserError, match=r"4 classes, but data\.num_classes is 400"):
        prepare(tmp_path, num_classes=400)


def test_kinetics600_prefers_the_complete_txt(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{i:011d}_000000_000010.mp4" for i in range(601)))
    head = "label,youtube_id,time_start,time_end,split"
    lines = [f"class {i:03d},{i:011d},0,10,train" for i in range(600)]
    (tmp_path / "train.txt").write_text("\n".join([head, *lines]))
    (tmp_path / "train.csv").write_text("\n".join([head, *lines[:10]]))
    found = prepare(tmp_path, num_classes=600)
    assert found.rows.num_rows == 600
    assert found.official == {"train": 427_549}


def test_what_cannot_work_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"annotations or .*looked for train\.csv.*CVDF"):
        prepare(tmp_path, num_classes=400)
    write_csv(tmp_path / "annotations")
    with pytest.raises(UserError, match="none of the 8 videos"):
        prepare(tmp_path, num_classes=4)
    lay_out(tmp_path)
    with pytest.raises(UserError, match=r"4 classes, but data\.num_classes is 400"):
        prepare(tmp_path, num_classes=400)
    train = tmp_path / "annotations" / "train.csv"
    bad = {
        "label,youtube_id,start,end\na,lqciwm6gDrk,1,2\n": "time_start",
        "label,youtube_id,time_start,time_end\na,lqciwm6gDrk,one,2\n": "one",
        "label,youtube_id,time_start,time_end\na,lqciwm6gDrk,1,2,3,4\n": "Expected 4 columns",
        '{"lqciwm6gDrk": {}}': "annotations",
        "\n": "empty",
    }
    for text, message in bad.items():
        train.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            prepare(tmp_path, num_classes=4)
        assert str(train) in str(error.value)
