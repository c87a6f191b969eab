"""Cached frames: the right ones, decoded once, within the budget, and gone when they should be."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from make_video import read_numbers, write_video
from torch.utils.data import DataLoader, Dataset

from vidtrain.data.cache import CachedReader, FrameCache, available_memory, facts_of
from vidtrain.data.decode import open_video
from vidtrain.data.readers.folder import FolderReader
from vidtrain.data.readers.pieces import ChooseBox
from vidtrain.data.transforms.sample import resize
from vidtrain.types import DecodeError, UserError, VideoReader

COUNT = 20
WHOLE = 128 + COUNT * 48 * 64 * 3  # bytes of a cached video of COUNT frames of 64 x 48
PLENTY = 50_000_000


@pytest.fixture
def videos(tmp_path: Path) -> list[Path]:
    """Six small videos; the frames of video v carry 100 v, 100 v + 1 ..."""
    (tmp_path / "videos").mkdir()
    return [
        write_video(
            tmp_path / "videos" / f"{video}.mp4",
            COUNT,
            size=(64, 48),
            numbers=range(100 * video, 100 * video + COUNT),
        )
        for video in range(6)
    ]


class Opener:
    """Opens the real reader, and keeps count in a file, so over all processes."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, path: Path) -> VideoReader:
        with self.log.open("a") as file:
            file.write(f"{path.name}\n")
        return open_video(path)

    def opened(self) -> list[str]:
        """Give the names since the last call."""
        names = self.log.read_text().split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(names)


@pytest.fixture
def opener(tmp_path: Path) -> Opener:
    return Opener(tmp_path / "opened")


def numbers(cache: FrameCache, path: Path, opener: Opener, indices: list[int]) -> list[int]:
    with cache.open(str(path), facts_of(path), partial(opener, path)) as reader:
        return read_numbers(reader.frames(indices))


class Clips(Dataset[list[int]]):
    def __init__(self, cache: FrameCache, paths: list[Path], opener: Opener) -> None:
        self.cache, self.paths, self.opener = cache, paths, opener

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[int]:
        return numbers(self.cache, self.paths[index], self.opener, [7, 3, COUNT - 1])


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != "ledger")


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["same", "reversed"])
def test_the_second_pass_of_two_workers_decodes_nothing(
    context: str, order: str, videos: list[Path], tmp_path: Path, opener: Opener
) -> None:
    cache = FrameCache(tmp_path / "frames", PLENTY)
    expected = [[100 * video + i for i in (7, 3, COUNT - 1)] for video in range(6)]
    for seen in (sorted(path.name for path in videos), []):
        loader = DataLoader(
            Clips(cache, videos, opener),
            batch_size=None,
            num_workers=2,
            multiprocessing_context=context,
        )
        assert [*loader] == expected
        assert opener.opened() == seen
        if order == "reversed":  # each worker gets what the other had
            videos, expected = videos[::-1], expected[::-1]
    assert cache.report()[:2] == (6, 6 * WHOLE)


def test_the_right_frames_in_any_order(videos: list[Path], tmp_path: Path, opener: Opener) -> None:
    path = videos[2]
    cache = FrameCache(tmp_path / "frames", PLENTY)
    assert numbers(cache, path, opener, [*range(COUNT)]) == [*range(200, 200 + COUNT)]
    opener.opened()
    with cache.open(str(path), facts_of(path), partial(opener, path)) as reader:
        assert isinstance(reader, CachedReader) and isinstance(reader, VideoReader)
        assert (len(reader), reader.fps, reader.width, reader.height) == (COUNT, 24, 64, 48)
        assert read_numbers(reader.frames([19, 0, 5, 0])) == [219, 200, 205, 200]
        frames = reader.frames([4, 5])
        assert frames.dtype == torch.uint8
        assert frames.permute(0, 2, 3, 1).is_contiguous()
        with open_video(path) as real:
            assert torch.equal(frames, real.frames([4, 5]))
            part = torch.cat([*reader.pieces([4, 5], lambda height, width: (6, 8, 30, 40))])
            assert torch.equal(part, real.frames([4, 5])[..., 6:36, 8:48])
        assert reader.frames([]).shape == (0, 3, 48, 64)
        for outside in (COUNT, -1):
            with pytest.raises(IndexError, match=r"2\.mp4.*20"):
                reader.frames([0, outside])
    assert opener.opened() == []


