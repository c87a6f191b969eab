"""A packed dataset: shards, and an index of what lies where in them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa

from vidtrain.data.manifest import KEY, Annotations, Place, is_url, typed
from vidtrain.data.shards import filesystem, reason_of
from vidtrain.types import UserError

INDEX = "index.parquet"
COLUMNS = ("path", "labels", "split", *Place._fields)


def prepare(root: Path | str) -> Annotations:
    """Read the index that `vidtrain data action=pack` wrote beside its shards.

    Args:
        root: their folder, or its URL.

    Raises:
        UserError: there is no index, or it is none of ours.
    """
    import pyarrow.parquet as pq

    where, data = _read(root)
    try:
        table = pq.read_table(io.BytesIO(data))
        header = json.loads(table.schema.metadata[KEY])
        kinds = {"label_names": list, "official": dict, "notes": list, "version": str}
        if any(not isinstance(header[key], kind) for key, kind in kinds.items()):
            raise ValueError("its header is of another kind")
        others = [name for name in table.column_names if name not in (*COLUMNS, "label")]
        rows = typed(table.select([*COLUMNS, *others]).replace_schema_metadata())
        if any(rows[column].null_count for column in COLUMNS):
            raise ValueError("a path, split or place is missing")
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where} is not a whole index of packed videos ({said});"
            " `vidtrain data action=pack` writes one"
        ) from None
    return Annotations(rows, *(header[key] for key in kinds))


def stamp(root: str) -> str:
    """Tell the index at a URL from a later one, by its size, time or tag.

    Raises:
        UserError: there is none.
    """
    files, path = filesystem(root)
    try:
        return json.dumps(files.info(f"{path}/{INDEX}"), sort_keys=True, default=str)
    except (
        Exception
    ) as error:  # each kind of store has its own; some say "not found" of any failure
        cause = error.__cause__
        if not isinstance(cause, Exception) or getattr(cause, "status", None) == 404:
            cause = error
        raise UserError(_missing(f"{root}/{INDEX}", cause)) from None


def _read(root: Path | str) -> tuple[str, bytes]:
    """Name the index and read it: 1.1 million rows are some 30 MB."""
    if not is_url(root):
        path = Path(root).expanduser() / INDEX
        try:
            return str(path), path.read_bytes()
        except OSError as error:
            raise UserError(_missing(str(path), error)) from None
    files, path_there = filesystem(str(root))
    where = f"{str(root).rstrip('/')}/{INDEX}"
    try:
        return where, files.cat_file(f"{path_there}/{INDEX}")
    except Exception as error:  # each kind of store has its own
        raise UserError(_missing(where, error)) from None


def _missing(where: str, error: Exception) -> str:
    return (
        f"{where}: {reason_of(error)}; data.root is the folder that `vidtrain data action=pack`"
        " wrote, or a URL of it"
    )
