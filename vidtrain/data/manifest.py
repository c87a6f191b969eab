"""The manifest: the table of a dataset's videos, in an Arrow file that is mapped, not read.

A million rows as Python objects cost a gigabyte, and through their reference counts a copy of it in
every worker. Mapped, they cost each process the pages it touches; a worker is sent a path.

Columns: `path` (string, relative to the root, "/" between its parts), `labels` (list of class
numbers), `split` (dictionary), and where known `start`, `end` (seconds), `group` (string) and any
other that a prepare function adds. A packed dataset has `shard` (dictionary), `offset` and `size`
too: where in which tar file of the root the video's bytes lie. The schema's metadata hold what is
true of the whole: class names, the counts that the dataset's authors state, notes for the user,
root, name, fingerprint.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidtrain import __version__
from vidtrain.types import UserError

FORMAT = 1  # of the file; raised when older files can no longer be read
MAX_CLASSES = 32_767  # labels are int16
KEY = b"vidtrain"  # of our metadata in the schema
OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|\x00")  # paths that could leave their root
# Nothing that a file system or a URL could take for more than a name: no "/", ":", "%" or "?".
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")  # of the whole name


class Place(NamedTuple):
    """Where a packed video lies: `size` bytes from `offset` on in the root's file `shard`."""

    shard: str
    offset: int
    size: int


@dataclass(frozen=True)
class Row:
    """One video, or a piece of one."""

    path: str  # as stored: relative to the manifest's root
    labels: tuple[int, ...]  # class numbers; empty where unknown
    start: float | None  # seconds, when only a piece counts
    end: float | None
    split: str
    group: str | None  # videos of one group never lie on both sides of a split
    place: Place | None = None  # of its bytes, when it lies in a shard and not in a file of its own
    rate: float | None = None  # features per second, when it is a file of these


@dataclass
class Annotations:
    """What a dataset's annotation files say, as its `prepare` function returns it."""

    rows: pa.Table
    label_names: list[str]  # position = class number
    official: dict[str, int] = field(default_factory=dict)  # videos a split, by the authors
    notes: list[str] = field(default_factory=list)  # what the user should be told
    version: str = ""  # of packed bytes: with another one, others may lie at the same places


def make_rows(
    paths: Any,
    labels: Any,
    splits: Any,
    start: Any = None,
    end: Any = None,
    group: Any = None,
) -> pa.Table:
    """Build the table of `Annotations` from columns: lists, arrays or Arrow arrays."""
    columns = {"path": paths, "labels": labels, "split": splits}
    columns |= {
        name: column
        for name, column in (("start", start), ("end", end), ("group", group))
        if column is not None
    }
    return typed(pa.table({name: _array(name, column) for name, column in columns.items()}))


def single_labels(numbers: pa.Array) -> pa.Array:
    """Turn class numbers, null where unknown, into lists of one or none."""
    known = np.asarray(pc.is_valid(numbers))
    offsets = np.concatenate([[0], np.cumsum(known)]).astype(np.int32)
    values = numbers.drop_null()
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return pa.ListArray.from_arrays(pa.array(offsets), values.cast(pa.int32()))


def is_url(root: str | Path) -> bool:
    """Tell `s3://bucket/videos` from a folder."""
    return "://" in str(root)


def save(annotations: Annotations, path: Path, name: str, root: Path | str) -> None:
    """Write a manifest; readers see the old file or the new one, never a part.

    Args:
        annotations: of which `rows` needs the columns `path`, `labels` and `split`.
        path: the Arrow file; its folder is made.
        name: of the dataset, for messages and reports.
        root: the folder that the rows' paths are relative to, or the URL that their shards lie at.

    Raises:
        UserError: no rows, a label without a name, a path or shard that leaves the root, or `path`
            cannot be written.
    """
    rows = typed(annotations.rows)
    _check(rows, annotations.label_names, name, root)
    header = {
        "format": FORMAT,
        "version": __version__,
        "name": name,
        "root": str(root).rstrip("/") if is_url(root) else os.path.abspath(root),
        "label_names": annotations.label_names,
        "official": annotations.official,
        "notes": annotations.notes,
        "packed": annotations.version,
        "fingerprint": fingerprint(rows, annotations.label_names),
    }
    rows = rows.replace_schema_metadata({KEY: json.dumps(header).encode()})
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            # One batch: a row is found by its number, without a search over batches.
            writer.write_batch(rows.combine_chunks().to_batches()[0])
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}); name another data.cache_dir"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


