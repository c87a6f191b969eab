from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidtrain.data.manifest import Annotations
from vidtrain.data.prepare.folder import prepare
from vidtrain.types import UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def columns(found: Annotations, *names: str) -> list[tuple]:
    return list(zip(*(found.rows[name].to_pylist() for name in names), strict=True))


def sizes(found: Annotations) -> Counter:
    return Counter(found.rows["split"].to_pylist())


# folders


def test_a_folder_per_class(tmp_path: Path) -> None:
    names = [f"{c}/{i}.mp4" for c in ("zumba", "Ab seil's (x)") for i in range(10)]
    touch(tmp_path, *names, "zumba/deep/er/10.avi", "readme.md")
    found = prepare(tmp_path)
    assert found.label_names == ["Ab seil's (x)", "zumba"]
    labels = dict(columns(found, "path", "labels"))
    assert labels["Ab seil's (x)/3.mp4"] == [0] and labels["zumba/deep/er/10.avi"] == [1]
    assert sizes(found) == {"train": 15, "val": 2, "test": 4}
    assert prepare(tmp_path).rows.equals(found.rows)
    other = prepare(tmp_path, split_seed=1)
    assert sizes(other) == sizes(found) and not other.rows.equals(found.rows)


def test_fractions(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{c}/{i}.mp4" for c in "ab" for i in range(10)))
    assert sizes(prepare(tmp_path, test_fraction=0.5, val_fraction=0)) == {"train": 10, "test": 10}
    assert sizes(prepare(tmp_path, test_fraction=0, val_fraction=0)) == {"train": 20}
    for bad in ({"test_fraction": 1.0}, {"val_fraction": -0.5}):
        with pytest.raises(UserError, match=f"data.{next(iter(bad))}"):
            prepare(tmp_path, **bad)


@pytest.mark.parametrize("val", ["val", "validation", "Valid"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    touch(
        tmp_path, "train/a/1.mp4", "train/b/2.mp4", f"{val}/a/3.mp4", "test/b/4.mp4", "test/5.mp4"
    )
    found = prepare(tmp_path)
    assert found.label_names == ["a", "b"]
    expected = [
        ("test/b/4.mp4", [1], "test"),
        ("train/a/1.mp4", [0], "train"),
        ("train/b/2.mp4", [1], "train"),
        (f"{val}/a/3.mp4", [0], "val"),
    ]
    assert columns(found, "path", "labels", "split") == sorted(expected)
    assert found.notes == ["1 videos are left out: they are in no class folder"]


def test_validation_is_carved_out_of_split_folders(tmp_path: Path) -> None:
    touch(
        tmp_path, *(f"{s}/{c}/{i}.mp4" for s in ("train", "test") for c in "ab" for i in range(10))
    )
    assert sizes(prepare(tmp_path)) == {"train": 18, "val": 2, "test": 20}


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.mp4", "test/2.mp4")  # (vehicles and exams)
    assert prepare(tmp_path).label_names == ["test", "train"]


def test_folders_of_frames_are_videos(tmp_path: Path) -> None:
    touch(tmp_path, "a/v1/1.jpg", "a/v1/2.jpg", "b/v2/1.jpg")
    assert columns(prepare(tmp_path), "path", "labels") == [("a/v1", [0]), ("b/v2", [1])]


def test_folders_that_cannot_work_say_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        prepare(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no video under"):
        prepare(tmp_path)
    touch(tmp_path, "1.mp4")
    with pytest.raises(UserError, match="directly in"):
        prepare(tmp_path)
    (tmp_path / "1.mp4").unlink()
    touch(tmp_path, "data/a/1.mp4", "data/b/1.mp4")
    with pytest.raises(UserError, match="one class only, 'data'"):
        prepare(tmp_path)


# tables

TABLE = [
    ("path", "label", "split", "group"),
    ("clips/a 1.mp4", "yes", "Training", "g1"),
    ("./clips//b,2.mp4", "no", "train", "g2"),
    ("clips/#3.mp4", "yes", "validation", ""),
    ("clips/gone.mp4", "no", "train", "g3"),
    ("clips/ü4.mp4", " no ", "test", "g4"),
]
FILES = ["clips/a 1.mp4", "clips/b,2.mp4", "clips/#3.mp4", "clips/ü4.mp4"]
EXPECTED = [
    ("clips/a 1.mp4", [1], "train", "g1"),
    ("clips/b,2.mp4", [0], "train", "g2"),
    ("clips/#3.mp4", [1], "val", None),
    ("clips/ü4.mp4", [0], "test", "g4"),
]


def write(path: Path, rows: list[tuple]) -> Path:
    names, *values = rows
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in values]
        path.write_text("\n".join([*lines, ""]))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({n: [row[i] for row in values] for i, n in enumerate(names)}), path)
    else:
        mark = {".tsv": "\t"}.get(path.suffix, ";" if "semicolon" in str(path.parent) else ",")
        quoted = ([f'"{v}"' if mark in str(v) else str(v) for v in row] for row in rows)
        path.write_bytes("\r\n".join(mark.join(row) for row in quoted).encode("utf-8-sig"))
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path: Path, ending: str) -> None:
    touch(tmp_path, *FILES, "clips/in no table.mp4")
    source = write(tmp_path / f"videos.{ending}", TABLE)
    found = prepare(tmp_path)
    assert columns(found, "path", "labels", "split", "group") == EXPECTED
    assert found.label_names == ["no", "yes"]
    assert found.official == {"train": 3, "val": 1, "test": 1}  # as the table says
    assert found.notes == [
        f"1 of 5 rows of {source} have no file under {tmp_path}; they are left out"
    ]


def test_semicolons_and_a_table_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = touch(tmp_path / "root", *FILES)
    (tmp_path / "semicolon").mkdir()
    source = write(tmp_path / "semicolon" / "list.csv", TABLE)
    assert columns(prepare(root, annotations=str(source)), "path", "labels", "split", "group") == (
        EXPECTED
    )
    monkeypatch.chdir(tmp_path)
    found = prepare(Path("root"), annotations="semicolon/list.csv")
    assert columns(found, "path", "labels", "split", "group") == EXPECTED
    write(root / "sub.csv", TABLE[:3])
    assert prepare(root, annotations="sub.csv").rows.num_rows == 2  # relative to root


def test_other_column_names(tmp_path: Path) -> None:
    touch(tmp_path, *FILES)
    write(tmp_path / "videos.csv", [("file", "command", "part", "person"), *TABLE[1:]])
    with pytest.raises(UserError, match=r"no column 'path'; it has file, command, part, person"):
        prepare(tmp_path)
    with pytest.raises(UserError, match=r"no column 'persn'.*with data\.group=person"):
        prepare(tmp_path, path="file", label="command", group="persn")
    found = prepare(tmp_path, path="file", label="command", split="part", group="person")
    assert columns(found, "path", "labels", "split", "group") == EXPECTED


def test_the_nearest_column_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    write(tmp_path / "videos.csv", [("path", "Label"), ("a.mp4", "x")])
    with pytest.raises(UserError, match=r"videos\.csv has no column 'label'.*data\.label=Label"):
        prepare(tmp_path)


def labelled(tmp_path: Path, labels: list, ending: str = "csv", **options: object) -> Annotations:
    names = [f"{i}.mp4" for i in range(len(labels))]
    touch(tmp_path, *names)
    write(tmp_path / f"videos.{ending}", [("path", "label"), *zip(names, labels, strict=True)])
    return prepare(tmp_path, test_fraction=0, val_fraction=0, **options)


def test_numbers_from_zero_on_are_class_numbers(tmp_path: Path) -> None:
    found = labelled(tmp_path, list(range(11)))
    assert found.label_names == [str(i) for i in range(11)]  # 10 after 9, not after 1
    assert found.rows["labels"].to_pylist() == [[i] for i in range(11)]


def test_other_numbers_are_names(tmp_path: Path) -> None:
    found = labelled(tmp_path, [2005, 30, 100], "parquet")
    assert found.label_names == ["30", "100", "2005"]
    assert found.rows["labels"].to_pylist() == [[2], [0], [1]]


def test_more_classes_than_numbers_make_them_class_numbers(tmp_path: Path) -> None:
    found = labelled(tmp_path, ["3", "007", "1"], num_classes=8)
    assert found.label_names == [str(i) for i in range(8)]
    assert found.rows["labels"].to_pylist() == [[3], [7], [1]]
    assert len(labelled(tmp_path, ["0", "1"], num_classes=5).label_names) == 5
    with pytest.raises(UserError, match="has the number 7"):
        labelled(tmp_path, ["3", "007", "1"], num_classes=7)


@pytest.mark.parametrize("labels", [[1, 2], [0, 1], [5, 30], ["a", "b"], ["07", "7"]])
def test_the_number_of_classes_found_changes_nothing(tmp_path: Path, labels: list) -> None:
    """A checkpoint's config says how many classes there were: read again, they are the same."""
    found = labelled(tmp_path, labels)
    again = labelled(tmp_path, labels, num_classes=len(found.label_names))
    assert again.label_names == found.label_names
    assert again.rows.equals(found.rows)


def test_a_column_of_ids_is_no_label(tmp_path: Path) -> None:
    rows = [(f"{i}.mp4", f"id {i}") for i in range(32_768)]
    write(tmp_path / "videos.csv", [("path", "label"), *rows])
    with pytest.raises(UserError, match=r"'label' has 32,768 different values"):
        prepare(tmp_path)


def test_labels_are_taken_as_they_are_written(tmp_path: Path) -> None:
    found = labelled(tmp_path, ["NA", "nan", "null", "True", "1.0", "2020-01-01"])
    assert found.label_names == ["1.0", "2020-01-01", "NA", "True", "nan", "null"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_typed_labels(tmp_path: Path, ending: str) -> None:
    for kind in ([0.0, 1.0, 2.0], [0, 1, 2]):
        assert labelled(tmp_path, kind, ending).label_names == ["0", "1", "2"]
    assert labelled(tmp_path, [True, False], ending).label_names == ["false", "true"]
    assert labelled(tmp_path, [["b"], ["a"]], ending).label_names == ["a", "b"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_several_labels(tmp_path: Path, ending: str) -> None:
    labels = ["b | a", "a", "", "c|b"]
    if ending != "csv":
        labels = [["b", "a"], ["a"], [], ["c", "b"]]
        with pytest.raises(UserError, match=r"up to 2 labels.*data\.multi_label=true"):
            labelled(tmp_path, labels, ending)
    found = labelled(tmp_path, labels, ending, multi_label=True)
    assert found.label_names == ["a", "b", "c"]
    assert found.rows["labels"].to_pylist() == [[1, 0], [0], [], [2, 1]]


def test_a_bar_is_part_of_a_single_label(tmp_path: Path) -> None:
    assert labelled(tmp_path, ["a|b", "c"]).label_names == ["a|b", "c"]


def test_rows_without_a_label_or_a_split(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.mp4" for i in range(6)))
    rows = [("0", "a", "train"), ("1", "b", "train"), ("2", "", "train"), ("3", "", "test")]
    rows += [("4", "a", ""), ("5", "a", "test")]
    source = write(
        tmp_path / "videos.csv",
        [("path", "label", "split"), *((f"{n}.mp4", *rest) for n, *rest in rows)],
    )
    found = prepare(tmp_path, val_fraction=0)
    assert columns(found, "path", "labels", "split") == [
        ("0.mp4", [0], "train"),
        ("1.mp4", [1], "train"),
        ("3.mp4", [], "test"),
        ("5.mp4", [0], "test"),
    ]
    assert found.notes == [
        f"1 rows of {source} have no split; they are left out",
        f"1 rows of {source} have no label; they are left out",
    ]


def test_pieces_of_videos(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.mp4" for i in range(10)))
    rows = [(f"{i // 3}.mp4", "ab"[i % 2], i % 3, f"{i % 3 + 0.5}") for i in range(30)]
    write(
        tmp_path / "videos.csv", [("path", "label", "start", "end"), *rows, ("1.mp4", "a", "", "")]
    )
    found = prepare(tmp_path)
    pieces = columns(found, "path", "start", "end", "split")
    assert pieces[1][:3] == ("0.mp4", 1.0, 1.5) and pieces[30][:3] == ("1.mp4", None, None)
    sides = {path: {s for p, _, _, s in pieces if p == path} for path, *_ in pieces}
    assert all(len(side) == 1 for side in sides.values())  # pieces of a file stay together
    assert set(sizes(found)) == {"train", "val", "test"}


@pytest.mark.parametrize("piece", [("2", "1"), ("1", "1"), ("-1", "2"), ("", "-1"), ("0", "inf")])
def test_pieces_that_cannot_be(tmp_path: Path, piece: tuple[str, str]) -> None:
    touch(tmp_path, "a.mp4")
    rows = [("a.mp4", "x", "0", "1"), ("a.mp4", "y", *piece)]
    write(tmp_path / "videos.csv", [("path", "label", "start", "end"), *rows])
    with pytest.raises(UserError, match="the first is row 2"):
        prepare(tmp_path)


def test_seconds_are_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    rows = [("path", "label", "from"), ("a.mp4", "x", "00:01"), ("a.mp4", "y", "1")]
    write(tmp_path / "videos.csv", rows)
    with pytest.raises(UserError, match="column 'from' should hold seconds"):
        prepare(tmp_path, start="from")


def test_groups_never_lie_on_both_sides(tmp_path: Path) -> None:
    names = [f"{i}.mp4" for i in range(200)]
    touch(tmp_path, *names)
    rows = [(n, "ab"[i % 2], f"person {i % 23}") for i, n in enumerate(names)]
    write(tmp_path / "videos.csv", [("path", "label", "group"), *rows])
    found = prepare(tmp_path)
    sides: dict[str, set[str]] = {}
    for group, split in columns(found, "group", "split"):
        sides.setdefault(group, set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert 30 <= sizes(found)["test"] <= 50 and 10 <= sizes(found)["val"] <= 22


def test_absolute_paths_below_the_root(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "in/a.mp4", "in/b.mp4")
    (tmp_path / "link").symlink_to(root)
    rows = [("path", "label"), (f"{root}/in/a.mp4", "x"), (f"{root}/in/b.mp4", "y")]
    source = write(tmp_path / "list.csv", rows)
    for top in (root, tmp_path / "link"):
        found = prepare(top, annotations=str(source), test_fraction=0, val_fraction=0)
        assert found.rows["path"].to_pylist() == ["in/a.mp4", "in/b.mp4"]
    found = prepare(Path("/"), annotations=str(source), test_fraction=0, val_fraction=0)
    assert found.rows["path"].to_pylist() == [f"{root}/in/{c}.mp4".lstrip("/") for c in "ab"]


@pytest.mark.parametrize("path", ["../out/b.mp4", "in/../../out/b.mp4", "/{tmp}/out/b.mp4"])
def test_paths_outside_the_root_are_refused(tmp_path: Path, path: str) -> None:
    root = touch(tmp_path / "root", "in/a.mp4")
    touch(tmp_path / "out", "b.mp4")
    path = path.replace("/{tmp}", str(tmp_path))
    write(root / "videos.csv", [("path", "label"), ("in/a.mp4", "x"), (path, "y")])
    with pytest.raises(UserError, match=r"row 2: '.*out/b\.mp4' lies outside data\.root"):
        prepare(root)


def test_tables_that_cannot_work_say_why(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "b/2.mp4")
    with pytest.raises(UserError, match=r"list\.csv: there is no such file"):
        prepare(tmp_path, annotations="list.csv")
    with pytest.raises(UserError, match="not a table"):
        prepare(tmp_path, annotations="a/1.mp4")

    source = tmp_path / "videos.csv"
    cases = {
        "": "videos.csv",
        "path,label\n": "has no rows",
        "path,label\n1.mp4,a,b\n": "Expected 2 columns, got 3",
        "path,label,label\n1.mp4,a,b\n": "two columns are called 'label'",
        "path,label\nno.mp4,a\nnot.mp4,b\n": "none of the 2 videos",
        "path,label\na/1.mp4,\nb/2.mp4,\n": "'label' is empty",
        "path,label\na/1.mp4,x\nb/2.mp4,x\n": "one class only, 'x'",
    }
    for text, message in cases.items():
        source.write_text(text)
        with pytest.raises(UserError, match=message):
            prepare(tmp_path)
    source.write_bytes(b"path,label\na/1.mp4,caf\xe9\n")
    with pytest.raises(UserError, match=r"(?i)utf"):
        prepare(tmp_path)
    source.unlink()

    source = tmp_path / "videos.jsonl"
    cases = {
        '{"path": "a/1.mp4"\n': "line 1 is not JSON",
        '{"path": "a/1.mp4"}\n\n["b"]\n': "line 3 is not an object",
        '{"path": 1, "label": "x"}\n{"path": "b", "label": "y"}\n': "of several kinds",
    }
    for text, message in cases.items():
        source.write_text(text)
        with pytest.raises(UserError, match=message):
            prepare(tmp_path)

    (tmp_path / "annotations.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"choose with data\.annotations=FILE"):
        prepare(tmp_path)
    source.unlink()
    with pytest.raises(UserError, match=r"annotations\.parquet: "):
        prepare(tmp_path)


# real ones


def test_grid(shared: Path) -> None:
    found = prepare(shared / "datasets" / "grid", label="command")
    assert found.label_names == ["bin", "lay", "place", "set"]
    assert sizes(found) == {"train": 719, "val": 81, "test": 200}
    assert found.official == {"train": 719, "val": 81, "test": 200}
    tested = Counter(labels[0] for labels, s in columns(found, "labels", "split") if s == "test")
    assert tested == {0: 50, 1: 50, 2: 50, 3: 50}
    digits = prepare(shared / "datasets" / "grid", label="digit")
    assert digits.label_names == [*"123456789", "z"]  # z: zero
    assert not found.notes


def test_fight(shared: Path) -> None:
    found = prepare(shared / "datasets" / "fight")
    assert found.label_names == ["fight", "noFight"]
    assert sizes(found)["test"] == 64 and sizes(found)["train"] + sizes(found)["val"] == 174
    assert 14 <= sizes(found)["val"] <= 21
    groups: dict[str, set[str]] = {}
    for group, split in columns(found, "group", "split"):
        groups.setdefault(group, set()).add(split)
    assert all(len(side) == 1 for side in groups.values())
    held = Counter(labels[0] for labels, s in columns(found, "labels", "split") if s == "val")
    assert len(held) == 2
