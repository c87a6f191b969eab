from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vidtrain.data import manifest, pack
from vidtrain.data.decode import open_video
from vidtrain.data.manifest import Annotations, Manifest, make_rows
from vidtrain.data.order import TrainingOrder
from vidtrain.data.prepare import packed
from vidtrain.data.shards import Shards
from vidtrain.types import UserError

NAMES = ["archery", "bowling", "hurling (sport)"]
KB = 1 / 1024  # in MiB


def dataset(folder: Path, count: int = 40, **columns: object) -> Manifest:
    """Files of random bytes, sorted by class; the last fifth is the test split."""
    rng = np.random.default_rng(0)
    labels = np.sort(np.arange(count) % 3).tolist()
    paths = [f"{NAMES[label]}/ü {i}.{'MP4' if i % 2 else 'avi'}" for i, label in enumerate(labels)]
    for path in paths:
        file = folder / "videos" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(rng.bytes(int(rng.integers(1, 3000))))
    splits = ["test" if i % 5 == 4 else "train" for i in range(count)]
    rows = make_rows(paths, [[label] for label in labels], splits, **columns)
    return saved(folder, Annotations(rows, NAMES, {"train": 33}, ["one is missing"]))


def saved(folder: Path, annotations: Annotations) -> Manifest:
    manifest.save(annotations, folder / "set.arrow", "set", folder / "videos")
    return Manifest(folder / "set.arrow")


def run(source: Manifest, out: Path, shard_mb: float = 10 * KB, **settings: object) -> pack.Packed:
    plan = pack.plan(source, shard_mb=shard_mb, **settings)
    return pack.pack(source, plan, out, workers=2)


def opened(out: Path) -> Manifest:
    manifest.save(packed.prepare(out), out.parent / "packed.arrow", "packed", out)
    return Manifest(out.parent / "packed.arrow")


def samples(shard: Path) -> list[dict[str, bytes]]:
    """Group a shard's members as WebDataset does: neighbours whose names agree up to the first dot."""
    found: list[dict[str, bytes]] = []
    with tarfile.open(shard, "r|") as tar:
        for member in tar:
            assert member.isreg()
            key, _, ending = member.name.partition(".")
            if not found or found[-1]["__key__"] != key:
                found.append({"__key__": key})
            assert ending not in found[-1]
            found[-1][ending] = tar.extractfile(member).read()
    return found