class Manifest:
    """A saved manifest, opened once a process, when first asked.

    Pickled, it is a path: a spawned worker opens the file itself and checks that it is still the
    same; a forked one shares the mapping.

    Raises:
        UserError: at once, when the file is not a manifest, is cut off or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fingerprint: str | None = None
        self._opened: tuple[dict[str, pa.Array], dict[str, Any]] | None = None
        self._fingerprint = self._open()[1]["fingerprint"]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_fingerprint": self._fingerprint, "_opened": None}

    def _open(self) -> tuple[dict[str, pa.Array], dict[str, Any]]:
        if self._opened is None:
            columns, header = _read(self.path)
            if self._fingerprint not in (None, header["fingerprint"]):
                raise UserError(f"{self.path} was written anew while it was in use; start again")
            self._opened = columns, header
        return self._opened

    @property
    def table(self) -> pa.Table:
        """All columns, mapped."""
        return pa.table(self._open()[0])

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self._open()[1]["name"])

    @property
    def root(self) -> str:
        """The folder that paths are relative to, absolute, or the URL that the shards lie at."""
        return str(self._open()[1]["root"])

    @property
    def label_names(self) -> list[str]:
        """Class names; the position is the class number."""
        return list(self._open()[1]["label_names"])

    @property
    def official(self) -> dict[str, int]:
        """Videos a split as the dataset's authors state them; empty where nobody does."""
        return dict(self._open()[1]["official"])

    @property
    def notes(self) -> list[str]:
        """What the user should be told about how the manifest came to be."""
        return list(self._open()[1]["notes"])

    @property
    def is_packed(self) -> bool:
        """Say whether the videos lie in shards: then every row has a place."""
        return "shard" in self._open()[0]

    @property
    def packed_version(self) -> str:
        """What the bytes in the shards were made of, as a hash; empty where nothing is packed."""
        return str(self._open()[1].get("packed", ""))

    @property
    def fingerprint(self) -> str:
        """A short hash of what is in it: equal rows and class names, equal fingerprint."""
        return str(self._open()[1]["fingerprint"])

    def __len__(self) -> int:
        return len(self._open()[0]["path"])

    def row(self, i: int) -> Row:
        """Give row `i`.

        Raises:
            IndexError: outside `0 <= i < len(self)`.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of a manifest of {len(self)}")
        columns = self._open()[0]
        start, end, group = (
            columns[name][i].as_py() if name in columns else None
            for name in ("start", "end", "group")
        )
        rate = columns["rate"][i].as_py() if "rate" in columns else None
        labels = tuple(columns["labels"][i].as_py())
        split = columns["split"][i].as_py()
        place = None
        if "shard" in columns:
            place = Place(*(columns[name][i].as_py() for name in Place._fields))
        return Row(columns["path"][i].as_py(), labels, start, end, split, group, place, rate)

    def split(self, name: str) -> np.ndarray:
        """Give the row numbers of a split, int64, ascending; none when there is no such split."""
        return np.flatnonzero(self._in_split(name))

    @property
    def splits(self) -> dict[str, int]:
        """Count the rows of each split: train, val, test, then any other."""
        column = self._open()[0]["split"]
        names = column.dictionary.to_pylist()
        counts = np.bincount(column.indices.to_numpy(), minlength=len(names)).tolist()
        found = {name: count for name, count in zip(names, counts, strict=True) if count}
        known = [name for name in ("train", "val", "test") if name in found]
        return {name: found[name] for name in [*known, *sorted(set(found) - set(known))]}

    def label_counts(self, split: str) -> np.ndarray:
        """Count the rows of each class in a split: (K,) int64."""
        labels = self._open()[0]["labels"]
        parents = pc.list_parent_indices(labels).to_numpy()
        values = labels.flatten().to_numpy()[self._in_split(split)[parents]]
        return np.bincount(values, minlength=len(self._open()[1]["label_names"]))

    def first_labels(self) -> np.ndarray:
        """Give each row's first class, (rows,) int64; -1 where it has none."""
        labels = self._open()[0]["labels"]
        found = np.full(len(self), -1, np.int64)
        # from the back: of several the first is written last
        found[pc.list_parent_indices(labels).to_numpy()[::-1]] = labels.flatten().to_numpy()[::-1]
        return found

    def absolute_path(self, row: Row) -> Path:
        """Say which file a row's video is.

        Only the path's own parts are looked at: a symbolic link below the root may point anywhere,
        since it is the user who put it there.

        Raises:
            UserError: the path would leave the root, or the video is not a file but packed.
        """
        if row.place is not None or is_url(self.root):
            raise UserError(
                f"{row.path} is no file of its own: {self.name} is packed, in {self.root}"
            )
        if OUTSIDE.search(row.path):
            raise UserError(f"{self.path}: '{row.path}' lies outside the root {self.root}")
        return Path(self.root, row.path)

    def location(self, row: Row) -> str:
        """Name a row's video for messages: its file, or `ROOT/SHARD:PATH` where it is packed."""
        if row.place is None:
            return str(self.absolute_path(row))
        return f"{self.root}/{row.place.shard}:{row.path}"

    def _in_split(self, name: str) -> np.ndarray:
        column = self._open()[0]["split"]
        names = column.dictionary.to_pylist()
        if name not in names:
            return np.zeros(len(column), dtype=bool)
        return np.asarray(column.indices.to_numpy() == names.index(name))


