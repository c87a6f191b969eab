"""Read packed videos: each is one stretch of a shard, on a local disk or behind a URL."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import stat
import time
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

from vidtrain.data.manifest import SHARD_NAME, Place, is_url
from vidtrain.types import DecodeError, UserError

BLOCK = 512  # bytes of a tar header, which lies right before its member
MAX_OPEN = 128  # shards that a process holds open
PAUSES = (0.5, 1.0, 2.0)  # seconds before a failed request is tried again
TIMEOUT = 120.0  # seconds that one request may take


class Shards:
    """The shards of one root, a folder or a URL; for one thread of each process.

    Forked or pickled it goes on working: a process opens files and connections of its own.

    Args:
        root: the folder, or a URL of any kind that fsspec knows.
        cache: where clips that came from a URL are kept; None: nowhere.
        cache_gb: how much of them, in 10^9 bytes; the least recently used go first.
        version: of what lies at the root: clips kept of another version are not taken for these.

    Raises:
        UserError: the cache cannot be written to.
    """

    def __init__(
        self, root: str, cache: Path | None = None, cache_gb: float = 0.0, version: str = ""
    ) -> None:
        self.root, self.version = str(root).rstrip("/"), version
        keeps = is_url(root) and cache is not None and cache_gb > 0
        self._kept = Kept(cache, int(cache_gb * 1e9)) if keeps and cache is not None else None
        self._store: Local | Remote | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}

    def read(self, place: Place) -> bytes:
        """Give a video's bytes.

        Raises:
            DecodeError: naming the shard, and why nothing can be read there.
            UserError: the root cannot be read in parts, or fsspec cannot open it.
        """
        shard, offset, size = place
        where = f"{self.root}/{shard}"
        if not SHARD_NAME.fullmatch(shard):
            raise DecodeError(where, "not a name that a shard can have")
        if offset < BLOCK or size < 1:
            raise DecodeError(where, f"no video can have {size} bytes at offset {offset}")
        if self._kept is None:
            return self._fetch(where, place)
        name = hashlib.blake2b(
            f"{where}\0{offset}\0{size}\0{self.version}".encode(), digest_size=16
        ).hexdigest()
        data = self._kept.get(name, size)
        if data is None:
            data = self._fetch(where, place)
            self._kept.put(name, data)
        return data

    def _fetch(self, where: str, place: Place) -> bytes:
        if self._store is None:
            self._store = Remote(self.root) if is_url(self.root) else Local(self.root)
        header, data = self._store.read(where, place)
        if not is_header(header, place.size):
            raise DecodeError(
                where,
                f"no member of {place.size} bytes at offset {place.offset}: the shard is damaged,"
                " or was packed anew since the manifest was made",
            )
        return data

    def close(self) -> None:
        """Give back the open files."""
        self._store = None


def is_header(block: bytes, size: int) -> bool:
    """Say whether a tar header announces a member of so many bytes."""
    return block[257:262] == b"ustar" and block[124:135] == b"%011o" % size


class Local:
    """Shards in a folder. `pread` has no position, so forked processes may share open files."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: OrderedDict[str, int] = OrderedDict()  # by when they were last used

    def read(self, where: str, place: Place) -> tuple[bytes, bytes]:
        """Give the header and the bytes of a member."""
        try:
            file = self._open(place.shard)
            status, end = os.fstat(file), place.offset + place.size
            if not stat.S_ISREG(status.st_mode):
                raise DecodeError(where, "not a file")
            if status.st_size < end:
                raise DecodeError(where, ends_before(end, status.st_size))
            header = os.pread(file, BLOCK, place.offset - BLOCK)
            data = os.pread(file, place.size, place.offset)
            while len(data) < place.size:  # one call gives 2 GiB at most
                more = os.pread(file, place.size - len(data), place.offset + len(data))
                if not more:
                    raise DecodeError(where, ends_before(end, place.offset + len(data)))
                data += more
        except OSError as error:
            raise DecodeError(where, reason_of(error)) from None
        return header, data

    def _open(self, shard: str) -> int:
        file = self._files.pop(shard, None)
        if file is None:
            # not to wait for the other end of what may be a pipe
            file = os.open(f"{self.root}/{shard}", os.O_RDONLY | os.O_NONBLOCK)
            if len(self._files) == MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files[shard] = file
        return file

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


_inherited: list[Any] = []


