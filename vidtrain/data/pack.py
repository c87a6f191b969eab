"""Pack the files of a dataset into tar shards, as they are.

The shards are what WebDataset reads: `<key>.mp4`, `<key>.json` and, where a file has one label,
`<key>.cls` lie next to each other, mixed by the seed, with one split to a shard. The index beside
them says where each file's bytes lie, so that any clip can be read by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidtrain import __version__
from vidtrain.data.manifest import KEY, SHARD_NAME, Manifest, class_names
from vidtrain.data.prepare.packed import INDEX
from vidtrain.data.readers.files import is_folder
from vidtrain.data.shards import BLOCK
from vidtrain.types import DecodeError, UserError

FORMAT = 1  # of the shards; raised when equal sources would give others
RECORD = ".pack.jsonl"  # what lies in the folder was made of: settings, then a line a shard
MOST = 8 << 30  # bytes of a file: a tar header says no more, and a clip is read whole
AT_ONCE = 1 << 20  # bytes copied at a time
PARTS = ".part-"  # how the folder of unfinished shards begins


class Video(NamedTuple):
    """A file to pack; its `rows` of the manifest are the pieces of it that count."""

    key: str
    path: Path
    rows: tuple[int, ...]
    size: int  # bytes
    mtime_ns: int
    about: bytes  # JSON
    label: bytes  # the class number as text; empty where it has not one


@dataclass
class Shard:
    """A tar file to be."""

    name: str
    videos: list[Video] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """A hash of what it is made of."""
        return hashlib.blake2b(repr((FORMAT, self.videos)).encode(), digest_size=16).hexdigest()


class LeftOut(NamedTuple):
    """A file that is not packed."""

    path: str
    reason: str


@dataclass
class Plan:
    """Which file goes where."""

    shards: list[Shard]
    left_out: list[LeftOut]
    settings: dict[str, Any]  # those that decided it


def plan(
    manifest: Manifest,
    split: str | None = None,
    shard_mb: float = 512,
    seed: int = 0,
    multi_label: bool = False,
    seen: Callable[[], None] = lambda: None,
) -> Plan:
    """Deal out the files of a dataset to shards.

    Args:
        manifest: of videos that are files. One that lies in two splits goes into a shard of each.
        split: only this one; None: all.
        shard_mb: MiB that a shard has, about.
        seed: of the order.
        multi_label: labels are sets, and no class number is written.
        seen: called for each file.

    Raises:
        UserError: a folder of pictures, a split that no file name can hold, or nothing to pack.
    """
    rows = range(len(manifest)) if split is None else manifest.split(split).tolist()
    table = manifest.table.select(["path", "split"]).take(pa.array(rows, pa.int64()))
    names = zip(table["split"].to_pylist(), table["path"].to_pylist(), strict=True)
    splits: dict[str, dict[str, list[int]]] = {}  # split -> path -> rows
    for row, (name, path) in zip(rows, names, strict=True):
        splits.setdefault(name, {}).setdefault(path, []).append(row)
    shards: list[Shard] = []
    left_out: list[LeftOut] = []
    for name, files in splits.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"the split '{name}' cannot be part of a shard's name: rename it")
        order = np.random.default_rng(seed).permutation(len(files))
        groups = list(files.values())
        room, number = 0.0, 0
        for place, at in enumerate(order):
            seen()
            found = look(manifest, f"{name}-{place:08d}", groups[at], multi_label)
            if isinstance(found, LeftOut):
                left_out.append(found)
                continue
            needed = found.size + 8 * BLOCK
            if needed > room:
                shards.append(Shard(f"{name}-{number:06d}.tar"))
                room, number = shard_mb * 2**20, number + 1
            shards[-1].videos.append(found)
            room -= needed
    if not shards:
        raise UserError(
            f"not one of {len(left_out):,} videos can be packed; the first is {left_out[0].path}:"
            f" {left_out[0].reason}"
        )
    settings = {
        "dataset": manifest.name,
        "root": manifest.root,
        "split": split,
        "shard_mb": shard_mb,
        "seed": seed,
    }
    return Plan(shards, left_out, settings)


def look(manifest: Manifest, key: str, numbers: list[int], multi_label: bool) -> Video | LeftOut:
    """Look at the file that some rows are pieces of, without reading it."""
    rows = [manifest.row(number) for number in numbers]
    path = manifest.absolute_path(rows[0])
    try:
        if is_folder(str(path)):
            raise UserError(
                f"{path} is a folder of pictures; only video files are packed: encode it first"
            )
        if not os.access(path, os.R_OK):
            return LeftOut(str(path), "no permission to read it")
        status = path.stat()
    except DecodeError as error:
        return LeftOut(str(path), error.reason)
    except OSError as error:
        return LeftOut(str(path), f"cannot be read ({error.strerror})")
    if status.st_size >= MOST:
        return LeftOut(str(path), "8 GiB or more: a clip of it could not be read by itself")
    pieces = [
        {
            "label": [manifest.label_names[label] for label in row.labels],
            "labels": list(row.labels),
            "start": row.start,
            "end": row.end,
            "group": row.group,
        }
        for row in rows
    ]
    about: dict[str, Any] = {"path": rows[0].path, "split": rows[0].split}
    about |= pieces[0] if len(pieces) == 1 else {"pieces": pieces}
    labels = {label for row in rows for label in row.labels or (-1,)}
    label = str(*labels) if len(labels) == 1 and -1 not in labels and not multi_label else ""
    text = json.dumps(about, ensure_ascii=False).encode()
    return Video(
        key, path, tuple(numbers), status.st_size, status.st_mtime_ns, text, label.encode()
    )


def members(video: Video) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """Give the tar members of a video with what is in them; None for the file itself."""
    ending = video.path.suffix[1:].lower()
    if not re.fullmatch("[a-z0-9]+", ending) or ending in ("json", "cls"):
        ending = "video"
    texts = [("json", video.about), ("cls", video.label)]
    for end, text in [(ending, None), *((end, text) for end, text in texts if text)]:
        info = tarfile.TarInfo(f"{video.key}.{end}")
        info.size = video.size if text is None else len(text)
        info.mtime = video.mtime_ns // 10**9
        yield info, text


def head(info: tarfile.TarInfo) -> bytes:
    """Give a member's header: ustar, with pax records where that does not hold it."""
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> int:
    """Count the bytes from a member's end to the next header."""
    return -size % BLOCK


