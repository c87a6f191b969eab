"""Features that `vidtrain extract` wrote: a .npy file a video, and a table of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vidtrain.data.manifest import Annotations
from vidtrain.data.prepare import folder
from vidtrain.data.prepare.scan import check_root
from vidtrain.data.prepare.table import read_table
from vidtrain.types import UserError

TABLE = "features.csv"
CLASSES = "classes.json"  # names in the order of their numbers in the videos' own dataset
HOLDS = "what `vidtrain extract` wrote: features.csv and the files that it names"


def prepare(
    root: Path,
    num_classes: int | None = None,
    annotations: str = TABLE,
    path: str = "path",
    label: str = "label",
    split: str = "split",
    group: str = "group",
    multi_label: bool = False,
    test_fraction: float = 0.2,
    val_fraction: float = 0.1,
    split_seed: int = 0,
) -> Annotations:
    """Read a table of features as one of videos is read; classes keep the numbers of `classes.json`.

    Args:
        root: the folder of the files.
        num_classes: see `folder.prepare`, as the rest.
        annotations: the table, relative to root or to where the command runs.
        path: column of the files' paths.
        label: column of class names.
        split: column of `train`, `val`, `test`.
        group: column of what must stay together.
        multi_label: several labels a row.
        test_fraction: of the rows, where the table has no splits.
        val_fraction: of the training rows, where it has no validation split.
        split_seed: of the splits that are made.

    Raises:
        UserError: naming the file or column and what is wrong there.
    """
    root = check_root(root, HOLDS)
    table = next((p for p in (root / annotations, Path(annotations)) if p.is_file()), None)
    if table is None:
        raise UserError(f"there is no {annotations} in data.root={root}; it should hold {HOLDS}")
    result = folder.prepare(
        root, num_classes, str(table.absolute()), path, label, split, group,
        multi_label=multi_label, test_fraction=test_fraction, val_fraction=val_fraction,
        split_seed=split_seed,
    )  # fmt: skip
    _number_as_before(result, root / CLASSES)
    _add_rates(result, read_table(table), path)
    return result


def _number_as_before(result: Annotations, file: Path) -> None:
    """Give the classes the numbers that they have among the videos."""
    if not file.is_file():
        return
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
        new = np.array([names.index(name) for name in result.label_names], dtype=np.int32)
    except (ValueError, AttributeError):
        raise UserError(
            f"{file} does not name all classes of the table beside it; remove it, or extract anew"
        ) from None
    labels = result.rows["labels"].combine_chunks()
    numbers = pa.array(new[labels.values.to_numpy()], labels.type.value_type)
    moved = pa.ListArray.from_arrays(labels.offsets, numbers)
    at = result.rows.column_names.index("labels")
    result.rows = result.rows.set_column(at, "labels", moved)
    result.label_names = names


def _add_rates(result: Annotations, table: pa.Table, path: str) -> None:
    """Keep how many features a second each file has, where the table says."""
    if "rate" not in table.column_names:
        return
    try:
        rates = pc.if_else(pc.equal(table["rate"], ""), None, table["rate"]).cast(pa.float64())
    except (pa.ArrowException, TypeError):
        raise UserError("the column 'rate' of the features' table should hold numbers") from None
    known = dict(zip(table[path].to_pylist(), rates.to_pylist(), strict=True))
    column = [known.get(one) for one in result.rows["path"].to_pylist()]
    result.rows = result.rows.append_column("rate", pa.array(column, pa.float64()))