def test_scaled_down_and_never_up(videos: list[Path], tmp_path: Path, opener: Opener) -> None:
    path = videos[1]
    with open_video(path) as real:
        frames = real.frames([3, 11])
    for short_side, size in ((32, (32, 43)), (48, (48, 64)), (200, (48, 64)), (None, (48, 64))):
        cache = FrameCache(tmp_path / f"frames {short_side}", PLENTY, short_side)
        for _ in range(2):
            with cache.open(str(path), facts_of(path), partial(opener, path)) as reader:
                assert (reader.height, reader.width) == size
                assert torch.equal(reader.frames([3, 11]), resize(frames, *size))
        assert cache.report().bytes == 128 + COUNT * size[0] * size[1] * 3
        assert opener.opened() == ["1.mp4"]


def test_only_the_region_is_kept(videos: list[Path], tmp_path: Path, opener: Opener) -> None:
    """Boxes are given in pixels of whole frames, and what is kept of those lies in the region."""
    path, region = videos[1], [0.25, 0.5, 0.5, 0.25]  # 16 to 48 across, 24 to 36 down
    with open_video(path) as real:
        frames = real.frames([3, 11])
    for short_side, box, size in ((None, (26, 20, 9, 25), (48, 64)), (24, (13, 9, 5, 13), (24, 32))):
        cache = FrameCache(tmp_path / f"frames {short_side}", PLENTY, short_side, region)
        part = size[0] // 4, size[1] // 2
        expected = resize(frames[..., 24:36, 16:48], *part)
        top, left = box[0] - size[0] // 2, box[1] - size[1] // 4
        for _ in range(2):
            with cache.open(str(path), facts_of(path), partial(opener, path)) as reader:
                assert (reader.height, reader.width) == size
                found = torch.cat([*reader.pieces([3, 11], lambda height, width, box=box: box)])
                assert torch.equal(
                    found, expected[..., top : top + box[2], left : left + box[3]].contiguous()
                )
                with pytest.raises(ValueError, match="only"):
                    reader.frames([3])
        assert cache.report().bytes == 128 + COUNT * part[0] * part[1] * 3
        assert opener.opened() == ["1.mp4"]
    assert FrameCache.on_disk(tmp_path, "a", PLENTY, 24, region).folder != (
        FrameCache.on_disk(tmp_path, "a", PLENTY, 24).folder
    )


