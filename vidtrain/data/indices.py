"""The store of frame indices: what reading all packets of a video found out, known from then on.

One file beside the manifest, for all processes at once: a table of fixed size, then the indices,
appended. A slot of the table is 16 bytes, half of a hash of the video's path and the place of its
index. Nothing is mapped, so a million videos cost a process no memory, and a file cut short by
another program is a failed read and no signal.

Readers take no lock. Whatever they find by the table must bear the video's own facts and a checksum
over them and the index, so a slot or an index caught half written, overwritten or damaged is as if
it were not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import weakref
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from vidtrain.data.readers.index import FrameIndex

FORMAT = 2  # raised when this file's layout changes, or what `read_index` makes of a video
HEADER = struct.Struct("<16s16sQ")  # kind, version, slots
KIND = b"vidtrain frames\n"
TABLE = 64  # where the slots begin
SLOT = struct.Struct("<QQ")  # half of the path's hash (0: empty), offset << 24 | length
WINDOW = 64  # slots that are looked through for a path; the table has as many more at its end
FACTS = struct.Struct("<16sQq")  # the path's hash, the file's size, its mtime_ns
CHECKSUM = struct.Struct("<I")
MAX_BYTES = 1 << 20  # of one stored index
ARRAYS = {field.name for field in fields(FrameIndex) if field.type == "np.ndarray" and field.init}
OTHERS = [field.name for field in fields(FrameIndex) if field.init and field.name not in ARRAYS]
TUPLES = {field.name for field in fields(FrameIndex) if str(field.type).startswith("tuple")}


class IndexStore:
    """Frame indices by path, size and time of the file, shared by all processes.

    It never fails: where its file cannot be used it finds nothing and keeps nothing. Pickled, it is
    a path.

    Args:
        path: its file, by custom the manifest's name and `.frames`; made if it is not there, and
            made anew if it is damaged, of another version or too small.
        rows: videos that there may be; there is room for twice as many.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = Path(path), rows
        self._version = _version()
        self._slots = 0
        with contextlib.suppress(OSError):
            self._prepare()
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._file)
            self._slots = self._read_slots(self._file)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, path: str | Path, size: int, mtime_ns: int) -> FrameIndex | None:
        """Give the index that was kept for a file; None where there is none for it as it is now."""
        if self._file is None or not self._slots:
            return None
        facts = FACTS.pack(_hash(path), size, mtime_ns)
        with contextlib.suppress(OSError):
            found = _find(self._file, self._slots, facts)
            stored = self._read(self._file, found[1], facts) if found else None
            return None if stored is None else decode(stored)
        return None

    def put(self, path: str | Path, size: int, mtime_ns: int, index: FrameIndex) -> bool:
        """Keep the index of a file, for all processes from now on.

        Call it once frames have been read: only then is `index.turn` known, and `reader.index` is
        the index as decoding found it to be. Take size and time before opening the file: should it
        be replaced meanwhile, the index is then kept for a file that is no more. An index of a
        file known to be damaged is not kept, since what is wrong was found in reading all packets.

        Returns:
            Whether it is kept: not if it is unsound or too large, nor where there is no room or no
            leave to write.
        """
        if not is_sound(index):
            return False
        facts = FACTS.pack(_hash(path), size, mtime_ns)
        blob = facts + encode(index)
        blob = CHECKSUM.pack(self._checksum(blob)) + blob
        if len(blob) > MAX_BYTES:
            return False
        try:
            # Opened for this alone: the lock belongs to it, and keeps out threads and forks, too.
            with open(self.path, "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                return self._append(file.fileno(), facts, blob)
        except OSError:
            return False

    def _append(self, file: int, facts: bytes, blob: bytes) -> bool:
        slots = self._read_slots(file)  # it may have been made anew
        found = _find(file, slots, facts) if slots else None
        if found is None:
            return False
        slot, place = found
        if self._read(file, place, facts) is not None:
            return True  # by another process
        offset = max(os.fstat(file).st_size, _table_end(slots))
        if os.pwrite(file, blob, offset) < len(blob):
            return False
        tag = SLOT.pack(_tag(facts), offset << 24 | len(blob))
        return os.pwrite(file, tag, TABLE + slot * SLOT.size) == SLOT.size

    def _read(self, file: int, place: int, facts: bytes) -> bytes | None:
        """Return what is stored at a place, if it is whole and belongs to these facts."""
        offset, length = place >> 24, place & 0xFFFFFF
        if length < CHECKSUM.size + FACTS.size or offset >= 1 << 40:
            return None
        blob = os.pread(file, length, offset)
        if len(blob) < length or blob[CHECKSUM.size : CHECKSUM.size + FACTS.size] != facts:
            return None
        if CHECKSUM.unpack_from(blob)[0] != self._checksum(memoryview(blob)[CHECKSUM.size :]):
            return None
        return blob[CHECKSUM.size + FACTS.size :]

    def _checksum(self, data: bytes | memoryview) -> int:
        return zlib.crc32(data, zlib.crc32(self._version))

    def _prepare(self) -> None:
        """Make the file, or make it anew where it is of no use."""
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0) as opened:
            file = opened.fileno()
            if self._read_slots(file) >= self._slots_wanted():
                return
            fcntl.flock(file, fcntl.LOCK_EX)
            if self._read_slots(file) >= self._slots_wanted():
                return  # by another process, while we waited
            # In place, so that all who have it open go on to share it.
            os.ftruncate(file, 0)
            os.ftruncate(file, _table_end(self._slots_wanted()))  # a hole: takes no space yet
            os.pwrite(file, HEADER.pack(KIND, self._version, self._slots_wanted()), 0)

    def _slots_wanted(self) -> int:
        return max(2 * self.rows, WINDOW)

    def _read_slots(self, file: int) -> int:
        """Return how many slots the table has; 0 where it is not a table that we could use."""
        head = os.pread(file, HEADER.size, 0)
        if len(head) < HEADER.size:
            return 0
        kind, version, slots = HEADER.unpack(head)
        if (kind, version) != (KIND, self._version) or not 0 < slots < 1 << 40:
            return 0
        return int(slots) if os.fstat(file).st_size >= _table_end(slots) else 0


