"""The store of frame indices: what is kept comes back, wrong or torn ones never."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from make_video import read_numbers, write_video
from test_decode import CASES, make

from vidtrain.data import indices
from vidtrain.data.decode import open_video
from vidtrain.data.indices import IndexStore, decode, encode
from vidtrain.data.readers.index import NO_TIME, FrameIndex
from vidtrain.types import DecodeError


def an_index(number: int = 0, packets: int = 30) -> FrameIndex:
    """Make up an index that tells by its content which one it is."""
    chance = np.random.default_rng(number)
    order = chance.permutation(packets).astype(np.int32)
    keys = np.arange(0, packets, 7, dtype=np.int32)
    return FrameIndex(
        pos=number * 1000 + chance.integers(100, 70_000, packets).cumsum(),
        seek=order.astype(np.int64) * 512,
        skippable=chance.random(packets) < 0.5,
        order=order,
        keys=keys,
        key_ranks=keys.copy(),
        groups="closed",
        changes=False,
        edited=bool(number % 2),
        certain=True,
        missing=None,
        damaged=[],
        turn=(True, False, True),
        container="mov,mp4",
        size=(40, 30),
    )


def same(one: FrameIndex, other: FrameIndex) -> bool:
    for field in fields(FrameIndex):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if type(a) is not type(b) or not np.array_equal(a, b):
            return False
        if isinstance(a, np.ndarray) and a.dtype != b.dtype:
            return False
    return True


@pytest.fixture
def store(tmp_path: Path) -> IndexStore:
    return IndexStore(tmp_path / "a.arrow.frames", 100)


def test_every_field_survives() -> None:
    odd = an_index(3)
    odd.seek[[0, 4, 29]] = NO_TIME
    odd.pos[5:9] = -1, 1 << 62, 0, -(1 << 62)
    odd.order[2] = -1
    odd = replace(odd, missing="cut off: ü", damaged=[3, 5], turn=None, groups="refresh")
    nothing = replace(an_index(), **{name: getattr(odd, name)[:0] for name in indices.ARRAYS})
    for index in (an_index(), an_index(packets=1), an_index(1, 9000), odd, nothing):
        assert same(decode(encode(index)), index)
    assert {"pos", "order"} < indices.ARRAYS and {"groups", "turn"} < {*indices.OTHERS}


def test_what_was_put_is_there_for_all_and_for_that_file_alone(store: IndexStore) -> None:
    other = IndexStore(store.path, store.rows)
    assert store.get("/a.mp4", 10, 20) is None
    assert store.put("/a.mp4", 10, 20, an_index(1))
    for reader in (store, other, pickle.loads(pickle.dumps(store))):
        assert same(reader.get("/a.mp4", 10, 20), an_index(1))
        assert same(reader.get(Path("/a.mp4"), 10, 20), an_index(1))
        for facts in (("/a.mp4", 11, 20), ("/a.mp4", 10, 21), ("/b.mp4", 10, 20)):
            assert reader.get(*facts) is None
    assert len(pickle.dumps(store)) < 150 + len(str(store.path))  # no array travels
    assert store.put(os.fsdecode(b"/\xff.mp4"), 1, -1, an_index(4))
    assert same(other.get(os.fsdecode(b"/\xff.mp4"), 1, -1), an_index(4))


def test_a_file_that_changed_takes_the_place_of_its_old_self(store: IndexStore) -> None:
    for time in range(500):  # many more than there are slots
        assert store.put("/a.mp4", 10, time, an_index(time))
    assert store.get("/a.mp4", 10, 0) is None
    assert same(store.get("/a.mp4", 10, 499), an_index(499))
    size = store.path.stat().st_size
    assert store.put("/a.mp4", 10, 499, an_index(499))  # it is there already
    assert store.path.stat().st_size == size


def test_the_table_is_sparse_and_has_an_end(tmp_path: Path) -> None:
    large = IndexStore(tmp_path / "large", 1_100_000)
    assert large.put("/a", 1, 1, an_index())
    assert large.path.stat().st_size > 35_000_000
    assert large.path.stat().st_blocks * 512 < 100_000
    small = IndexStore(tmp_path / "small", 20)
    kept = [small.put(f"/{i}", 1, 1, an_index(i)) for i in range(300)]
    assert all(kept[:40]) and not all(kept)
    for i, there in enumerate(kept):
        found = small.get(f"/{i}", 1, 1)
        assert same(found, an_index(i)) if there else found is None
    grown = IndexStore(small.path, 1000)  # more rows than there is room for: made anew
    assert grown.get("/0", 1, 1) is None
    assert all(grown.put(f"/{i}", 1, 1, an_index(i)) for i in range(300))
    # those who had it open neither find the wrong one nor spoil it
    assert not any(
        found and not same(found, an_index(i))
        for i in range(300)
        if (found := small.get(f"/{i}", 1, 1))
    )
    assert small.put("/new", 1, 1, an_index(7))
    assert same(grown.get("/new", 1, 1), an_index(7))


@pytest.mark.parametrize(
    "change",
    [
        {"certain": False},
        {"turn": None},
        {"missing": "cut off"},
        {"damaged": [3]},
        {"order": np.array([0, 1, -1], np.int32)},
        {"order": np.zeros(0, np.int32)},
    ],
)
def test_what_is_not_sound_is_not_kept(change: dict, store: IndexStore) -> None:
    assert not store.put("/a.mp4", 10, 20, replace(an_index(), **change))
    assert store.get("/a.mp4", 10, 20) is None


def test_what_is_too_large_is_not_kept(store: IndexStore) -> None:
    assert not store.put("/a.mp4", 10, 20, an_index(packets=400_000))
    assert store.put("/a.mp4", 10, 20, an_index(packets=20_000))


def flip(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def zero(data: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(data))
    end = min(len(data), start + 4096)
    data[start:end] = bytes(end - start)


def shift(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data))]


@pytest.mark.parametrize("harm", [flip, cut, zero, shift])
def test_a_damaged_store_loses_entries_and_heals(
    harm: Callable[[bytearray, random.Random], None], tmp_path: Path
) -> None:
    whole = IndexStore(tmp_path / "a.frames", 32)
    for i in range(32):
        assert whole.put(f"/{i}", i, i, an_index(i))
    data = whole.path.read_bytes()
    lost = 0
    for seed in range(40):
        chance, harmed = random.Random(seed), bytearray(data)
        harm(harmed, chance)
        whole.path.write_bytes(harmed)
        for store in (whole, IndexStore(whole.path, 32)):  # open already, and opened now
            for i in range(32):
                found = store.get(f"/{i}", i, i)
                lost += found is None
                assert found is None or same(found, an_index(i))
        assert store.put("/7", 7, 7, an_index(7))
        assert same(store.get("/7", 7, 7), an_index(7))
    assert lost > 0


def test_of_another_version(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.put("/a.mp4", 10, 20, an_index())
    monkeypatch.setattr(indices, "FORMAT", 99)
    newer = IndexStore(store.path, store.rows)
    assert newer.get("/a.mp4", 10, 20) is None
    assert newer.put("/a.mp4", 10, 20, an_index(5))
    assert store.get("/a.mp4", 10, 20) is None
    assert not store.put("/b.mp4", 10, 20, an_index())  # the older one leaves it alone
    assert same(newer.get("/a.mp4", 10, 20), an_index(5))


def test_where_nothing_can_be_written(
    tmp_path: Path, store: IndexStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "file" / "a", tmp_path / "none" / "a", tmp_path, tmp_path / "pipe"):
        nowhere = IndexStore(path, 10)
        assert not nowhere.put("/a.mp4", 10, 20, an_index())
        assert nowhere.get("/a.mp4", 10, 20) is None
    assert store.put("/a.mp4", 10, 20, an_index())

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidtrain.data.indices.os.pwrite", full)
    assert not store.put("/b.mp4", 10, 20, an_index())
    monkeypatch.setattr("vidtrain.data.indices.os.pwrite", lambda *_: 3)  # a part of it
    assert not store.put("/b.mp4", 10, 20, an_index())
    monkeypatch.undo()
    assert store.get("/b.mp4", 10, 20) is None
    assert same(store.get("/a.mp4", 10, 20), an_index())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_read_only(store: IndexStore) -> None:
    store.put("/a.mp4", 10, 20, an_index())
    store.path.chmod(0o400)
    store.path.parent.chmod(0o500)
    reader = IndexStore(store.path, store.rows)
    assert same(reader.get("/a.mp4", 10, 20), an_index())
    assert not reader.put("/b.mp4", 10, 20, an_index())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_four_processes_at_once(tmp_path: Path) -> None:
    store = IndexStore(tmp_path / "a.frames", 2000)
    made = [an_index(i) for i in range(50)]

    def work(seed: int) -> bool:
        """Put a half of the keys, in an order of its own, and look at others all the while."""
        chance = random.Random(seed)
        keys = chance.sample(range(2000), 1000)
        own = store if seed % 2 else IndexStore(store.path, 2000)
        for key in keys:
            if not own.put(f"/{key}", key, key, made[key % 50]):
                return False
            for look in (key, chance.randrange(2000)):
                found = own.get(f"/{look}", look, look)
                if found is None and look == key:
                    return False
                if found is not None and not np.array_equal(found.pos, made[look % 50].pos):
                    return False
        return True

    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if work(seed) else 2
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    put = {key for seed in range(4) for key in random.Random(seed).sample(range(2000), 1000)}
    for key in range(2000):
        found = store.get(f"/{key}", key, key)
        assert (found is not None) == (key in put)
        assert found is None or same(found, made[key % 50])
    # each key once, whoever put it
    total = store.path.stat().st_size - indices._table_end(4000)
    head = indices.CHECKSUM.size + indices.FACTS.size
    assert total == sum(head + len(encode(made[key % 50])) for key in put)


HANDFUL = [
    "plain",
    "open GOP, mkv",
    "intra refresh",
    "variable rate",
    "edit list",
    "rotation 90",
    "HEVC, open GOP",
    "VP8",
    "packed AVI",
    "H.264 in AVI",
    "transport stream",
    "bare H.264",
]


@pytest.mark.parametrize("name", HANDFUL)
def test_a_stored_index_gives_the_same_frames(
    name: str, tmp_path: Path, store: IndexStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = make(CASES[name], tmp_path), [*CASES[name].numbers]
    facts = str(path), path.stat().st_size, path.stat().st_mtime_ns
    with open_video(path) as fresh:
        fresh.frames([0])
        assert store.put(*facts, fresh.index)
        about = (len(fresh), fresh.fps, fresh.width, fresh.height)
    monkeypatch.setattr("vidtrain.data.readers.pyav.read_index", None)
    chance = random.Random(0)
    for wanted in (
        [*range(len(expected))],
        *(chance.choices(range(len(expected)), k=5) for _ in range(4)),
    ):
        with open_video(path, index=store.get(*facts)) as reader:
            assert (len(reader), reader.fps, reader.width, reader.height) == about
            assert read_numbers(reader.frames(wanted)) == [expected[i] for i in wanted]


def what_comes(path: Path, index: FrameIndex | None) -> list[str | int]:
    """Give each frame's number, or the error that stands for it."""
    outcome: list[str | int] = []
    with open_video(path, index=index) as reader:
        for rank in range(len(reader)):
            try:
                outcome += read_numbers(reader.frames([rank]))
            except DecodeError as error:
                outcome.append(error.reason)
    return outcome


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_a_stored_index_hides_no_damage(file: str, tmp_path: Path, store: IndexStore) -> None:
    path = write_video(tmp_path / file, 36, codec="mpeg4" if file == "a.avi" else "libx264")
    whole = path.read_bytes()
    kept = 0
    for seed in range(8):
        chance, data = random.Random(seed), bytearray(whole)
        for _ in range(3):
            place = chance.randrange(len(data) // 4, len(data) * 3 // 4)
            data[place] ^= 0x55
        path.write_bytes(data)
        try:
            with open_video(path) as reader:
                reader.frames([chance.randrange(len(reader))])
                index = reader.index
        except DecodeError:
            continue
        if not store.put(str(path), len(data), seed, index):
            continue
        kept += 1
        assert what_comes(path, store.get(str(path), len(data), seed)) == what_comes(path, None)
    assert kept