def test_never_more_than_the_budget(videos: list[Path], tmp_path: Path, opener: Opener) -> None:
    folder = tmp_path / "frames"
    cache = FrameCache(folder, 3 * WHOLE + WHOLE // 2)
    expected = [[100 * video + i for i in (7, 3, COUNT - 1)] for video in range(6)]
    for times in (6, 3):
        loader = DataLoader(Clips(cache, videos, opener), batch_size=None, num_workers=2)
        assert [*loader] == expected
        assert bytes_in(folder) == 3 * WHOLE
        assert len(opener.opened()) == times
    report = cache.report()
    assert report == (3, 3 * WHOLE, 3 * WHOLE + WHOLE // 2, 3, 0)
    assert "3 videos" in str(report) and "3 did not fit" in str(report)

    assert FrameCache(folder, PLENTY).report()[:2] == (3, 3 * WHOLE)  # another run finds them
    assert FrameCache(folder, WHOLE).report()[:2] == (1, WHOLE)  # a smaller budget drops some
    assert bytes_in(folder) == WHOLE


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut off":
        del data[-5000:]
    elif how == "cut off in its header":
        del data[20:]
    elif how == "empty":
        data.clear()
    elif how == "too long":
        data += b"x"
    else:  # a bit of the count of frames
        data[32] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize(
    "how", ["cut off", "cut off in its header", "empty", "too long", "header damaged"]
)
def test_what_is_not_whole_is_made_again(
    how: str, videos: list[Path], tmp_path: Path, opener: Opener
) -> None:
    cache = FrameCache(tmp_path / "frames", PLENTY)
    assert numbers(cache, videos[0], opener, [4]) == [4]
    (file,) = cache.folder.glob("*.frames")
    damage(file, how)
    assert numbers(cache, videos[0], opener, [4]) == [4]
    assert numbers(cache, videos[0], opener, [5]) == [5]
    assert opener.opened() == ["0.mp4"] * 2
    assert file.stat().st_size == WHOLE


def test_cut_off_while_open_is_an_error_that_names_it(
    videos: list[Path], tmp_path: Path, opener: Opener
) -> None:
    cache = FrameCache(tmp_path / "frames", PLENTY)
    with cache.open(str(videos[0]), facts_of(videos[0]), partial(opener, videos[0])) as reader:
        os.truncate(next(cache.folder.glob("*.frames")), WHOLE // 2)
        assert read_numbers(reader.frames([2])) == [2]
        with pytest.raises(DecodeError, match=r"0\.mp4: its cached frames were cut off"):
            reader.frames([18])


def test_a_video_that_changed_is_another(
    videos: list[Path], tmp_path: Path, opener: Opener
) -> None:
    cache = FrameCache(tmp_path / "frames", 2 * WHOLE)  # no room for old and new
    assert numbers(cache, videos[0], opener, [4]) == [4]
    assert numbers(cache, videos[1], opener, [4]) == [104]
    write_video(videos[0], COUNT, size=(64, 48), numbers=range(300, 300 + COUNT))
    for _ in range(2):
        assert numbers(cache, videos[0], opener, [4]) == [304]
    assert opener.opened() == ["0.mp4", "0.mp4", "1.mp4"]
    assert cache.report() == (2, 2 * WHOLE, 2 * WHOLE, 0, 0)


def test_a_picture_that_changed_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        write_video(folder / f"{number}.jpg", 1, codec="mjpeg", numbers=[number])
    cache = FrameCache(tmp_path / "frames", PLENTY)

    def first() -> list[int]:
        reader = cache.open(str(folder), facts_of(folder), lambda: FolderReader(str(folder)))
        with reader:
            return read_numbers(reader.frames([0, 1]))

    assert first() == [0, 1] == first()
    times = folder.stat()
    write_video(folder / "0.jpg", 1, codec="mjpeg", numbers=[77])
    os.utime(folder, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert first() == [77, 1]


def test_two_at_the_same_video_at_once(videos: list[Path], tmp_path: Path, opener: Opener) -> None:
    cache, path = FrameCache(tmp_path / "frames", PLENTY), videos[3]
    inodes = []

    def meanwhile() -> VideoReader:
        """Another comes to the same video, as a whole or for as long as we are at it."""
        assert numbers(cache, path, opener, [4]) == [304]
        inodes.extend(file.stat().st_ino for file in cache.folder.glob("*.frames"))
        return open_video(path)

    class Slow(Deadly):
        def pieces(self, indices: range, choose: ChooseBox) -> Iterator[torch.Tensor]:
            assert numbers(cache, path, opener, [5]) == [305]
            yield from self.reader.pieces(indices, choose)

    with cache.open(str(path), facts_of(path), meanwhile) as reader:
        assert read_numbers(reader.frames([6])) == [306]
    assert [file.stat().st_ino for file in cache.folder.glob("*.frames")] == inodes
    os.utime(path, ns=(0, 0))
    with cache.open(str(path), facts_of(path), lambda: Slow(open_video(path))) as reader:  # type: ignore
        assert read_numbers(reader.frames([6])) == [306]
        assert isinstance(reader, CachedReader)
    assert cache.report() == (1, WHOLE, PLENTY, 0, 0)
    assert bytes_in(cache.folder) == WHOLE


def test_a_damaged_video_is_tried_once_and_reported_as_ever(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Opener
) -> None:
    path = write_video(tmp_path / "a.mp4", 80, b_frames=0, faststart=True)
    data = bytearray(path.read_bytes())
    data[len(data) * 6 // 10 :] = b""
    path.write_bytes(data)
    cache = FrameCache(tmp_path / "frames", PLENTY)
    attempts = []
    write = FrameCache._write
    monkeypatch.setattr(FrameCache, "_write", lambda *a: attempts.append(1) or write(*a))
    for _ in range(3):
        with cache.open(str(path), facts_of(path), partial(opener, path)) as reader:
            assert read_numbers(reader.frames([3])) == [3]
            with pytest.raises(DecodeError, match=r"a\.mp4: .*frame 79 of 80"):
                reader.frames([79])
    assert len(opener.opened()) == 3
    assert attempts == [1]
    assert cache.report() == (0, 0, PLENTY, 0, 1)
    assert bytes_in(cache.folder) == 0
    again = FrameCache(cache.folder, PLENTY)  # on disk it is still known in the next run
    numbers(again, path, opener, [3])
    assert attempts == [1]


def test_what_is_no_video_is_the_openers_to_say(tmp_path: Path, opener: Opener) -> None:
    cache = FrameCache(tmp_path / "frames", PLENTY)
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for path, reason in ((text, "not a video but text"), (tmp_path / "x.mp4", "file not found")):
        with pytest.raises(DecodeError, match=reason):
            numbers(cache, path, opener, [0])
    assert facts_of(tmp_path / "x.mp4") is None


def test_a_full_disk_ends_the_caching_not_the_run(
    videos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opener: Opener
) -> None:
    cache = FrameCache(tmp_path / "frames", PLENTY)
    numbers(cache, videos[0], opener, [0])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vidtrain.data.cache.os.fsync", full)
    assert numbers(cache, videos[1], opener, [9]) == [109]
    monkeypatch.undo()
    assert numbers(cache, videos[2], opener, [9]) == [209]  # room again, but we have stopped
    assert cache.report() == (1, WHOLE, WHOLE, 2, 0)
    assert bytes_in(cache.folder) == WHOLE
    opener.opened()
    assert numbers(cache, videos[0], opener, [9]) == [9]
    assert opener.opened() == []


def test_without_its_folder_it_just_decodes(
    videos: list[Path], tmp_path: Path, opener: Opener
) -> None:
    cache = FrameCache(tmp_path / "frames", PLENTY)
    shutil.rmtree(cache.folder)
    for _ in range(2):
        assert numbers(cache, videos[0], opener, [9]) == [9]
    assert opener.opened() == ["0.mp4"] * 2
    assert cache.report() == (0, 0, 0, 0, 0)


class Deadly:
    """A reader whose second piece kills the process, as a codec may."""

    def __init__(self, reader: VideoReader) -> None:
        self.reader = reader

    def __getattr__(self, name: str) -> object:
        return getattr(self.reader, name)

    def __len__(self) -> int:
        return len(self.reader)

    def pieces(self, indices: range, choose: ChooseBox) -> Iterator[torch.Tensor]:
        yield self.reader.frames(indices[:2])
        os.kill(os.getpid(), signal.SIGKILL)


def in_a_fork(do: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            do()
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_writer_that_was_killed(videos: list[Path], tmp_path: Path, opener: Opener) -> None:
    cache = FrameCache(tmp_path / "frames", PLENTY)
    path = videos[0]

    def die() -> None:
        cache.open(str(path), facts_of(path), lambda: Deadly(open_video(path)))  # type: ignore

    assert in_a_fork(die) == signal.SIGKILL
    # its room stays taken, and the video is not decoded from end to end again: it may be its fault
    for _ in range(2):
        assert numbers(cache, path, opener, [4]) == [4]
    assert cache.report() == (0, WHOLE, PLENTY, 0, 0)
    again = FrameCache(cache.folder, PLENTY)
    assert again.report() == (0, 0, PLENTY, 0, 0)
    assert bytes_in(cache.folder) == 0
    numbers(again, path, opener, [4])
    assert again.report().videos == 1


def test_it_travels_light_and_leaves_no_handle(
    videos: list[Path], tmp_path: Path, opener: Opener
) -> None:
    with contextlib.closing(FrameCache.in_ram(PLENTY)) as cache:
        assert len(pickle.dumps(cache)) < 300
        numbers(cache, videos[0], opener, [4])
        before = len(os.listdir("/proc/self/fd"))
        copy = pickle.loads(pickle.dumps(cache))
        for path in videos * 3:
            numbers(copy, path, opener, [4])
            copy.open(str(path), facts_of(path), partial(opener, path))  # forgotten, not closed
        copy.close()  # not its own to remove
        del copy
        assert len(os.listdir("/proc/self/fd")) == before
        assert cache.report().videos == 6
    assert not cache.folder.exists()


def is_gone(folder: str, within: float = 20.0) -> bool:
    limit = time.monotonic() + within
    while os.path.exists(folder) and time.monotonic() < limit:
        time.sleep(0.02)
    return not os.path.exists(folder)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_given_back_by_who_is_killed(number: int, workers: int, tmp_path: Path) -> None:
    def die() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        cache = FrameCache.in_ram(PLENTY)
        (cache.folder / "x.frames").write_bytes(bytes(999))
        (tmp_path / "folder").write_text(str(cache.folder))
        if workers and os.fork() == 0:
            time.sleep(0.3)  # as a worker, until it sees that nobody is there any more
            os._exit(0)
        os.kill(os.getpid(), number)

    assert in_a_fork(die) == number
    folder = (tmp_path / "folder").read_text()
    assert os.path.exists(folder) or not workers  # as long as it is used
    assert is_gone(folder)


def test_memory_is_given_back_at_the_end(tmp_path: Path) -> None:
    # one interpreter for all, since torch takes seconds to import
    script = (
        "import os, sys, vidtrain.data.cache as cache\n"
        "for at, code in enumerate(sys.argv[2:]):\n"
        "    if os.fork() == 0:\n"
        "        kept = cache.FrameCache.in_ram(10**6)\n"
        "        open(sys.argv[1] + str(at), 'w').write(str(kept.folder))\n"
        "        exec(code); sys.exit(0)\n"
        "while at >= 0: os.wait(); at -= 1"
    )
    endings = ["pass", "raise RuntimeError", "raise KeyboardInterrupt", "os.fork(); sys.exit(3)"]
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "folder"), *endings]
    subprocess.run(command, check=True, capture_output=True)
    folders = {(tmp_path / f"folder{at}").read_text() for at in range(len(endings))}
    assert len(folders) == len(endings)
    assert not any(os.path.exists(folder) for folder in folders)  # at once, by itself


def test_ranks_share_and_the_last_one_clears_away(
    videos: list[Path], opener: Opener, tmp_path: Path
) -> None:
    first = FrameCache.in_ram(PLENTY, run=str(tmp_path))
    numbers(first, videos[0], opener, [4])
    second = FrameCache.in_ram(PLENTY, run=str(tmp_path))
    assert second.folder == first.folder
    opener.opened()
    assert numbers(second, videos[0], opener, [4]) == [4]
    assert opener.opened() == []
    stranger = FrameCache.in_ram(PLENTY)
    assert stranger.folder != first.folder
    stranger.close()
    first.close()
    assert numbers(second, videos[0], opener, [4]) == [4]
    del second  # as when the data module is no longer used
    assert not first.folder.exists()


def test_leftovers_of_the_dead_are_cleared_away_and_the_living_are_not(
    videos: list[Path], opener: Opener
) -> None:
    living = FrameCache.in_ram(PLENTY)
    numbers(living, videos[0], opener, [4])
    dead = living.folder.with_name(living.folder.name + "-dead")
    shutil.copytree(living.folder, dead)
    FrameCache.in_ram(PLENTY).close()
    assert not dead.exists()
    opener.opened()
    assert numbers(living, videos[0], opener, [4]) == [4]
    assert opener.opened() == []
    living.close()


def test_too_little_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FrameCache(tmp_path / "frames", 1000).note == ""
    usage = shutil.disk_usage(tmp_path)._replace(free=64_000_000)
    monkeypatch.setattr("vidtrain.data.cache.shutil.disk_usage", lambda _: usage)
    with contextlib.closing(FrameCache.in_ram(8_000_000_000)) as cache:
        assert cache.report().limit == 48_000_000
        for part in ("0.06 GB free", "8.00 GB of data.cache_gb", "0.05 GB", "data.cache=disk"):
            assert part in cache.note
    with pytest.raises(UserError, match=r"data\.cache_gb is 0"):
        FrameCache(tmp_path / "frames", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/frames.*data\.cache"):
        FrameCache.on_disk(tmp_path / "file", "kinetics", PLENTY, 256)


def test_settings_on_disk_do_not_mix(tmp_path: Path) -> None:
    folders = {
        FrameCache.on_disk(tmp_path, "ucf", PLENTY, short_side, decoder).folder
        for short_side in (128, 256, None)
        for decoder in ("auto", "decord")
    }
    assert len(folders) == 6
    assert all(folder.parent == tmp_path / "frames" for folder in folders)
    assert FrameCache.on_disk(tmp_path, "ucf", 5, 128, "decord").folder in folders


def test_memory_that_is_not_there_is_not_taken(monkeypatch):
    """/dev/shm may be as large as the memory, and be empty while programs have taken all of it."""
    monkeypatch.setattr("vidtrain.data.cache.available_memory", lambda: 40_000_000)
    with contextlib.closing(FrameCache.in_ram(8_000_000_000)) as cache:
        assert "0.04 GB free" in cache.note and "data.cache=disk" in cache.note
    monkeypatch.undo()
    assert 1e8 < available_memory() < 1e13
