from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vidtrain.data import manifest
from vidtrain.data.manifest import Annotations, Manifest, Place, Row, export, make_rows, save
from vidtrain.data.prepare import folder
from vidtrain.types import UserError

NAMES = ["archery", "bowling", "hurling (sport)"]


def small(**columns: object) -> Annotations:
    rows = make_rows(
        ["a/1.mp4", "a/ü 2.mp4", "b/#3.avi", "b/4.mp4"],
        [[0], [2, 1], [], [1]],
        ["train", "train", "test", "val"],
        **columns,
    )
    return Annotations(rows, NAMES, {"train": 3}, ["one row is missing"])


def saved(path: Path, annotations: Annotations | None = None) -> Manifest:
    save(annotations or small(), path / "small.arrow", "small", path / "videos")
    return Manifest(path / "small.arrow")


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    found = saved(
        tmp_path,
        small(start=[None, 1.5, None, 0], end=[None, 2, None, 3], group=["g1", None, "g2", "g1"]),
    )
    assert len(found) == 4
    assert found.row(0) == Row("a/1.mp4", (0,), None, None, "train", "g1")
    assert found.row(np.int64(1)) == Row("a/ü 2.mp4", (2, 1), 1.5, 2.0, "train", None)
    assert found.row(2) == Row("b/#3.avi", (), None, None, "test", "g2")
    assert found.absolute_path(found.row(2)) == tmp_path / "videos" / "b" / "#3.avi"
    for i in (-1, 4):
        with pytest.raises(IndexError):
            found.row(i)


def test_header(tmp_path: Path) -> None:
    found = saved(tmp_path)
    assert found.label_names == NAMES
    assert found.official == {"train": 3}
    assert found.notes == ["one row is missing"]
    assert found.root == str(tmp_path / "videos")
    assert found.name == "small"
    assert found.row(0).start is None and found.row(0).group is None


def test_relative_root_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(small(), Path("m.arrow"), "small", Path("videos"))
    assert Manifest(Path("m.arrow")).root == str(tmp_path / "videos")


def packed(offsets: object = (512, 0, 7, 9), shard: str = "train-000000.tar") -> Annotations:
    rows = small().rows
    shards = [shard, "train-000001.tar", shard, shard]
    for name, values in {"shard": shards, "offset": offsets, "size": [5, 6, 7, 8]}.items():
        rows = rows.append_column(name, pa.array(values))
    return Annotations(rows, NAMES)


def test_places_of_packed_videos(tmp_path: Path) -> None:
    found = saved(tmp_path, packed())
    row = found.row(1)
    assert row == Row("a/ü 2.mp4", (2, 1), None, None, "train", None, ("train-000001.tar", 0, 6))
    assert found.row(3).place == Place("train-000000.tar", 9, 8)
    assert found.location(row) == f"{tmp_path}/videos/train-000001.tar:a/ü 2.mp4"
    with pytest.raises(UserError, match="no file of its own: small is packed"):
        found.absolute_path(row)
    files = saved(tmp_path / "files")
    assert files.row(1).place is None
    assert files.location(files.row(1)) == str(files.absolute_path(files.row(1)))
    assert found.fingerprint == files.fingerprint, "a run could not go on with the packed copy"