def export(manifest: Manifest, path: Path) -> None:
    """Write a manifest as a table for other tools, and for `data=folder` to read back.

    Args:
        manifest: of any dataset.
        path: ends in `.parquet` or `.csv`. The column `label` holds class names, in Parquet as
            lists, in csv with `|` between them.

    Raises:
        UserError: another ending.
    """
    table = manifest.table
    labels = class_names(table["labels"], manifest.label_names)
    at = table.column_names.index("labels")
    table = table.set_column(at, "label", labels).replace_schema_metadata()
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, path, compression="zstd")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table.column_names)
            for batch in table.to_batches(max_chunksize=10_000):
                for row in zip(*batch.to_pydict().values(), strict=True):
                    writer.writerow("|".join(v) if isinstance(v, list) else v for v in row)
    else:
        raise UserError(f"{path}: a manifest is exported to .parquet or .csv")


def class_names(labels: pa.ChunkedArray, label_names: Sequence[str]) -> pa.Array:
    """Turn lists of class numbers into lists of class names."""
    lists = labels.combine_chunks()
    return pa.ListArray.from_arrays(
        lists.offsets, pa.array(label_names, pa.string()).take(lists.values)
    )


def fingerprint(rows: pa.Table, label_names: Sequence[str]) -> str:
    """Hash what training sees of a table: paths, labels, splits, pieces and class names.

    Not where the bytes lie: a dataset and its packed copy are the same to a run that goes on.
    """
    digest = hashlib.blake2b(json.dumps(list(label_names)).encode(), digest_size=8)
    for name in ("path", "labels", "split", "start", "end"):
        if name in rows.column_names:
            digest.update(name.encode())
            for part in _contents(rows[name].combine_chunks()):
                digest.update(part)
    return digest.hexdigest()


