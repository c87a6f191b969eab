from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from vidtrain.data import manifest, pack, shards
from vidtrain.data.manifest import Annotations, Manifest, Place, make_rows
from vidtrain.data.prepare import packed
from vidtrain.data.shards import Kept, Shards
from vidtrain.types import DecodeError, UserError

# Forking beside another library's threads is warned about from Python 3.12 on; ours start none.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SIZE = 3000  # bytes of a video
Videos = dict[str, bytes]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty packed files of random bytes in ten shards. Do not write into it."""
    folder = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    (folder / "videos").mkdir()
    paths = [f"{i}.mp4" for i in range(30)]
    for path in paths:
        (folder / "videos" / path).write_bytes(rng.bytes(SIZE))
    rows = make_rows(paths, [[0]] * 30, ["train"] * 30)
    manifest.save(Annotations(rows, ["a"]), folder / "m.arrow", "set", folder / "videos")
    source = Manifest(folder / "m.arrow")
    pack.pack(source, pack.plan(source, shard_mb=0.022), folder / "out")
    assert len(list((folder / "out").glob("*.tar"))) == 10
    return folder / "out"


@pytest.fixture
def rows(out: Path, tmp_path: Path) -> list[tuple[Place, bytes]]:
    """Where each video lies, and what it is."""
    manifest.save(packed.prepare(out), tmp_path / "packed.arrow", "set", out)
    found = Manifest(tmp_path / "packed.arrow")
    return [
        (row.place, (out.parent / "videos" / row.path).read_bytes())
        for row in map(found.row, range(len(found)))
    ]


class Server:
    """A folder behind http://, with range requests; `mood` may spoil an answer."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.mood: Callable[[int], int | str | None] = lambda number: None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 20  # an answer in one piece: in two, the system holds back the second

            def do_GET(self) -> None:
                mood = server.mood(len(server.requests))
                wanted = self.headers["Range"]
                server.requests.append((self.path, wanted))
                if mood == "hang up":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                file = folder / self.path.lstrip("/")
                if isinstance(mood, int) or not file.is_file():
                    self.send_response(mood if isinstance(mood, int) else 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data, first, status = file.read_bytes(), 0, 200
                whole = len(data)
                if wanted and mood != "whole":
                    start, _, end = wanted.removeprefix("bytes=").partition("-")
                    first, status = int(start), 206
                    if first >= whole:
                        data, status = b"", 416
                    data = data[first : int(end) + 1]
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{whole}-{file.stat().st_mtime_ns}"')
                if status == 206:
                    place = f"bytes {first}-{first + len(data) - 1}/{whole}"
                    self.send_header("Content-Range", place)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(out: Path) -> Iterator[Server]:
    one = Server(out)
    thread = threading.Thread(target=one.http.serve_forever, args=(0.01,))
    thread.start()
    yield one
    one.http.shutdown()
    thread.join()
    one.http.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PAUSES", (0.01, 0.01, 0.01))


def test_videos_come_back(out: Path, rows: list) -> None:
    reader = Shards(str(out))
    for place, data in rows:
        assert reader.read(place) == data


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files with /proc")
def test_open_files_are_bounded_and_given_back(
    out: Path, rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 3)
    before = len(os.listdir("/proc/self/fd"))
    reader = Shards(str(out))
    for _ in range(5):
        for place, data in rows:
            assert reader.read(place) == data
            assert len(os.listdir("/proc/self/fd")) <= before + 3
    for _ in range(50):
        with pytest.raises(DecodeError):
            reader.read(Place("missing.tar", 512, 1))
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(rows[0][0]) == rows[0][1]
    reader.close()
    assert reader.read(rows[0][0]) == rows[0][1]
    del reader, copy
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_wrong_with_a_shard_is_said(out: Path, rows: list, tmp_path: Path) -> None:
    shard, offset, size = rows[0][0]
    whole = (out / shard).read_bytes()
    root = tmp_path / "root"
    root.mkdir()
    reader = Shards(str(root))

    def reason(place: Place) -> str:
        with pytest.raises(DecodeError) as error:
            reader.read(place)
        assert error.value.path == f"{root}/{place.shard}"
        return error.value.reason

    assert reason(Place(shard, offset, size)) == "file not found"
    (root / "cut.tar").write_bytes(whole[: offset + size - 1])
    assert "the shard ends before the video does" in reason(Place("cut.tar", offset, size))
    assert "ends before" in reason(Place("cut.tar", 512, 1 << 60)), "it asked for that much memory"
    (root / "whole.tar").write_bytes(whole)
    for at, length in ((offset + 512, size), (offset, size - 1), (offset + 1, size)):
        assert "packed anew since the manifest" in reason(Place("whole.tar", at, length))
    for at, length in ((0, size), (-512, size), (offset, 0), (offset, -1)):
        assert "no video can have" in reason(Place("whole.tar", at, length))
    (root / "zeros.tar").write_bytes(bytes(len(whole)))
    assert "damaged" in reason(Place("zeros.tar", offset, size))
    at = offset - 512 + 124  # of the size in the header
    (root / "nines.tar").write_bytes(whole[:at] + b"9" * 11 + whole[at + 11 :])
    assert "damaged" in reason(Place("nines.tar", offset, size))
    (root / "folder.tar").mkdir()
    os.mkfifo(root / "pipe.tar")
    assert reason(Place("folder.tar", offset, size)) == "not a file"
    assert reason(Place("pipe.tar", offset, size)) == "not a file"
    (tmp_path / "secret.tar").write_bytes(whole)
    for name in ("../secret.tar", str(tmp_path / "secret.tar"), "x/../../secret.tar", "http://h/x"):
        assert reason(Place(name, offset, size)) == "not a name that a shard can have"


def test_a_clip_is_one_range_request(server: Server, rows: list) -> None:
    reader = Shards(server.url + "/")
    for place, data in rows[:5]:
        assert reader.read(place) == data
    assert server.requests == [
        (f"/{shard}", f"bytes={offset - 512}-{offset + size - 1}")
        for (shard, offset, size), _ in rows[:5]
    ]


@pytest.mark.parametrize("trouble", [503, 500, 429, "hang up"])
def test_network_errors_are_tried_again(server: Server, rows: list, trouble: int | str) -> None:
    reader = Shards(server.url)
    server.mood = lambda number: trouble if number < 3 else None
    assert reader.read(rows[0][0]) == rows[0][1]
    assert len(server.requests) == 4
    server.mood = lambda number: trouble
    with pytest.raises(DecodeError) as error:
        reader.read(rows[0][0])
    assert error.value.path == f"{server.url}/{rows[0][0].shard}"
    assert "cannot be read (" in error.value.reason and "\n" not in error.value.reason
    server.mood = lambda number: None
    assert reader.read(rows[1][0]) == rows[1][1]


def test_what_does_not_change_is_not_tried_again(server: Server, rows: list, out: Path) -> None:
    reader = Shards(server.url)
    shard, offset, size = rows[0][0]
    with pytest.raises(DecodeError, match="file not found"):
        reader.read(Place("missing.tar", offset, size))
    server.mood = lambda number: 403
    with pytest.raises(DecodeError, match="403"):
        reader.read(rows[0][0])
    server.mood = lambda number: None
    gets = [path for path, wanted in server.requests if wanted]
    assert gets == ["/missing.tar", f"/{shard}"]
    length = (out / shard).stat().st_size
    for at in (length - 100, length + 512):
        with pytest.raises(DecodeError, match="the shard ends before the video does"):
            reader.read(Place(shard, at, size))
    with pytest.raises(DecodeError, match="packed anew since"):
        reader.read(Place(shard, offset + 512, 1000))
    server.mood = lambda number: "whole"
    with pytest.raises(UserError, match="it must answer range requests"):
        reader.read(rows[0][0])


def test_nobody_there(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        root = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(DecodeError, match="cannot be read"):
            Shards(root).read(Place("a.tar", 512, 1))
        with pytest.raises(UserError, match=r"index\.parquet: cannot be read"):
            packed.prepare(root)


def test_a_slow_server_does_not_hang_us(rows: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TIMEOUT", 0.1)
    monkeypatch.setattr(shards, "PAUSES", ())
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(DecodeError, match="cannot be read"):
            Shards(f"http://127.0.0.1:{silent.getsockname()[1]}").read(rows[0][0])
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("root", "message"),
    [("nosuch://a/b", "nosuch"), ("s3://bucket/set", r"pip install 'vidtrain\[s3\]'")],
)
def test_a_store_that_cannot_be_opened(root: str, message: str, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(UserError, match=message) as error:
        packed.prepare(root)
    assert f"data.root={root}" in str(error.value) and "\n" not in str(error.value)


def test_an_index_behind_a_url(server: Server, out: Path) -> None:
    local, remote = packed.prepare(out), packed.prepare(server.url)
    assert remote.rows == local.rows and remote.label_names == local.label_names
    stamp = packed.stamp(server.url)
    assert stamp == packed.stamp(server.url + "/")
    times = (out / packed.INDEX).stat()
    os.utime(out / packed.INDEX, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
    assert packed.stamp(server.url) != stamp
    server.mood = lambda number: 404
    for ask in (packed.prepare, packed.stamp):
        with pytest.raises(UserError, match=r"index\.parquet: file not found; data\.root is"):
            ask(server.url)


def fill_memory(out: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in out.iterdir():
        store.pipe_file(f"/set/{path.name}", path.read_bytes())


def read_all(reader: Shards, rows: list, out: Path | None, queue: multiprocessing.Queue) -> None:
    """A worker."""
    if out is not None:
        fill_memory(out)
    queue.put([reader.read(place) == data for place, data in rows])


@pytest.mark.parametrize("how", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["local", "http", "memory"])
def test_forked_and_spawned_workers_read(
    kind: str, how: str, out: Path, rows: list, server: Server
) -> None:
    fill_memory(out)
    reader = Shards({"local": str(out), "http": server.url, "memory": "memory://set"}[kind])
    for place, data in rows[:3]:  # opened here first: workers start from used connections
        assert reader.read(place) == data
    context = multiprocessing.get_context(how)
    queue = context.Queue()
    fill = out if kind == "memory" and how == "spawn" else None
    workers = [
        context.Process(target=read_all, args=(reader, rows, fill, queue), daemon=True)
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for place, data in rows * 3:
        assert reader.read(place) == data
    for _ in workers:
        assert queue.get(timeout=60) == [True] * 30
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert reader.read(rows[0][0]) == rows[0][1]


def test_clips_are_kept(server: Server, rows: list, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reader = Shards(server.url, cache, 1.0)
    for _ in range(3):
        for place, data in rows:
            assert reader.read(place) == data
    assert len(server.requests) == 30
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(rows[0][0]) == rows[0][1] and len(server.requests) == 30
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-1])  # as after a crash
    assert again.read(rows[0][0]) == rows[0][1] and len(server.requests) == 31
    assert again.read(rows[0][0]) == rows[0][1] and len(server.requests) == 31
    other = Shards(server.url, cache, 1.0, version="packed anew")
    assert other.read(rows[0][0]) == rows[0][1] and len(server.requests) == 32
    uncached = Shards(server.url, cache, 0)
    assert uncached.read(rows[0][0]) == rows[0][1] and len(server.requests) == 33


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != ".bytes")


def test_the_cache_keeps_to_its_limit_and_drops_the_oldest(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "cache", 10_000)
    for i in range(10):
        kept.put(f"{i}", bytes(1000))
        os.utime(tmp_path / "cache" / f"{i}", (i, i))
    assert all(kept.get(f"{i}", 1000) for i in (0, 1))  # used: no longer the oldest
    kept.put("10", bytes(1000))
    there = {i for i in range(11) if kept.get(f"{i}", 1000)}
    assert there == {0, 1, 3, 4, 5, 6, 7, 8, 9, 10}
    for i in range(11, 200):
        kept.put(f"{i}", bytes(100 + 10 * (i % 100)))
        assert held(tmp_path / "cache") <= 10_000
    assert held(tmp_path / "cache") > 5_000
    kept.put("large", bytes(10_001))
    assert kept.get("large", 10_001) is None
    for path in (tmp_path / "cache").iterdir():
        path.unlink()  # by somebody else
    kept.put("new", bytes(10_000))
    assert kept.get("new", 10_000)


def keep_many(folder: Path, seed: int) -> int:
    kept = Kept(folder, 100_000)
    rng = np.random.default_rng(seed)
    most = 0
    for _ in range(300):
        name = str(rng.integers(100))
        data = name.encode() * (4000 // len(name))
        found = kept.get(name, len(data))
        assert found in (None, data)
        if found is None:
            kept.put(name, data)
        with_others = 0
        for path in folder.iterdir():
            try:
                with_others += path.stat().st_size
            except FileNotFoundError:
                continue
        most = max(most, with_others)
    return most


def test_many_processes_share_a_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        most = max(pool.map(keep_many, [folder] * 4, range(4)))
    assert most <= 100_000 + 4 * 4000, "more than what four may be writing at once"
    assert all(path.name == ".bytes" or path.name.isdigit() for path in folder.iterdir())


def test_a_cache_that_cannot_be_written(
    server: Server, rows: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        Shards(server.url, tmp_path / "file" / "cache", 1.0)
    reader = Shards(server.url, tmp_path / "cache", 1.0)

    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert reader.read(rows[0][0]) == rows[0][1], "a full disk of the cache is no reason to stop"
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".bytes"]