def is_sound(index: FrameIndex) -> bool:
    """Say whether a reader given this index does all that one which read it anew would do.

    Damage that reading all packets brought to light is told by the index only in part, and
    an order that is not certain has to be found out by decoding each time.
    """
    return (
        index.certain
        and index.turn is not None
        and index.missing is None
        and not index.damaged
        and len(index.order) > 0
        and bool((index.order >= 0).all())
    )


def encode(index: FrameIndex) -> bytes:
    """Write an index in few bytes: 1 KB for 300 frames, most of it the sizes of the packets.

    Columns of whole numbers become the steps from one to the next, less the smallest step, cut into
    planes of 16 bits from the lowest up to the last that is not zero. A plane is compressed where
    that gains: the sizes of packets are noise, all else repeats itself.
    """
    columns: dict[str, Any] = {}
    planes: list[bytes] = []
    for name in sorted(ARRAYS):
        column = getattr(index, name)
        if column.dtype == bool:
            columns[name] = [len(column)]
            planes.append(np.packbits(column).tobytes())
            continue
        # whatever overflows here flows back in `decode`: a missing time is a very large number
        steps = np.diff(column.astype("<i8"), prepend=0)
        least = int(steps.min(initial=0))
        planes_of = (steps - least).view("<u2").reshape(-1, 4).T
        last = planes_of.any(axis=1).nonzero()[0].max(initial=-1)
        kept = [_smaller(plane.tobytes()) for plane in planes_of[: last + 1]]
        columns[name] = [len(column), column.dtype.str, least, [len(plane) for plane in kept]]
        planes += kept
    others = [getattr(index, name) for name in OTHERS]
    head = json.dumps([columns, others], separators=(",", ":")).encode()
    return b"".join([CHECKSUM.pack(len(head)), head, *planes])


def decode(data: bytes) -> FrameIndex:
    """Read what `encode` wrote."""
    start = CHECKSUM.size
    end = start + CHECKSUM.unpack_from(data)[0]
    columns, others = json.loads(data[start:end])
    values: dict[str, Any] = {
        name: tuple(value) if name in TUPLES and value is not None else value
        for name, value in zip(OTHERS, others, strict=True)
    }
    for name, (length, *numbers) in columns.items():
        if not numbers:
            start, end = end, end + (length + 7) // 8
            bits = np.frombuffer(data[start:end], np.uint8)
            values[name] = np.unpackbits(bits, count=length).astype(bool)
            continue
        kind, least, sizes = numbers
        steps = np.full(length, least, kind)
        for plane, size in enumerate(sizes):
            start, end = end, end + size
            packed = data[start:end]
            part = np.frombuffer(packed if size == 2 * length else zlib.decompress(packed), "<u2")
            steps += part.astype(kind) << 16 * plane if plane else part
        values[name] = steps.cumsum(dtype=kind, out=steps)
    return FrameIndex(**values)


def _smaller(plane: bytes) -> bytes:
    packed = zlib.compress(plane, 1)
    return packed if len(packed) < 0.75 * len(plane) else plane


def _version() -> bytes:
    """Name all that decides what an index holds: libav, too, may number packets anew some day."""
    import av  # here: it takes a while, and only who opens videos needs it

    facts = json.dumps([FORMAT, av.__version__, sorted(ARRAYS), OTHERS])
    return hashlib.blake2b(facts.encode(), digest_size=16).digest()


def _hash(path: str | Path) -> bytes:
    return hashlib.blake2b(os.fsencode(path), digest_size=16).digest()


def _tag(facts: bytes) -> int:
    return int.from_bytes(facts[8:16], "little") or 1


def _table_end(slots: int) -> int:
    return TABLE + (slots + WINDOW) * SLOT.size


def _find(file: int, slots: int, facts: bytes) -> tuple[int, int] | None:
    """Return the slot of a path, its own or the empty one for it, and what place it names.

    None where the table is too full around there.
    """
    home, tag = int.from_bytes(facts[:8], "little") % slots, _tag(facts)
    window = os.pread(file, WINDOW * SLOT.size, TABLE + home * SLOT.size)
    if len(window) < WINDOW * SLOT.size:
        return None
    for slot, (there, place) in enumerate(SLOT.iter_unpack(window), home):
        if there in (tag, 0):
            return slot, place
    return None