def offsets(videos: Sequence[Video]) -> list[int]:
    """Say where in their shard each video's bytes begin."""
    position, found = 0, []
    for video in videos:
        for info, text in members(video):
            position += len(head(info))
            if text is None:
                found.append(position)
            position += info.size + padding(info.size)
    return found


class Unreadable(Exception):
    """A file that cannot be packed after all."""


class Stopped(Exception):
    """Another shard failed, or the user does not want to wait."""


def write_shard(
    shard: Shard, part: Path, stop: threading.Event, wrote: Callable[[int], None]
) -> list[LeftOut]:
    """Write a tar file. What cannot be read is taken out of `shard.videos` and named.

    Raises:
        OSError: the tar file cannot be written.
        Stopped: `stop` was set meanwhile.
    """
    left_out: list[LeftOut] = []
    kept: list[Video] = []
    with part.open("wb") as tar:
        for video in shard.videos:
            start = tar.tell()
            try:
                for info, text in members(video):
                    tar.write(head(info))
                    if text is None:
                        _copy(video, tar, stop, wrote)
                    else:
                        tar.write(text)
                    tar.write(bytes(padding(info.size)))
            except Unreadable as error:
                left_out.append(LeftOut(str(video.path), str(error)))
                tar.seek(start)
                tar.truncate()
            else:
                kept.append(video)
        tar.write(bytes(2 * BLOCK))
        tar.flush()
        os.fsync(tar.fileno())
    shard.videos = kept
    return left_out


def _copy(video: Video, tar: BinaryIO, stop: threading.Event, wrote: Callable[[int], None]) -> None:
    copied = 0
    try:
        source = video.path.open("rb")
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    with source:
        # One byte more than there should be: it may be growing.
        while copied <= video.size:
            try:
                block = source.read(min(AT_ONCE, video.size + 1 - copied))
            except OSError as error:
                raise Unreadable(f"cannot be read ({error.strerror})") from None
            if not block:
                break
            if stop.is_set():
                raise Stopped
            tar.write(block)
            copied += len(block)
            wrote(len(block))
    if copied != video.size:
        raise Unreadable("its size changed while it was packed")


class Packed(NamedTuple):
    """What became of a plan."""

    videos: int
    shards: int
    kept: int  # of the shards, from an earlier run
    left_out: list[LeftOut]


def pack(
    manifest: Manifest,
    plan: Plan,
    out: Path,
    workers: int = 1,
    notes: Sequence[str] = (),
    wrote: Callable[[int], None] = lambda size: None,
) -> Packed:
    """Write the shards of a plan that are not there yet, and the index.

    A shard appears whole or not at all, and one that an earlier run finished stays as long as its
    files have the size and time that they had. The index comes last: where there is one, all is.

    Args:
        manifest: that the plan was made of.
        plan: see `plan`.
        out: the folder; new, empty, or of an earlier run with the same settings.
        workers: shards written at once.
        notes: for whoever uses the packed dataset, beside those of the manifest.
        wrote: called with numbers of bytes, those of kept shards included, by several threads.

    Raises:
        UserError: the folder holds something else, or cannot be written, or not so much.
    """
    try:
        done = claim(out, plan)
        todo = [shard for shard in plan.shards if shard.name not in done]
        for shard in plan.shards:
            if shard.name in done:
                wrote(sum(video.size for video in shard.videos))
        check_room(out, todo)
        with tempfile.TemporaryDirectory(prefix=PARTS, dir=out) as parts:
            left_out = list(plan.left_out)
            left_out += _write_all(todo, out, Path(parts), workers, wrote)
            shards = [shard for shard in plan.shards if shard.videos]
            if shards:
                write_index(manifest, shards, notes, Path(parts, INDEX))
                os.replace(Path(parts, INDEX), out / INDEX)
    except OSError as error:
        raise UserError(
            f"output={out} cannot be written ({error.strerror or error}); finished shards stay,"
            " and the same command goes on from there"
        ) from None
    return Packed(sum(len(shard.videos) for shard in shards), len(shards), len(done), left_out)


