"""What lies on disk, and which rows of an annotation file have a video there."""

from __future__ import annotations

import os
from collections.abc import Callable
from os import DirEntry
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidtrain.types import UserError

VIDEO_EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg"),
        *("mts", "m2ts", "ts", "wmv", "flv", "3gp", "ogv", "gif"),
    )
)
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})


def check_root(root: Path | str, what: str) -> Path:
    """Give the root as a path.

    Raises:
        UserError: it is not a folder; `what` says what it should hold.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={root} is not a folder; it should hold {what}")
    return root


def find_videos(root: Path, notes: list[str]) -> pa.Table:
    """List every video below a folder.

    A video is a file with a video's extension, or a folder with nothing but files of which one at
    least is an image (frames). Hidden files and folders are passed over; links to folders are
    followed, except into themselves.

    Args:
        root: where to look.
        notes: gets a line when something could not be looked at.

    Returns:
        Columns `path` (relative to root, "/" between its parts) and `stem` (the name without
        extension), sorted by path.
    """
    found: list[tuple[str, str]] = []
    closed: list[str] = []
    todo: list[tuple[str, str, frozenset[tuple[int, int]]]] = [("", "", frozenset())]
    while todo:
        prefix, folder, above = todo.pop()
        try:
            stat = os.stat(root / prefix)
            with os.scandir(root / prefix) as listing:
                entries = [entry for entry in listing if entry.name[0] != "."]
        except OSError:
            closed.append(prefix or ".")
            continue
        if (stat.st_dev, stat.st_ino) in above:
            continue  # a link that leads back up
        inside = above | {(stat.st_dev, stat.st_ino)}
        videos = images = folders = 0
        for entry in entries:
            name = entry.name
            stem, dot, extension = name.rpartition(".")
            extension = (dot + extension).lower()
            if leads_to(entry, DirEntry.is_dir):
                folders += 1
                todo.append((f"{prefix}{name}/", name, inside))
            elif extension in VIDEO_EXTENSIONS and leads_to(entry, DirEntry.is_file):
                videos += 1
                found.append((prefix + name, stem))
            elif extension in IMAGE_EXTENSIONS:
                images += 1
        if images and not videos and not folders and folder:
            found.append((prefix[:-1], folder))
    if closed:
        notes.append(f"{len(closed):,} folders could not be read, such as {root / min(closed)}")
    named = [item for item in found if _is_text(item[0])]
    if len(named) < len(found):
        notes.append(f"{len(found) - len(named):,} videos are left out: names that are not UTF-8")
    named.sort()
    return pa.table(
        {
            "path": pa.array([path for path, _ in named], pa.string()),
            "stem": pa.array([stem for _, stem in named], pa.string()),
        }
    )


def match(
    keys: pa.Array, stems: pa.Array, paths: pa.Array, notes: list[str] | None = None
) -> pa.Array:
    """Look each key up among the stems: the first one's path, null where there is none.

    `notes` gets a line when a key is there more than once.
    """
    stems, paths = (
        a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in (stems, paths)
    )
    if notes is not None:
        wanted = pc.is_in(stems, value_set=keys)
        first = pc.index_in(stems, value_set=stems).to_numpy()
        again = np.flatnonzero(np.asarray(wanted) & (first < np.arange(len(stems))))
        if len(again):
            i = int(again[0])
            notes.append(
                f"{len(again):,} more files have the name of another; the first is taken,"
                f" such as {paths[int(first[i])]} and not {paths[i]}"
            )
    return paths.take(pc.index_in(keys, value_set=stems))


def keep_found(rows: pa.Table, root: Path, source: str, notes: list[str]) -> pa.Table:
    """Leave out the rows whose `path` is null, and say how many.

    Raises:
        UserError: no row has a video.
    """
    missing = rows["path"].null_count
    if missing == rows.num_rows:
        raise UserError(
            f"none of the {rows.num_rows:,} videos of {source} is under {root};"
            " is data.root the folder that the videos lie in?"
        )
    if missing:
        notes.append(
            f"{missing:,} of {rows.num_rows:,} rows of {source} have no file under {root};"
            " they are left out"
        )
    return rows.filter(pc.is_valid(rows["path"])) if missing else rows


def check_classes(names: list[str], num_classes: int, source: str) -> None:
    """Compare the classes that the annotations name with the configured number.

    Raises:
        UserError: they differ.
    """
    if len(names) != num_classes:
        raise UserError(
            f"{source}: {len(names)} classes, but data.num_classes is {num_classes}; complete the"
            f" annotation files, or set data.num_classes={len(names)} for a part of the dataset"
        )


def leads_to(entry: DirEntry[str], kind: Callable[[DirEntry[str]], bool]) -> bool:
    """Ask `DirEntry.is_file` or `DirEntry.is_dir` of an entry; a link to itself is neither."""
    try:
        return kind(entry)
    except OSError:
        return False


def _is_text(name: str) -> bool:
    """Say whether a name off the disk can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