def _contents(column: pa.Array) -> Iterator[bytes | memoryview]:
    """Give a column's values as bytes that do not depend on how Arrow laid them out."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_list(column.type):
        yield pc.list_value_length(column).to_numpy(zero_copy_only=False).astype("<i4").tobytes()
        yield from _contents(column.flatten())
    elif pa.types.is_string(column.type):
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        yield (ends - ends[0]).astype("<i4").tobytes()
        yield memoryview(data or b"")[ends[0] : ends[-1]]
    else:
        kind = "<f8" if pa.types.is_floating(column.type) else "<i8"
        yield column.fill_null(-1).to_numpy(zero_copy_only=False).astype(kind).tobytes()


def _array(name: str, column: Any) -> pa.Array | pa.ChunkedArray:
    if isinstance(column, (pa.Array, pa.ChunkedArray)):
        return column
    kinds = {"path": pa.string(), "split": pa.string(), "group": pa.string()}
    kinds |= {"labels": pa.list_(pa.int32()), "start": pa.float64(), "end": pa.float64()}
    return pa.array(column, kinds[name])


def typed(rows: pa.Table) -> pa.Table:
    """Cast the columns that are ours.

    Raises:
        pa.ArrowException: values that do not fit.
    """
    kinds = {"path": pa.string(), "labels": pa.list_(pa.int16()), "group": pa.string()}
    kinds |= {"start": pa.float64(), "end": pa.float64()}
    kinds |= {"offset": pa.int64(), "size": pa.int64(), "rate": pa.float64()}
    for at, column in enumerate(rows.column_names):
        if column in ("split", "shard") and not pa.types.is_dictionary(rows.schema.field(at).type):
            # combine_chunks: chunks would each bring a dictionary of their own
            values = rows[column].cast(pa.string()).combine_chunks().dictionary_encode()
            rows = rows.set_column(at, column, values)
        elif column in kinds and rows.schema.field(at).type != kinds[column]:
            rows = rows.set_column(at, column, rows[column].cast(kinds[column]))
    return rows


def _check(rows: pa.Table, label_names: list[str], name: str, root: Path | str) -> None:
    if rows.num_rows == 0:
        raise UserError(f"{name}: no video of it lies under {root}")
    packed = "shard" in rows.column_names
    for column in ("path", "labels", "split", *(Place._fields if packed else ())):
        if rows[column].null_count:
            raise ValueError(f"{name}: column '{column}' has nulls")  # a bug in a prepare function
    numbers = pc.min_max(pc.list_flatten(rows["labels"])).as_py()
    if numbers["max"] is not None and not 0 <= numbers["min"] <= numbers["max"] < len(label_names):
        raise UserError(
            f"{name}: labels run from {numbers['min']} to {numbers['max']},"
            f" but there are {len(label_names)} class names"
        )
    outside = rows["path"].filter(pc.match_substring_regex(rows["path"], OUTSIDE.pattern))
    if len(outside):
        raise UserError(
            f"{name}: {len(outside):,} paths leave the root {root}, such as '{outside[0]}';"
            " name a root above all of the videos"
        )
    if packed:
        _check_places(rows, name, root)


def _check_places(rows: pa.Table, name: str, root: Path | str) -> None:
    for shard in rows["shard"].unique().to_pylist():
        if not SHARD_NAME.fullmatch(shard):
            raise UserError(f"{name}: '{shard}' cannot be the name of a shard in {root}")
    offset, size = (pc.min_max(rows[column]).as_py()["min"] for column in ("offset", "size"))
    if offset < 0 or size < 1:
        raise UserError(f"{name}: no video of {root} can have {size} bytes at offset {offset}")


def _read(path: Path) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    again = "make it anew with `vidtrain data action=prepare`"
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            header = json.loads((reader.schema.metadata or {})[KEY])
            if header["format"] != FORMAT:
                raise UserError(
                    f"{path} is a manifest of format {header['format']}, this is vidtrain"
                    f" {__version__} with format {FORMAT}; {again}"
                )
            batch = reader.get_batch(0)
            return dict(zip(batch.schema.names, batch.columns, strict=True)), header
    except FileNotFoundError:
        raise UserError(f"{path}: there is no manifest; {again}") from None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a whole manifest ({_line(error)}); {again}") from None


def _line(error: Exception) -> str:
    """Keep the first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