def claim(out: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """Make the folder, or clear what is out of date from that of an earlier run.

    Returns:
        The record of the shards that stay, by name.

    Raises:
        UserError: the folder is not ours, or of other settings.
    """
    record = out / RECORD
    out.mkdir(parents=True, exist_ok=True)
    before: dict[str, dict[str, Any]] = {}
    if record.is_file():
        settings, before = _read_record(record)
        other = [key for key in plan.settings if settings.get(key) != plan.settings[key]]
        if other:
            raise UserError(
                f"output={out} was packed with another {' and '.join(other)}; name a new folder,"
                " or remove that one"
            )
    elif any(out.iterdir()):
        raise UserError(f"output={out} holds other files; name a new folder")
    done: dict[str, dict[str, Any]] = {}
    for shard in plan.shards:
        path, entry = out / shard.name, before.get(shard.name)
        if path.exists() and entry is None:
            raise UserError(f"{path} is there, and was not packed by vidtrain; move it away")
        if entry and path.exists():
            same = entry["size"] == path.stat().st_size and entry["digest"] == shard.digest
            done |= {shard.name: entry} if same else {}
    if done.keys() != before.keys() or len(done) < len(plan.shards):
        (out / INDEX).unlink(missing_ok=True)  # first: it would lead to what is no longer there
    for name in before.keys() - done.keys():
        (out / name).unlink(missing_ok=True)
    for parts in out.glob(f"{PARTS}*"):  # of a run that was killed
        shutil.rmtree(parts, ignore_errors=True)
    lines = [plan.settings, *done.values()]
    new = record.with_name(f"{RECORD}.{os.getpid()}")
    new.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.replace(new, record)
    return done


def _read_record(record: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the settings and the shards of an earlier run, whose last line may be cut off."""
    settings, entries = {}, {}
    for line in record.read_text().splitlines():
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            entry = json.loads(line)
            if {"shard", "digest", "size"} <= entry.keys():
                if SHARD_NAME.fullmatch(entry["shard"]):  # it may be removed: nothing outside
                    entries[entry["shard"]] = entry
            else:
                settings = entry
    return settings, entries


def check_room(out: Path, todo: Sequence[Shard]) -> None:
    """Refuse to begin what does not fit on the disk."""
    needed = sum(video.size for shard in todo for video in shard.videos)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"output={out} needs {needed / 1e9:,.1f} GB, its disk has {free / 1e9:,.1f} GB free"
        )


def _write_all(
    todo: Sequence[Shard], out: Path, parts: Path, workers: int, wrote: Callable[[int], None]
) -> list[LeftOut]:
    """Write shards side by side; each is put on record and in its place as it is finished."""
    stop, alone = threading.Event(), threading.Lock()

    def make(shard: Shard) -> list[LeftOut]:
        part = parts / shard.name
        left_out = write_shard(shard, part, stop, wrote)
        if shard.videos:
            entry = {"shard": shard.name, "digest": shard.digest, "size": part.stat().st_size}
            with alone:
                # On record first: what is there and not on record is taken for somebody else's.
                record.write(f"{json.dumps(entry)}\n")
                record.flush()
                os.fsync(record.fileno())
                os.replace(part, out / shard.name)
        return left_out

    with (out / RECORD).open("a") as record, ThreadPoolExecutor(max(1, workers)) as pool:
        jobs = [pool.submit(make, shard) for shard in todo]
        try:
            return [one for job in as_completed(jobs) for one in job.result()]
        except BaseException:  # Ctrl-C too
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def write_index(
    manifest: Manifest, shards: Sequence[Shard], notes: Sequence[str], path: Path
) -> None:
    """Write where the videos of all shards lie, in the order of the manifest's rows."""
    places = np.array(
        [
            (row, number, offset, video.size)
            for number, shard in enumerate(shards)
            for video, offset in zip(shard.videos, offsets(shard.videos), strict=True)
            for row in video.rows
        ]
    )
    rows, number, offset, size = places[np.argsort(places[:, 0])].T
    table = manifest.table.take(pa.array(rows))
    names = [shard.name for shard in shards]
    columns = {
        "label": class_names(table["labels"], manifest.label_names),
        "shard": pa.DictionaryArray.from_arrays(number.astype(np.int32), names),
        "offset": pa.array(offset),
        "size": pa.array(size),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    made_of = "".join(shard.digest for shard in shards)
    header = {
        "vidtrain": __version__,
        "version": hashlib.blake2b(made_of.encode(), digest_size=8).hexdigest(),
        "name": manifest.name,
        "label_names": manifest.label_names,
        "official": manifest.official,
        "notes": [*manifest.notes, *notes],
    }
    table = table.replace_schema_metadata({KEY: json.dumps(header).encode()})
    pq.write_table(table, path, compression="zstd")