class Remote:
    """Shards behind a URL, by one range request a clip."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._opened: tuple[int, Any, str] | None = None  # process, file system, path in it

    def read(self, where: str, place: Place) -> tuple[bytes, bytes]:
        """Give the header and the bytes of a member."""
        start, end = place.offset - BLOCK, place.offset + place.size
        data = self._try(where, place.shard, start, end)
        if len(data) > end - start:
            raise UserError(
                f"data.root={self.root} sends whole files where a part is asked for: it must"
                " answer range requests"
            )
        if len(data) < end - start:
            raise DecodeError(where, ends_before(end, start + len(data)))
        return data[:BLOCK], data[BLOCK:]

    def _try(self, where: str, shard: str, start: int, end: int) -> bytes:
        files, path = self._filesystem()
        path = f"{path}/{shard}"
        limit = {"timeout": TIMEOUT} if files.async_impl else {}
        failed = 0
        while True:
            try:
                data: bytes = files.cat_file(path, start=start, end=end, **limit)
                return data
            except FileNotFoundError as error:
                raise DecodeError(where, reason_of(error)) from None
            except Exception as error:  # each kind of store has its own
                if failed == len(PAUSES) or is_final(error):
                    reason = reason_of(error)
                    with contextlib.suppress(Exception):
                        length = files.info(path, **limit)["size"]
                        if length < end:
                            reason = ends_before(end, length)
                    raise DecodeError(where, reason) from None
            time.sleep(PAUSES[failed])
            failed += 1

    def _filesystem(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec.asyn

            if self._opened is not None:
                # Never let go of: that would close the parent's connections under its hands.
                _inherited.append(self._opened[1])
            if multiprocessing.parent_process() is not None:
                fsspec.asyn.reset_lock()  # the thread that held it was not forked
            self._opened = (os.getpid(), *filesystem(self.root))
        return self._opened[1:]


def filesystem(root: str) -> tuple[Any, str]:
    """Open the file system of a URL: one of this process's own, and the path in it.

    Raises:
        UserError: fsspec does not know it, or lacks the package for it.
    """
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(root, skip_instance_cache=True)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}.get(root.partition(":")[0])
        hint = f"; pip install 'vidtrain[{extra}]'" if extra else ""
        raise UserError(f"data.root={root}: {reason_of(error)}{hint}") from None
    except Exception as error:  # a kind that there is not, no credentials, ...
        raise UserError(f"data.root={root}: {reason_of(error)}") from None
    return files, path.rstrip("/")


def is_final(error: Exception) -> bool:
    """Say whether trying again cannot help."""
    status = getattr(error, "status", None)  # of an HTTP reply; 408: too slow, 429: too often
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, PermissionError)


def ends_before(end: int, length: int) -> str:
    """Say that a shard is cut off."""
    return f"the shard ends before the video does: {end:,} bytes are needed, it has {length:,}"


def reason_of(error: Exception) -> str:
    """Say in one line why something cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "file not found"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"cannot be read ({said or type(error).__name__})"


class Kept:
    """Clips on a local disk, up to a number of bytes, shared by all processes of the machine.

    What may be too much at a time is what other processes are writing while one clears up.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the clip cache {folder} cannot be made ({error.strerror})") from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"the clip cache {folder} cannot be written to")

    def get(self, name: str, size: int) -> bytes | None:
        """Give a clip that is there and whole, and note that it was used."""
        path = self.folder / name
        try:
            data = path.read_bytes()
            os.utime(path)  # not left to the file system: most note reading once a day
        except OSError:
            return None
        return data if len(data) == size else None

    def put(self, name: str, data: bytes) -> None:
        """Keep a clip; where that fails, as on a full disk, go on without."""
        if len(data) > self.limit:
            return
        part = self.folder / f"{name}.{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):
            try:
                self._make_room(len(data))
                part.write_bytes(data)
                os.replace(part, self.folder / name)
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Count `size` bytes more; past the limit, remove the oldest tenth.

        The count lies in a file, so that the folder is listed only when it is full.
        """
        with (self.folder / ".bytes").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            used = int(text) + size if text.isdigit() else None
            if used is None or used > self.limit:
                used = self._clear(size) + size
            file.truncate(0)
            file.write(str(used))

    def _clear(self, size: int) -> int:
        """Count what there is; where `size` more would be too much, remove. Gives what stays."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # gone since
                    if entry.name != ".bytes":
                        status = entry.stat()
                        found.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(length for _, length, _ in found)
        if used + size > self.limit:
            most = max(0, min(self.limit * 9 // 10, self.limit - size))
            for _, length, path in sorted(found):
                if used <= most:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                used -= length
        return used
