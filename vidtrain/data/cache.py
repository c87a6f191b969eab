"""Decoded frames of small sets, kept once for all workers and ranks of a machine.

Whole videos, resized to what training needs and kept as plain uint8 frames, a file each, in memory
or on disk. From the second epoch on nothing is decoded. What does not fit into the stated budget is
decoded each time, as without a cache.

All processes share a folder and a ledger in it, a small file that only one holds at a time. It says
how many bytes are taken; room is reserved there before decoding begins, by a file of the full size,
so the ledger can always be made again from the sizes of the files. Who is alive is told by locks,
which end with their process, however that ends, and not by process ids, which are given out anew
and mean nothing in another container.

Frames are read, not mapped: reading a file that was cut short or a disk that failed is an error
with a name, where touching a map of it would kill the worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import operator
import os
import shutil
import struct
import subprocess
import tempfile
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vidtrain.data.readers.pieces import room
from vidtrain.data.transforms.sample import region_box, resize, short_side_size
from vidtrain.types import DecodeError, UserError

if TYPE_CHECKING:
    from vidtrain.data.readers.pieces import ChooseBox
    from vidtrain.types import Box, VideoReader

FORMAT = 2  # raised when older files can no longer be read
HEADER = struct.Struct("<16s16sI6Id")  # kind, which video, N, Kept, fps; a checksum follows
KIND = b"vidtrain frames\n"
WHOLE = [0.0, 0.0, 1.0, 1.0]  # left, top, width, height
START = 128  # of the frames, behind the header

COUNTS = struct.Struct("<qqq")  # bytes that may be used, bytes used, videos
VIDEOS_NOTED = 1 << 20  # a byte each, by a hash; two that share one may be decoded once too often
BUSY, LEFT_OUT, DAMAGED = 1, 2, 3  # what is noted of a video

# What is in /dev/shm is memory, and workers, batches and the network need some, too.
SHARE_OF_MEMORY, SHARE_OF_DISK = 0.75, 0.95  # of what is free
# A process that outlives ours, to clear away when it was killed: 20 GB in /dev/shm are 20 GB less
# memory until somebody notices. It reads until we are gone and all our workers with us. Our lock
# may be gone a moment later; another rank's stays, and that rank has a guard of its own.
GUARD = 'read -r _; flock -w 30 "$0/lock" rm -rf "$0"'


class Kept(NamedTuple):
    """Which part of each frame lies in a file, in pixels of the frame at the size it is kept in."""

    frame_height: int
    frame_width: int
    top: int
    left: int
    height: int
    width: int

    def file_size(self, count: int) -> int:
        """Bytes of a file of so many frames."""
        return START + count * self.height * self.width * 3


class Report(NamedTuple):
    """What a cache holds."""

    videos: int
    bytes: int
    limit: int  # bytes: the budget, or less where there is less room
    left_out: int  # videos seen that did not fit
    damaged: int  # videos seen that do not decode from end to end

    def __str__(self) -> str:
        """Say it in a line."""
        text = f"{self.videos:,} videos in {self.bytes / 1e9:.2f} of {self.limit / 1e9:.2f} GB"
        if self.left_out:
            text += f", {self.left_out:,} did not fit and are decoded each time"
        return text


class FrameCache:
    """Decoded videos in a folder that many processes share.

    Make it in the main process of each rank, before the workers start; pickled, it is a path.

    Args:
        folder: where; made if it is not there. What is in it and still good is used again.
        budget: bytes of frames, over all processes; the oldest are dropped where there are more.
        short_side: frames are scaled down to it, never up; None keeps their size.
        region: `[left, top, width, height]`, relative: the only part of frames that is ever asked for.
        share: of the free space, that may be taken at most.
        room: bytes that the folder has in truth, where its disk promises more; None: the disk is right.

    Attributes:
        note: what the user should be told: less room than the budget, say; empty if nothing.

    Raises:
        UserError: nothing can be kept in the folder.
    """

    def __init__(
        self,
        folder: Path,
        budget: int,
        short_side: int | None = None,
        region: Sequence[float] | None = None,
        share: float = SHARE_OF_DISK,
        room: int | None = None,
    ) -> None:
        if budget < 1:
            raise UserError(f"data.cache_gb is {budget / 1e9:g}; it must be above 0")
        self.folder, self.short_side = Path(folder), short_side
        self.region = list(region or WHOLE)
        self.note = ""
        self._leave: weakref.finalize[Any, FrameCache] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.folder / "ledger", os.O_RDWR | os.O_CREAT, 0o666))
            with self._ledger() as ledger:
                ledger.videos, ledger.used = self._take_stock(budget)
                free = shutil.disk_usage(self.folder).free
                free = free if room is None else min(free, room)
                ledger.limit = min(budget, ledger.used + int(share * free))
                ledger.forget_all_but(DAMAGED)
        except OSError as error:
            raise UserError(
                f"no frames can be kept in {self.folder} ({error.strerror}); set data.cache to"
                " none, or name another folder"
            ) from None
        if ledger.limit < budget:
            self.note = (
                f"{self.folder.parent} has {free / 1e9:.2f} GB free: of the {budget / 1e9:.2f} GB"
                f" of data.cache_gb, decoded frames take {ledger.limit / 1e9:.2f} GB at most"
            )

    @classmethod
    def in_ram(
        cls,
        budget: int,
        short_side: int | None = None,
        region: Sequence[float] | None = None,
        run: str | None = None,
    ) -> FrameCache:
        """Keep frames in memory, until the last process of the run is gone.

        Args:
            budget: as above.
            short_side: as above.
            region: as above.
            run: what all ranks of a run and no other run call it, so that they share: the path of
                its folder. None: this process and its workers alone.
        """
        base = Path("/dev/shm")
        if not (base.is_dir() and os.access(base, os.W_OK | os.X_OK)):
            base = Path(tempfile.gettempdir())
        prefix = f"vidtrain-frames-{os.getuid()}-"
        for left in base.glob(f"{prefix}*"):
            _remove_unused(left)
        name = hashlib.blake2b((run or uuid.uuid4().hex).encode(), digest_size=8).hexdigest()
        folder = base / f"{prefix}{name}"
        try:
            lock = _hold(folder)
        except OSError as error:
            raise UserError(
                f"no frames can be kept in {base} ({error.strerror}); set data.cache=disk"
            ) from None
        # A memory disk may be as large as all of the memory, and has room when there is none.
        cache = cls(folder, budget, short_side, region, SHARE_OF_MEMORY, available_memory())
        if cache.note:
            cache.note += "; data.cache=disk has the disk's room"
        cache._leave = weakref.finalize(
            cache, _leave, os.getpid(), lock, _start_guard(folder), folder
        )
        return cache

    @classmethod
    def on_disk(
        cls,
        cache_dir: Path,
        name: str,
        budget: int,
        short_side: int | None,
        region: Sequence[float] | None = None,
        decoder: str = "auto",
    ) -> FrameCache:
        """Keep frames on disk, from run to run: in `<cache_dir>/frames/<name>-<settings>/`.

        Frames of other settings lie in another folder, with a budget of its own.
        """
        settings = json.dumps([FORMAT, short_side, list(region or WHOLE), decoder]).encode()
        digest = hashlib.blake2b(settings, digest_size=4).hexdigest()
        folder = cache_dir.expanduser() / "frames" / f"{name}-{digest}"
        return cls(folder, budget, short_side, region)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_leave": None}  # the folder is its maker's to remove

    def close(self) -> None:
        """Give back the memory, if it is in memory and no other rank uses it."""
        if self._leave is not None:
            self._leave()

    def open(
        self, path: str, facts: tuple[int, int] | None, opener: Callable[[], VideoReader]
    ) -> VideoReader:
        """Open a video: over its cached frames, or else the way it is opened without a cache.

        A video that is not there yet is decoded from end to end and kept, if it fits and is sound.

        Args:
            path: what names the video, for good.
            facts: size and time of its file, as from `facts_of`, taken before; another time is
                another video. None: it is not kept.
            opener: opens the real reader; not called when the frames are there.

        Raises:
            DecodeError: what `opener` raises.
        """
        if facts is None:
            return opener()
        name = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
        video = hashlib.blake2b(
            json.dumps([name, *facts, self.short_side, self.region, FORMAT]).encode(), digest_size=16
        ).digest()
        file = self.folder / f"{name}.frames"
        cached = CachedReader.of(path, file, video)
        if cached is not None:
            return cached
        reader = opener()
        try:
            if self._store(reader, file, video):
                cached = CachedReader.of(reader.path, file, video)
        except OSError:  # no folder any more, no locks, no handles: there is still the video
            pass
        except BaseException:
            reader.close()
            raise
        if cached is None:
            return reader
        reader.close()
        return cached

    def report(self) -> Report:
        """Count what is kept and what is not, over all processes so far."""
        try:
            with self._ledger() as ledger:
                notes = ledger.notes()
                left_out, damaged = (int((notes == note).sum()) for note in (LEFT_OUT, DAMAGED))
                return Report(ledger.videos, ledger.used, ledger.limit, left_out, damaged)
        except OSError:
            return Report(0, 0, 0, 0, 0)

    def _store(self, reader: VideoReader, file: Path, video: bytes) -> bool:
        """Decode everything into a file; return whether it is there.

        Raises:
            OSError: the folder cannot be used.
        """
        try:
            kept = self._kept(reader)
        except DecodeError:
            return False
        size = kept.file_size(len(reader))
        part = self.folder / f".{uuid.uuid4().hex}.part"
        with self._ledger() as ledger:
            if ledger.note(video) in (BUSY, DAMAGED):  # another is at it, or has died of it
                return False
            there = CachedReader.of(reader.path, file, video)
            if there is not None:  # another was at it, a moment ago
                there.close()
                return True
            ledger.count_out(file)  # damaged, or of the video as it was
            if ledger.used + size > ledger.limit:
                ledger.set_note(video, LEFT_OUT)
                return False
            sink = part.open("xb", buffering=0)
            fcntl.flock(sink, fcntl.LOCK_EX)  # it is in use
            sink.truncate(size)  # the room it will take
            ledger.used += size
            ledger.set_note(video, BUSY)
        outcome, full = 0, False
        try:
            with sink:
                self._write(sink, reader, video, kept)
                with self._ledger() as ledger:
                    ledger.count_out(file)
                    os.replace(part, file)
                    ledger.videos += 1
        except DecodeError:
            outcome = DAMAGED
        except OSError:
            outcome, full = LEFT_OUT, True
        finally:
            with self._ledger() as ledger:
                ledger.set_note(video, outcome)
                if part.exists():
                    part.unlink()
                    ledger.used -= size
                if full:  # others, too, fill the disk: no more from now on
                    ledger.limit = ledger.used
        return outcome == 0

    def _kept(self, reader: VideoReader) -> Kept:
        height, width = reader.height, reader.width
        if self.short_side is not None and min(height, width) > self.short_side:
            height, width = short_side_size(height, width, self.short_side)
        return Kept(height, width, *region_box(self.region, height, width))

    def _write(self, sink: BinaryIO, reader: VideoReader, video: bytes, kept: Kept) -> None:
        """Write header and frames.

        Raises:
            DecodeError: a frame that cannot be had.
            OSError: no room, or the disk fails.
        """
        count = len(reader)
        header = HEADER.pack(KIND, video, count, *kept, reader.fps)
        header += zlib.crc32(header).to_bytes(4, "little")
        sink.write(header.ljust(START, b"\0"))
        for frames in reader.pieces(range(count), partial(region_box, self.region)):
            resized = resize(frames, kept.height, kept.width)
            pixels = resized.permute(0, 2, 3, 1).contiguous().numpy()
            rest = pixels.data.cast("B")
            while len(rest):
                rest = rest[sink.write(rest) :]
        if sink.tell() != kept.file_size(count):
            raise DecodeError(reader.path, f"does not show {count} frames of one size")
        os.fsync(sink.fileno())  # else a power cut may leave its length without its data

    def _take_stock(self, budget: int) -> tuple[int, int]:
        """Count videos and bytes; drop leftovers, and the oldest videos that are too much."""
        used, videos = 0, []
        for file in self.folder.glob(".*.part"):
            if _is_unused(file):
                file.unlink()
            else:
                used += file.stat().st_size
        for file in self.folder.glob("*.frames"):
            videos.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        videos.sort()
        used += sum(size for _, size, _ in videos)
        while videos and used > budget:
            _, size, file = videos.pop(0)
            file.unlink()
            used -= size
        return len(videos), used

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        """Hold the ledger alone; what was counted in it is written if nothing went wrong."""
        with open(self.folder / "ledger", "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            counts = os.pread(file.fileno(), COUNTS.size, 0).ljust(COUNTS.size, b"\0")
            ledger = Ledger(file.fileno(), *COUNTS.unpack(counts))
            yield ledger
            os.pwrite(file.fileno(), COUNTS.pack(ledger.limit, ledger.used, ledger.videos), 0)


@dataclass
class Ledger:
    """The shared counts, while they are held, and a byte for each video that is not kept."""

    file: int
    limit: int
    used: int
    videos: int

    def note(self, video: bytes) -> int:
        """Return what is noted of a video, 0 if nothing."""
        return int.from_bytes(os.pread(self.file, 1, _place_of_note(video)), "little")

    def set_note(self, video: bytes, note: int) -> None:
        """Note it."""
        if note != self.note(video):
            os.pwrite(self.file, bytes([note]), _place_of_note(video))

    def count_out(self, file: Path) -> None:
        """Remove the file of a video, if it is there."""
        if file.exists():
            self.used -= file.stat().st_size
            self.videos -= 1
            file.unlink()

    def notes(self) -> np.ndarray:
        """Return all notes."""
        return np.frombuffer(os.pread(self.file, VIDEOS_NOTED, COUNTS.size), np.uint8)

    def forget_all_but(self, note: int) -> None:
        """Forget what was true of an earlier run."""
        notes = self.notes()
        if notes.any():
            kept = np.where(notes == note, notes, 0).astype(np.uint8)
            os.pwrite(self.file, kept.tobytes(), COUNTS.size)


def available_memory() -> int | None:
    """Give the bytes that this machine could hand out without swapping; None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _place_of_note(video: bytes) -> int:
    return COUNTS.size + int.from_bytes(video[:8], "little") % VIDEOS_NOTED


