"""Tables of annotations: csv, tsv, jsonl, Parquet."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from vidtrain.types import UserError

TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".parquet")


def read_table(path: Path) -> pa.Table:
    """Read a table with named columns.

    In csv and tsv every value is text: `007` stays three characters and `NA` is a name. A csv may
    have `;` or tabs between its columns.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    kind = path.suffix.lower()
    if kind not in TABLE_EXTENSIONS:
        raise UserError(f"{path}: not a table; one ends in {', '.join(TABLE_EXTENSIONS)}")
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            table = pq.read_table(path)
        elif kind == ".jsonl":
            table = _read_jsonl(path)
        else:
            table = read_csv(path, "\t" if kind == ".tsv" else None)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    if table.num_rows == 0:
        raise UserError(f"{path} has no rows")
    return table


def read_csv(path: Path, delimiter: str | None = None) -> pa.Table:
    """Read text columns, named by the first line; `delimiter` None looks there which it is."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    if delimiter is None:
        delimiter = max(",;\t", key=header.count)
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pa.csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"two columns are called '{min(repeated)}'")
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    table = pa.csv.read_csv(path, parse_options=parse, convert_options=convert)
    return table.rename_columns([name.strip() for name in table.column_names])


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without line ends and spaces around, without empty ones.

    Raises:
        UserError: it is not UTF-8 or cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def need_column(table: pa.Table, name: str, key: str, source: Path) -> pa.ChunkedArray:
    """Take a column by the name that `key` of the config gives.

    Raises:
        UserError: there is none, naming those there are and the nearest.
    """
    if name in table.column_names:
        return table[name]
    near = difflib.get_close_matches(name, table.column_names, 1, 0.5)
    hint = f"data.{key}={near[0]}" if near else f"data.{key}=NAME"
    raise UserError(
        f"{source} has no column '{name}'; it has {', '.join(table.column_names)};"
        f" name the right one with {hint}"
    )


def _read_jsonl(path: Path) -> pa.Table:
    rows = []
    names: dict[str, None] = {}  # in the order of appearance
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f'line {number} is not an object, like {{"path": ...}}')
            rows.append(row)
            names.update(dict.fromkeys(row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise ValueError(f"the values of '{name}' are of several kinds") from None
    return pa.table(columns)