def test_shards_are_what_webdataset_reads(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    out = tmp_path / "out"
    result = run(source, out)
    shards = sorted(path.name for path in out.glob("*.tar"))
    assert result == (40, len(shards), 0, [])
    numbers = {split: sum(split in name for name in shards) for split in ("test", "train")}
    assert shards == [f"{split}-{i:06d}.tar" for split, n in numbers.items() for i in range(n)]
    assert min(numbers.values()) > 1
    assert all((out / name).stat().st_size < 20 * 1024 for name in shards)
    keys, paths, classes = [], [], []
    for name in shards:
        for sample in samples(out / name):
            about = json.loads(sample["json"])
            path = source.root + "/" + about["path"]
            assert sample[path.rpartition(".")[2].lower()] == Path(path).read_bytes()
            assert about["split"] == name.split("-")[0]
            assert about["label"] == [NAMES[about["labels"][0]]] == [about["path"].split("/")[0]]
            assert about["start"] is about["end"] is about["group"] is None
            assert sample["cls"] == str(about["labels"][0]).encode()
            keys.append(sample["__key__"])
            paths.append(about["path"])
            classes.append(about["labels"][0])
    assert len(set(keys)) == 40 and keys == sorted(keys)
    assert sorted(paths) == sorted(source.table["path"].to_pylist())
    train = classes[8:]
    assert sum(a != b for a, b in itertools.pairwise(train)) > 10, "classes are not mixed"


def test_the_order_follows_the_seed(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(source, tmp_path / name, seed=seed)
    a, b, c = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in "abc"
    )
    assert a == b
    assert a != c


def test_gnu_tar_reads_them(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar on this machine")
    source = dataset(tmp_path, 6)
    run(source, tmp_path / "out", 1)
    (tmp_path / "x").mkdir()
    shard = str(tmp_path / "out" / "train-000000.tar")
    done = subprocess.run(
        ["tar", "-xvf", shard, "-C", str(tmp_path / "x")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    assert len(list((tmp_path / "x").iterdir())) == 3 * 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_package_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = dataset(tmp_path)
    run(source, tmp_path / "out")
    shards = sorted(map(str, (tmp_path / "out").glob("train-*.tar")))
    reader = webdataset.WebDataset(shards, shardshuffle=False).decode()
    found = {sample["json"]["path"]: sample for sample in reader}
    rows = [source.row(i) for i in source.split("train")]
    assert found.keys() == {row.path for row in rows}
    for row in rows:
        sample = found[row.path]
        video = sample.get("mp4", sample.get("avi"))
        assert video == source.absolute_path(row).read_bytes()
        assert sample["cls"] == row.labels[0]
    del reader
    gc.collect()  # it leaves the files that it opened to the garbage collector


def test_a_packed_dataset_is_the_same_dataset(tmp_path: Path) -> None:
    source = dataset(tmp_path, group=[f"g{i // 2}" for i in range(40)])
    out = tmp_path / "out"
    run(source, out)
    found = opened(out)
    assert found.fingerprint == source.fingerprint
    assert found.label_names == NAMES and found.official == {"train": 33}
    assert found.notes == ["one is missing"]
    assert found.splits == source.splits
    assert found.is_packed and not source.is_packed
    assert found.packed_version and not source.packed_version
    shards = Shards(found.root)
    for i in range(40):
        row, before = found.row(i), source.row(i)
        assert row.place is not None and replace(row, place=None) == before
        assert shards.read(row.place) == source.absolute_path(before).read_bytes()


def test_shuffled_globally_and_resumed_exactly(tmp_path: Path) -> None:
    """The order is one of row numbers, so a packed set has that of its files, in mid-epoch too."""
    source = dataset(tmp_path)
    run(source, tmp_path / "out")
    found = opened(tmp_path / "out")
    shards = Shards(found.root)

    def read(from_shards: bool, epoch: int, start: int = 0, rank: int = 0) -> list[tuple]:
        rows = found if from_shards else source
        numbers = rows.split("train")
        order = TrainingOrder(len(numbers), 4, 7, rank, 2)
        order.epoch, order.start = epoch, start
        seen = []
        for batch in order:
            for index, seed in batch:
                row = rows.row(int(numbers[index]))
                data = (
                    shards.read(row.place) if row.place else source.absolute_path(row).read_bytes()
                )
                seen.append((row.path, row.labels, seed, data))
        return seen

    for rank in (0, 1):
        for epoch in (0, 1):
            whole = read(True, epoch, rank=rank)
            assert whole == read(False, epoch, rank=rank)
            assert read(True, epoch, start=2, rank=rank) == whole[8:]
    assert read(True, 0) != read(True, 1)
    in_shards = [found.row(int(i)).place.shard for i in found.split("train")]
    first_batch = {found.row(int(found.split("train")[i])).place.shard for i, _ in next(
        iter(TrainingOrder(len(in_shards), 8, 7, 0, 1))
    )}  # fmt: skip
    assert len(first_batch) > 1, "a batch is drawn from one shard only"


def test_pieces_of_a_file_are_stored_once(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "noending", "c.tar.json"):
        (tmp_path / "videos").mkdir(exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(name.encode() * 50)
    rows = make_rows(
        ["a.mp4", "b.mp4", "a.mp4", "a.mp4", "noending", "c.tar.json"],
        [[0], [1, 2], [1], [0], [], [2]],
        ["train", "train", "train", "val", "train", "train"],
        start=[0, None, 5, 9, None, None],
        end=[4.5, None, 8, 11, None, None],
    )
    source = saved(tmp_path, Annotations(rows, NAMES))
    out = tmp_path / "out"
    assert run(source, out, 1) == (5, 2, 0, [])
    by_path = {json.loads(s["json"])["path"]: s for s in samples(out / "train-000000.tar")}
    a = json.loads(by_path["a.mp4"]["json"])
    assert [(p["start"], p["end"], p["labels"], p["label"]) for p in a["pieces"]] == [
        (0, 4.5, [0], ["archery"]),
        (5, 8, [1], ["bowling"]),
    ]
    assert all("cls" not in by_path[path] for path in ("a.mp4", "b.mp4", "noending"))
    assert by_path["c.tar.json"]["cls"] == b"2"
    assert by_path["noending"]["video"] == b"noending" * 50
    assert by_path["c.tar.json"]["video"] == b"c.tar.json" * 50
    found = opened(out)
    assert found.row(0).place == found.row(2).place != found.row(3).place
    assert [found.row(i).start for i in range(6)] == [0, None, 5, 9, None, None]
    shards = Shards(found.root)
    for i in range(6):
        row = found.row(i)
        assert shards.read(row.place) == row.path.encode() * 50
    run(source, tmp_path / "many", 1, multi_label=True)
    assert all("cls" not in s for s in samples(tmp_path / "many" / "train-000000.tar"))


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(source, whole)
    plan = pack.plan(source, shard_mb=10 * KB)
    written = 0

    def stop_halfway(size: int) -> None:
        nonlocal written
        written += size
        if written > 30_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack.pack(source, plan, out, workers=1, wrote=stop_halfway)
    early = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(early) < len(plan.shards)
    assert {path.name for path in out.iterdir()} == {pack.RECORD, *early}, "half a shard was left"
    with pytest.raises(UserError, match=r"index\.parquet: file not found"):
        packed.prepare(out)
    # As a machine that lost its power might leave it:
    (out / ".part-x").mkdir()
    (out / ".part-x" / "train-000003.tar").write_bytes(b"half")
    with (out / pack.RECORD).open("a") as record:
        record.write('{"shard": "train-0000')
    victim = sorted(early)[0]
    (out / victim).write_bytes((out / victim).read_bytes()[:-1000])

    assert run(source, out).kept == len(early) - 1
    for path in whole.glob("*.tar"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for name in early.keys() - {victim}:
        assert (out / name).stat().st_mtime_ns == early[name]
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert run(source, out).kept == len(times)
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert opened(out).fingerprint == source.fingerprint


def test_changed_sources_are_packed_anew(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    out = tmp_path / "out"
    before = run(source, out)
    row = source.row(0)
    path = source.absolute_path(row)
    path.write_bytes(path.read_bytes()[::-1])  # of the same size: its time tells
    was = opened(out).packed_version
    after = run(source, out)
    assert after.kept == before.shards - 1
    found = opened(out)
    assert found.packed_version != was, "kept clips would be taken for the new ones"
    assert Shards(found.root).read(found.row(0).place) == path.read_bytes()
    for i in range(20, 40):
        source.absolute_path(source.row(i)).write_bytes(b"short")
    fewer = run(source, out)
    assert fewer.shards < before.shards
    assert len(list(out.glob("*.tar"))) == fewer.shards, "a shard of before is left"
    found = opened(out)
    shards = Shards(found.root)
    for i in range(40):
        assert shards.read(found.row(i).place) == source.absolute_path(source.row(i)).read_bytes()


def test_what_cannot_be_packed_is_left_out_and_named(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    files = [source.absolute_path(source.row(i)) for i in range(40)]
    content = [file.read_bytes() for file in files]
    files[3].unlink()
    files[7].write_bytes(b"")
    files[9].unlink()
    os.mkfifo(files[9])
    files[11].unlink()
    files[11].symlink_to(files[11])
    plan = pack.plan(source, shard_mb=10 * KB)
    files[20].write_bytes(content[20][:-1])  # meanwhile
    files[21].write_bytes(content[21] + b"more")
    files[22].unlink()
    out = tmp_path / "out"
    result = pack.pack(source, plan, out, workers=2)
    reasons = {Path(path): reason for path, reason in result.left_out}
    assert reasons.keys() == {files[i] for i in (3, 7, 9, 11, 20, 21, 22)}
    assert reasons[files[3]] == "file not found" and "empty" in reasons[files[7]]
    assert reasons[files[9]] == "a named pipe, not a file" and "cannot" in reasons[files[11]]
    assert reasons[files[20]] == reasons[files[21]] == "its size changed while it was packed"
    assert "No such file" in reasons[files[22]]
    assert result.videos == len(opened(out)) == 33
    found = opened(out)
    shards = Shards(found.root)
    for row in map(found.row, range(33)):
        at = files.index(source.absolute_path(source.row(0)).parents[1] / row.path)
        assert shards.read(row.place) == content[at]
    for i in (20, 21, 22):
        files[i].write_bytes(content[i])
    again = run(source, out)
    assert again.videos == 36 and 0 < again.kept < again.shards
    for file in files:
        file.unlink(missing_ok=True)
    with pytest.raises(UserError, match="not one of 40 videos can be packed; the first is"):
        run(source, out)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_no_permission_is_named(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    source.absolute_path(source.row(0)).chmod(0)
    assert run(source, tmp_path / "out").left_out[0].reason == "no permission to read it"


def test_the_output_folder_is_ours(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="holds other files"):
        run(source, out)
    shutil.rmtree(out)
    out.write_text("a file")
    with pytest.raises(UserError, match=r"out cannot be written \(File exists\)"):
        run(source, out)
    out.unlink()
    run(source, out)
    for settings in ({"seed": 1}, {"shard_mb": 1}):
        with pytest.raises(UserError, match=f"packed with another {next(iter(settings))};"):
            run(source, out, **settings)
    kept = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="packed with another split;"):
        run(source, out, split="test")
    with pytest.raises(UserError, match="packed with another root and seed;"):
        run(dataset(tmp_path / "other"), out, seed=1)
    assert kept == {path: path.read_bytes() for path in out.iterdir()}

    lines = (out / pack.RECORD).read_text().splitlines()
    (out / pack.RECORD).write_text("\n".join(lines[:-1]) + "\n")
    name = json.loads(lines[-1])["shard"]
    with pytest.raises(UserError, match=rf"{name} is there, and was not packed"):
        run(source, out)
    assert (out / name).read_bytes() == kept[out / name]


def test_a_record_from_elsewhere_removes_nothing_outside(tmp_path: Path) -> None:
    source = dataset(tmp_path)
    out = tmp_path / "out"
    run(source, out)
    precious = tmp_path / "precious"
    precious.write_text("x")
    with (out / pack.RECORD).open("a") as record:
        for name in ("../precious", str(precious)):
            record.write(json.dumps({"shard": name, "digest": "", "size": 1}) + "\n")
        record.write('[1]\n3\n{"shard": 3, "digest": 1, "size": 1}\n')
    run(source, out)
    assert precious.exists()


def test_a_full_disk_is_said_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dataset(tmp_path)
    out = tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"out needs 0\.0 GB, its disk has 0\.0 GB free"):
        run(source, out)
    monkeypatch.undo()
    synced: list[int] = []
    fsync = os.fsync

    def full(file: int) -> None:
        synced.append(file)
        if len(synced) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(pack.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device\); finished shards stay"):
        run(source, out)
    monkeypatch.undo()
    assert not list(out.glob(".part-*"))
    assert run(source, out).kept > 0
    assert opened(out).fingerprint == source.fingerprint


def test_folders_of_pictures_and_odd_splits_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "videos" / "frames"
    folder.mkdir(parents=True)
    (folder / "0.jpg").write_bytes(b"x")
    source = saved(tmp_path, Annotations(make_rows(["frames"], [[0]], ["train"]), NAMES))
    with pytest.raises(UserError, match="frames is a folder of pictures"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source = dataset(tmp_path)
    rows = source.table.set_column(
        source.table.column_names.index("split"), "split", [["../x"] * 40]
    )
    source = saved(tmp_path, Annotations(rows, NAMES))
    with pytest.raises(UserError, match=r"the split '\.\./x' cannot"):
        run(source, tmp_path / "out")
    run(dataset(tmp_path), tmp_path / "out")
    with pytest.raises(UserError, match="packed is packed"):
        run(opened(tmp_path / "out"), tmp_path / "twice")


def test_an_index_from_elsewhere_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = tmp_path / "out"
    run(dataset(tmp_path), out)
    index = out / packed.INDEX
    whole, table = index.read_bytes(), pq.read_table(index)

    def without(name: str) -> pa.Table:
        return table.drop_columns(name)

    def with_column(name: str, values: list) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    def header(**changes: object) -> pa.Table:
        known = json.loads(table.schema.metadata[manifest.KEY])
        return table.replace_schema_metadata({manifest.KEY: json.dumps({**known, **changes})})

    bad = [without("shard"), table.replace_schema_metadata(), header(label_names="abc")]
    bad += [with_column("offset", ["x"] * 40), with_column("path", [None] * 40), header(official=1)]
    for one in bad:
        pq.write_table(one, index)
        with pytest.raises(UserError, match="not a whole index") as error:
            packed.prepare(out)
        assert str(index) in str(error.value) and "\n" not in str(error.value)
    for data in (b"", b"path,label\n" * 9, whole[:-100]):
        index.write_bytes(data)
        with pytest.raises(UserError, match="not a whole index"):
            packed.prepare(out)
    # Whole, but leading outside, or nowhere:
    for name, value in (
        *(
            ("shard", shard)
            for shard in ("../x.tar", "/etc/passwd", "a/b", "..", "http://h/x", "%2e")
        ),
        *(("path", path) for path in ("../x.mp4", "/x.mp4")),
        *(("offset", -1), ("size", 0)),
    ):
        pq.write_table(with_column(name, [*table[name].to_pylist()[:-1], value]), index)
        with pytest.raises(UserError, match=r"cannot be the name|leave the root|no video of"):
            opened(out)


def test_real_videos_come_back_to_the_byte_and_frame(shared: Path, tmp_path: Path) -> None:
    paths = sorted(path.name for path in (shared / "videos").iterdir())
    rows = make_rows(paths, [[0]] * len(paths), ["train"] * len(paths))
    manifest.save(Annotations(rows, NAMES), tmp_path / "m.arrow", "real", shared / "videos")
    source = Manifest(tmp_path / "m.arrow")
    run(source, tmp_path / "out", 1)
    found = opened(tmp_path / "out")
    shards = Shards(found.root)
    for i in range(len(found)):
        file, row = source.absolute_path(source.row(i)), found.row(i)
        data = shards.read(row.place)
        assert data == file.read_bytes()
        with open_video(file) as one, open_video(data, name=found.location(row)) as other:
            assert len(one) == len(other)
            wanted = [0, len(one) // 2, len(one) - 1]
            assert torch.equal(one.frames(wanted), other.frames(wanted))


def test_the_command(
    vidtrain: Callable, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(tiny_dataset, tmp_path / "videos")
    line = ["data", "action=pack", "data=folder", f"data.root={root}", "data.hflip=false"]
    line += ["pack.shard_mb=0.1", "output=packed set", "data.workers=2"]
    result = vidtrain(*line)
    assert result.code == 0, result.err
    assert "36 videos" in result.out and "0 left out" in result.out
    assert "data=packed 'data.root=packed set' data.hflip=false" in result.out
    out = tmp_path / "packed set"
    assert len(list(out.glob("train-*.tar"))) > 1
    again = vidtrain("data", "action=prepare", "data=packed", f"data.root={out}")
    assert again.code == 0, again.err
    assert "packed: 36 rows, 3 classes" in again.out
    assert "packed from folder: set data.hflip=false as there" in again.out

    (root / "train" / "apple" / "1.mp4").write_bytes(b"")
    lost = vidtrain(*line)
    assert lost.code == 1
    assert f"left out: {root}/train/apple/1.mp4: empty file" in lost.out

    def interrupted(jobs: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "as_completed", interrupted)
    stopped = vidtrain(*line[:-2], "output=other", "split=train")
    assert stopped.code == 130, stopped.err
    left = {path.name for path in (tmp_path / "other").iterdir()}
    assert left - {path.name for path in out.glob("*.tar")} == {pack.RECORD}


@pytest.mark.parametrize("value", ["0", "big"])
def test_a_bad_shard_size_is_refused(vidtrain: Callable, tiny_dataset: Path, value: str) -> None:
    result = vidtrain(
        "data", "action=pack", "data=folder", f"data.root={tiny_dataset}", f"pack.shard_mb={value}"
    )
    assert result.code == 2
    assert "pack.shard_mb is" in result.err and len(result.err.splitlines()) == 1