class CachedReader:
    """A video whose frames, or one region of them, lie decoded in a file. See `vidtrain.types.VideoReader`."""

    def __init__(self, path: str, file: int, count: int, kept: Kept, fps: float) -> None:
        self.path, self.fps = path, fps
        self._file: int | None = file
        self._count, self._kept = count, kept

    @classmethod
    def of(cls, path: str, file: Path, video: bytes) -> CachedReader | None:
        """Open a file of frames; None if it is not there, not whole or of another video."""
        try:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            head = os.pread(opened, HEADER.size + 4, 0)
            if len(head) == HEADER.size + 4:
                kind, whose, count, *numbers, fps = HEADER.unpack_from(head)
                kept = Kept(*numbers)
                size = kept.file_size(count)
                check = zlib.crc32(head[:-4]).to_bytes(4, "little")
                whole = check == head[-4:] and os.fstat(opened).st_size == size
                if whole and (kind, whose) == (KIND, video):
                    return cls(path, opened, count, kept, fps)
        os.close(opened)
        return None

    @property
    def width(self) -> int:
        """Width of whole frames in pixels, at the size they are kept in."""
        return self._kept.frame_width

    @property
    def height(self) -> int:
        """Height of whole frames in pixels, at the size they are kept in."""
        return self._kept.frame_height

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> CachedReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Give back the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Read frames by number, in any order, repeats allowed.

        Returns:
            `(N, C, H, W)` uint8 RGB, whose memory is `N H W C` (channels last).

        Raises:
            DecodeError: the file of the cache cannot be read.
            IndexError: an index outside `0 <= i < len(self)`.
        """
        indices = [operator.index(index) for index in indices]
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"{self.path}: frame {index} asked of {len(self)}")
        return self._read(indices, (0, 0, self.height, self.width))

    def pieces(self, indices: Sequence[int], choose: ChooseBox | None = None) -> Iterator[Tensor]:
        """Hand frames over a piece at a time. See `vidtrain.types.VideoReader`."""
        box = choose(self.height, self.width) if choose else (0, 0, self.height, self.width)
        step = room(box[2], self._kept.width)
        for first in range(0, len(indices), step):
            yield self._read(indices[first : first + step], box)

    def _read(self, indices: Sequence[int], box: Box) -> Tensor:
        """Read a box of each frame, in pixels of whole frames: the rows it lies in, then its columns."""
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        kept, (top, left, height, width) = self._kept, box
        top, left = top - kept.top, left - kept.left
        if min(top, left) < 0 or top + height > kept.height or left + width > kept.width:
            raise ValueError(f"{self.path}: of its frames only {kept} is kept")
        pixels = np.empty((len(indices), height, kept.width, 3), np.uint8)
        row = kept.width * 3
        for picture, index in zip(pixels, indices, strict=True):
            try:
                place = START + (index * kept.height + top) * row
                read = os.preadv(self._file, [picture.data], place)
            except OSError as error:
                raise DecodeError(self.path, f"its cached frames: {error.strerror}") from None
            if read != height * row:
                raise DecodeError(self.path, "its cached frames were cut off while in use")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)[..., left : left + width]


def facts_of(path: str | Path) -> tuple[int, int] | None:
    """Return a file's size in bytes and mtime in ns, by which a change of it is seen.

    Of a folder of pictures: of all in it, the sum and the latest. None: nothing can be seen there.
    """
    try:
        stat = os.stat(path)
        if not os.path.isdir(path):
            return stat.st_size, stat.st_mtime_ns
        with os.scandir(path) as entries:
            stats = [stat, *(entry.stat() for entry in entries)]
    except (OSError, ValueError):
        return None
    return sum(each.st_size for each in stats), max(each.st_mtime_ns for each in stats)


def _hold(folder: Path) -> int:
    """Make a folder and keep others from clearing it away; return the handle that does so."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(1, f"{folder} belongs to another user")
        with contextlib.suppress(FileNotFoundError):  # cleared away just now: once more
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.path.exists(folder / "lock") and os.path.samestat(
                os.fstat(lock), os.stat(folder / "lock")
            ):
                return lock
            os.close(lock)


def _is_unused(file: Path) -> bool:
    """Say whether nobody holds the lock of a file."""
    with open(file, "rb") as opened, contextlib.suppress(BlockingIOError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _remove_unused(folder: Path) -> None:
    """Remove a folder unless somebody holds it; the lock is kept until it is gone."""
    with contextlib.suppress(OSError), open(folder / "lock", "r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def _start_guard(folder: Path) -> subprocess.Popen[bytes] | None:
    quiet = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        return subprocess.Popen(
            ["sh", "-c", GUARD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=quiet,
            stderr=quiet,
            cwd="/",
            start_new_session=True,  # Ctrl-C goes to all of a terminal's
        )
    return None  # then the next run clears away


def _leave(maker: int, lock: int, guard: subprocess.Popen[bytes] | None, folder: Path) -> None:
    """Remove the folder at the end of the process that made it, if it is the last to use it."""
    if os.getpid() != maker:
        return  # a worker's copy
    fcntl.flock(lock, fcntl.LOCK_UN)  # for the workers, too, who were born with it
    os.close(lock)
    _remove_unused(folder)
    if guard is not None:  # another rank that is still there has its own
        guard.kill()
        guard.communicate()
