"""Check the files of a dataset: decode every frame of each, and look for leaks between splits."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vidtrain.data import crew
from vidtrain.data.crew import Lost
from vidtrain.data.decode import check_decoder, open_video
from vidtrain.types import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator

    from vidtrain.data.manifest import Place
    from vidtrain.data.shards import Shards
    from vidtrain.types import VideoReader

AT_ONCE = 32  # frames in memory, where a decoder can be checked only by taking its frames


class Probe(NamedTuple):
    """What decoding a whole file brought to light: a row of the table."""

    path: str
    ok: bool
    frames: int | None = None  # as `len` of its reader
    fps: float | None = None
    width: int | None = None  # pixels, as shown
    height: int | None = None
    duration: float | None = None  # seconds
    error: str | None = None


def probe(path: str | Path, decoder: str = "auto", data: bytes | None = None) -> Probe:
    """Decode every frame of one file and say what is wrong with it; never raises.

    Damage is looked for with PyAV whatever the decoder, for the others do not tell. Then the one
    asked for has to deliver every frame.

    Args:
        path: the file, or what to call it.
        decoder: see `vidtrain.data.decode.open_video`.
        data: its bytes, where it is no file of its own.
    """
    path = os.fspath(path)
    source = path if data is None else data
    facts: dict[str, int | float] = {}
    reason = None
    try:
        check_decoder(decoder)
        with open_video(source, name=path) as reader:
            facts["frames"] = len(reader)
            facts["fps"] = round(reader.fps, 3)
            facts["duration"] = round(len(reader) / reader.fps, 3)
            if hasattr(reader, "check"):
                reason = reader.check().reason
            else:  # a folder: its pictures can only be read
                _take_all(reader)
            facts["width"], facts["height"] = reader.width, reader.height
        if reason is None and decoder not in ("auto", "pyav"):
            with open_video(source, decoder, name=path) as reader:
                _take_all(reader)
    except DecodeError as error:
        reason = error.reason
    except Exception as error:  # whatever it is, it is one file's, and the others are to go on
        reason = f"{type(error).__name__}: {error}"
    return Probe(path, ok=reason is None, error=reason, **facts)


def _take_all(reader: VideoReader) -> None:
    for start in range(0, len(reader), AT_ONCE):
        reader.frames(range(start, min(start + AT_ONCE, len(reader))))


def check_files(
    paths: Iterable[str | Path],
    workers: int = 0,
    time_limit: float = 60.0,
    progress: Callable[[Probe], None] | None = None,
    decoder: str = "auto",
    look: Callable[[str, str], Probe] = probe,
) -> Iterator[Probe]:
    """Probe many files at once, each in a process that may hang or crash without harm.

    A process that takes too long or dies is replaced, and the file it was at is named. Memory does
    not grow with the number of files. Leaving the loop, or Ctrl-C, ends all processes.

    Args:
        paths: the files; read as needed.
        workers: how many processes; 0: one for each core.
        time_limit: seconds that one file may take.
        progress: called with each result as soon as it is there.
        decoder: see `vidtrain.data.decode.open_video`.
        look: what is done with each path and `decoder`, a function at the top of its module.

    Yields:
        A `Probe` for each path, in the order of the paths.

    Raises:
        UserError: a decoder that is not known.
    """
    check_decoder(decoder)
    return _probes(paths, workers, time_limit, progress, partial(look, decoder=decoder))


def _probes(
    paths: Iterable[str | Path],
    workers: int,
    time_limit: float,
    progress: Callable[[Probe], None] | None,
    look: Callable[[str], Probe],
) -> Iterator[Probe]:
    def tell(result: Probe | Lost) -> None:
        if progress is not None:
            progress(_probe_of(result))

    results = crew.run(look, map(os.fspath, paths), workers, time_limit, tell, "the decoder")
    with contextlib.closing(results):  # at once, also when the loop is left
        yield from map(_probe_of, results)


def check_packed(
    videos: Iterable[tuple[str, Place]],
    shards: Shards,
    workers: int = 0,
    time_limit: float = 60.0,
    decoder: str = "auto",
) -> Iterator[Probe]:
    """Probe videos that lie in shards: what `check_files` does for files.

    Args:
        videos: what to call each, and where it lies.
        shards: of the dataset.
        workers: see `check_files`.
        time_limit: see `check_files`.
        decoder: see `check_files`.
    """
    check_decoder(decoder)
    look = partial(probe_packed, shards=shards, decoder=decoder)
    results = crew.run(look, videos, workers, time_limit, None, "the decoder")
    with contextlib.closing(results):
        yield from map(_probe_of, results)


def probe_packed(video: tuple[str, Place], shards: Shards, decoder: str) -> Probe:
    """Probe one video of a shard; never raises."""
    name, place = video
    try:
        data = shards.read(place)
    except DecodeError as error:
        return Probe(name, ok=False, error=error.reason)
    except Exception as error:
        return Probe(name, ok=False, error=str(error))
    return probe(name, decoder, data)


def _probe_of(result: Probe | Lost) -> Probe:
    if isinstance(result, Lost):
        name = result.job if isinstance(result.job, str) else result.job[0]
        return Probe(name, ok=False, error=result.reason)
    return result


def write_table(probes: Iterable[Probe], path: str | Path) -> None:
    """Write probes as csv, as they come: path, ok, frames, fps, width, height, duration, error."""
    # a file name may hold bytes that are no text; they go into the table as they are
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(Probe._fields)
        table.writerows(probes)


class Leak(NamedTuple):
    """Something that two splits, or two labels, share and should not."""

    kind: str  # "group", "content" or "label"
    what: str  # in words
    paths: tuple[str, ...]  # one of each side at least


def leaks(rows: Iterable[tuple[str, str, Hashable | None, Hashable | list]]) -> list[Leak]:
    """Find what a training split knows of a test split, and files that contradict each other.

    Args:
        rows: (path, split, group or None, labels) of every row of a manifest; several rows may
            share a path.

    Returns:
        One `Leak` for each group that lies in several splits; for each content (files that are
        equal byte for byte, or one file twice) that lies in several splits; and for each content
        whose copies have different labels. Files that cannot be read are passed over.
    """
    groups: dict[Hashable, dict[str, str]] = defaultdict(dict)  # group -> split -> a path
    facts: dict[str, tuple[frozenset, frozenset]] = {}  # path -> its splits, its labels
    shared: dict[tuple, tuple] = {}  # few facts are different: a million rows share them
    nothing: frozenset = frozenset()
    for path, split, group, labels in rows:
        if group is not None:
            groups[group].setdefault(split, path)
        label = tuple(labels) if isinstance(labels, list) else labels
        splits_before, labels_before = facts.get(path, (nothing, nothing))
        fact = splits_before | {split}, labels_before | {label}
        facts[path] = shared.setdefault(fact, fact)

    found = [
        Leak("group", f"group {group!r} is in {_and(paths)}", tuple(paths.values()))
        for group, paths in groups.items()
        if len(paths) > 1
    ]
    copies = _equal_files(facts)
    known = {path for paths in copies for path in paths}
    for paths in [*copies, *((path,) for path in facts if path not in known)]:
        splits = frozenset().union(*(facts[path][0] for path in paths))
        if len(splits) > 1:
            found.append(Leak("content", f"the same file is in {_and(splits)}", tuple(paths)))
        if len({facts[path][1] for path in paths}) > 1:
            found.append(Leak("label", "copies of a file have different labels", tuple(paths)))
    return found


def _and(splits: Iterable[str]) -> str:
    *others, last = sorted(map(str, splits))
    return f"{', '.join(others)} and {last}"


def _equal_files(paths: Iterable[str]) -> list[list[str]]:
    """Return the sets of files that are equal byte for byte; read no more than it takes."""
    sets = [list(paths)]
    for key in (_size, _hash_of_beginning, _hash):
        smaller = []
        for together in sets:
            alike = defaultdict(list)
            for path in together:
                with contextlib.suppress(OSError):
                    alike[key(path)].append(path)
            smaller += [same for same in alike.values() if len(same) > 1]
        sets = smaller
    return sets


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _hash_of_beginning(path: str) -> bytes:
    return _hash(path, most=1 << 16)


def _hash(path: str, most: int | None = None) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(most or 1 << 20):
            digest.update(block)
            if most:
                break
    return digest.digest()