@pytest.mark.parametrize(
    "shard",
    ["../a.tar", "a/b.tar", "/a.tar", "..", ".a", "", "a\0", "a\n", "http:a", "%2e%2e", "a?b"],
)
def test_shards_stay_in_the_root(tmp_path: Path, shard: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a shard"):
        saved(tmp_path, packed(shard=shard))


def test_places_must_be_possible(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no video of .* can have 5 bytes at offset -1"):
        saved(tmp_path, packed([0, -1, 0, 0]))
    with pytest.raises(ValueError, match="'offset' has nulls"):
        saved(tmp_path, packed([0, None, 0, 0]))


def test_a_root_may_be_a_url(tmp_path: Path) -> None:
    save(packed(), tmp_path / "m.arrow", "small", "s3://bucket/a set/")
    found = Manifest(tmp_path / "m.arrow")
    assert found.root == "s3://bucket/a set"
    assert found.location(found.row(0)) == "s3://bucket/a set/train-000000.tar:a/1.mp4"
    with pytest.raises(UserError, match="no file of its own"):
        found.absolute_path(found.row(0))
    save(small(), tmp_path / "n.arrow", "small", "s3://bucket/a set/")
    with pytest.raises(UserError, match="no file of its own"):
        Manifest(tmp_path / "n.arrow").absolute_path(small_row := found.row(0))
    assert small_row.place


def test_splits_and_counts(tmp_path: Path) -> None:
    found = saved(tmp_path)
    assert found.splits == {"train": 2, "test": 1, "val": 1}
    train = found.split("train")
    assert train.dtype == np.int64 and train.tolist() == [0, 1]
    assert found.split("val").tolist() == [3]
    assert found.split("holdout").tolist() == []
    assert found.label_counts("train").tolist() == [1, 1, 1]
    assert found.label_counts("test").tolist() == [0, 0, 0]
    assert found.label_counts("holdout").tolist() == [0, 0, 0]


def test_fingerprint_follows_what_training_sees(tmp_path: Path) -> None:
    base = saved(tmp_path / "0").fingerprint
    assert saved(tmp_path / "1", small()).fingerprint == base
    other_group = small(group=["x", "x", "y", "y"])
    assert saved(tmp_path / "2", other_group).fingerprint == base

    changes = {
        "path": ["a/1.mp4", "a/ü 2.mp4", "b/#3.avi", "b/5.mp4"],
        "shifted": ["a/1.mp4a", "/ü 2.mp4".strip("/"), "b/#3.avi", "b/4.mp4"],
        "labels": [[0], [2], [1], [1]],
        "split": ["train", "val", "test", "val"],
    }
    seen = {base}
    for name, values in changes.items():
        rows = small().rows.to_pydict() | {{"shifted": "path"}.get(name, name): values}
        changed = make_rows(rows["path"], rows["labels"], rows["split"])
        seen.add(manifest.fingerprint(changed, NAMES))
    seen.add(manifest.fingerprint(small().rows, ["other", *NAMES[1:]]))
    seen.add(manifest.fingerprint(small(start=[1, 2, 3, 4]).rows, NAMES))
    assert len(seen) == 7


def test_fingerprint_does_not_depend_on_chunks_or_offsets() -> None:
    rows = small(start=[None, 1.5, None, 0]).rows
    padded = pa.concat_tables([rows, rows, rows], promote_options="default")
    assert padded["path"].num_chunks == 3
    whole = manifest.fingerprint(padded, NAMES)
    assert manifest.fingerprint(padded.combine_chunks(), NAMES) == whole
    assert manifest.fingerprint(padded.slice(4, 4), NAMES) == manifest.fingerprint(rows, NAMES)
    assert manifest.fingerprint(padded.combine_chunks().slice(4, 4), NAMES) == manifest.fingerprint(
        rows, NAMES
    )


@pytest.mark.parametrize("bad", ["../b.mp4", "a/../../b.mp4", "a/..", "/etc/passwd", "a\0b"])
def test_paths_stay_below_the_root(tmp_path: Path, bad: str) -> None:
    rows = make_rows(["a.mp4", bad], [[0], [0]], ["train", "train"])
    with pytest.raises(UserError, match="leave the root"):
        save(Annotations(rows, NAMES), tmp_path / "m.arrow", "small", tmp_path)
    assert not list(tmp_path.iterdir())
    found = saved(tmp_path)
    with pytest.raises(UserError, match="outside the root"):
        found.absolute_path(Row(bad, (), None, None, "train", None))


def test_dots_in_names_are_no_way_out(tmp_path: Path) -> None:
    rows = make_rows(["..a/b..mp4", "a/...mp4"], [[0], [0]], ["train", "train"])
    found = saved(tmp_path, Annotations(rows, NAMES))
    assert found.absolute_path(found.row(0)) == tmp_path / "videos" / "..a" / "b..mp4"


def test_labels_need_names_and_rows_must_be(tmp_path: Path) -> None:
    path = tmp_path / "m.arrow"
    with pytest.raises(UserError, match="labels run from 0 to 3, but there are 3"):
        rows = make_rows(["a", "b"], [[0], [3]], ["train", "train"])
        save(Annotations(rows, NAMES), path, "small", tmp_path)
    with pytest.raises(UserError, match="no video"):
        save(Annotations(make_rows([], [], []), NAMES), path, "small", tmp_path)
    with pytest.raises(ValueError, match="'path' has nulls"):
        rows = make_rows(["a", None], [[0], [1]], ["train", "train"])
        save(Annotations(rows, NAMES), path, "small", tmp_path)


def broken(tmp_path: Path, kind: str) -> Path:
    path = saved(tmp_path).path
    whole = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("path,label\na.mp4,x\n" * 50)
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "last bytes gone":
        path.write_bytes(whole[:-4])
    elif kind == "another table":
        table = pa.table({"path": ["a.mp4"]})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "other version":
        path.write_bytes(whole.replace(b'{"format": 1', b'{"format": 0'))
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("empty", "text", "truncated", "last bytes gone"),
        *("another table", "other version", "folder", "missing"),
    ],
)
def test_what_is_no_manifest_says_so(tmp_path: Path, kind: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(UserError, match="vidtrain data action=prepare") as error:
        Manifest(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    if kind == "other version":
        assert "format 0" in str(error.value)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved(tmp_path)

    def full(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"small\.arrow cannot be written \(disk full\)"):
        saved(tmp_path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["small.arrow"]
    assert Manifest(before.path).fingerprint == before.fingerprint
    with pytest.raises(UserError, match="cannot be written"):
        save(small(), before.path / "below a file" / "m.arrow", "small", tmp_path)


def test_an_open_manifest_outlives_its_file(tmp_path: Path) -> None:
    found = saved(tmp_path)
    save(
        Annotations(make_rows(["new.mp4"], [[0]], ["train"]), NAMES),
        found.path,
        "small",
        tmp_path,
    )
    assert found.row(0).path == "a/1.mp4"
    copy = pickle.loads(pickle.dumps(found))
    with pytest.raises(UserError, match="written anew"):
        copy.row(0)  # a worker that starts now would see other rows than its parent
    assert Manifest(found.path).row(0).path == "new.mp4"


def worker(found: Manifest, queue: multiprocessing.Queue) -> None:
    queue.put((found.row(1), found.splits, found.split("train").tolist()))


@pytest.mark.parametrize("how", ["fork", "spawn"])
# Forking beside another library's threads is warned about from Python 3.12 on; ours start none.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_and_spawn_see_the_same(tmp_path: Path, how: str) -> None:
    found = saved(tmp_path)
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    process = context.Process(target=worker, args=(found, queue))
    process.start()
    assert queue.get(timeout=60) == (found.row(1), found.splits, [0, 1])
    process.join()
    assert process.exitcode == 0


def test_export_and_read_back(tmp_path: Path) -> None:
    annotations = small(group=["g1", None, "g2", "g1"], start=[None, 1.5, None, 0])
    found = saved(tmp_path, annotations)
    for row in range(4):
        file = found.absolute_path(found.row(row))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for ending in ("csv", "parquet"):
        table = tmp_path / f"table.{ending}"
        export(found, table)
        again = folder.prepare(Path(found.root), annotations=str(table), multi_label=True)
        assert again.rows.to_pydict() == annotations.rows.to_pydict()
        assert again.label_names == NAMES
    with pytest.raises(UserError, match=r"\.parquet or \.csv"):
        export(found, tmp_path / "table.xlsx")


def test_a_million_rows_stay_on_disk(tmp_path: Path) -> None:
    """What 1.1 million rows cost where it counts: pickled, and mapped instead of read."""
    count = 1_133_158
    numbers = pa.array(np.arange(count) % 487, pa.int32())
    paths = pa.array(np.char.add(np.arange(count).astype("S11"), b".mp4")).cast(pa.string())
    rows = pa.table(
        {
            "path": paths,
            "labels": manifest.single_labels(numbers),
            "split": pa.array(np.where(np.arange(count) % 5, "train", "test")),
        }
    )
    path = tmp_path / "sports.arrow"
    save(Annotations(rows, [str(i) for i in range(487)]), path, "sports", tmp_path)
    del rows, paths, numbers
    program = (
        "import pickle, sys, pyarrow as pa\n"
        "from vidtrain.data.manifest import Manifest\n"
        "found = Manifest(sys.argv[1])\n"
        "found.row(1_000_000), found.split('train')\n"
        "print(len(found), len(pickle.dumps(found)), pa.total_allocated_bytes())\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True
    )
    rows_there, pickled, allocated = map(int, out.stdout.split())
    assert rows_there == count
    assert pickled < 1_000
    assert allocated < 1_000_000, "the columns were read, not mapped"
    found = Manifest(path)
    assert found.row(1_000_000) == Row("1000000.mp4", (1_000_000 % 487,), None, None, "test", None)
    assert sum(found.splits.values()) == count
    assert found.label_counts("train").sum() == found.splits["train"]
