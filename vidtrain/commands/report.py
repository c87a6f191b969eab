"""One run folder -> one page: `report.html`, complete in itself."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from vidtrain.types import UserError
from vidtrain.visualize.charts import Point
from vidtrain.visualize.page import Opener, Prediction, report_page


def write_report(run_dir: Path, open_path: Opener | None = None) -> Path:
    """Write `report.html` into a run folder, from the files that lie there.

    `report.json` must be there; without `predictions.csv`, `metrics.csv` or `config.yaml` the page
    lacks what they would have told. A test in a folder of its own takes curves and config from the
    run that its checkpoint lies in (`<run>/checkpoints/best.ckpt`).

    Args:
        run_dir: the folder.
        open_path: opens the video of a path in `predictions.csv`; None: from its file.

    Raises:
        UserError: no `report.json` in the folder, or a file that is not what it should be.
    """
    run_dir = Path(run_dir)
    report = read_report(run_dir / "report.json")
    predictions = read_predictions(
        run_dir / "predictions.csv", multi_label=bool(report.get("multi_label"))
    )
    folders = [run_dir]
    ckpt = Path(report.get("ckpt") or "")
    if ckpt.parent.name == "checkpoints":
        folders.append(ckpt.parent.parent)
    curves = next((found for folder in folders if (found := read_curves(folder))), {})
    configs = [folder / "config.yaml" for folder in folders]
    config = next((path for path in configs if path.is_file()), None)
    text = config.read_text(encoding="utf-8", errors="replace") if config else ""
    page = run_dir / "report.html"
    text = report_page(report, predictions, curves, text, open_path)
    page.write_text(text, encoding="utf-8")
    return page


def read_report(path: Path) -> dict[str, Any]:
    """Read `report.json`."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; `vidtrain test` writes it") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); test again to write it anew") from None
    if not isinstance(report, dict):
        raise UserError(f"{path} holds no JSON object; test again to write it anew")
    return report


def read_predictions(path: Path, *, multi_label: bool = False) -> list[Prediction]:
    """Read `predictions.csv`, in the order of the file; an absent file has no rows.

    Columns: path, label, top1, top1_score, ..., top5, top5_score. With fewer than five classes
    the last ones are empty; with several labels a video they are joined by `|`.
    """
    if not path.is_file():
        return []
    predictions: list[Prediction] = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                label = row["label"] or ""
                labels = label.split("|") if multi_label else [label]
                top = [
                    (row[f"top{i}"], float(row[f"top{i}_score"]))
                    for i in range(1, 6)
                    if row.get(f"top{i}")
                ]
                if not top:
                    raise ValueError("no top1")
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path}, row {len(predictions) + 1}: {error!r}; expected the columns path, "
                    "label, top1, top1_score, ..., top5, top5_score"
                ) from None
            truth = tuple(labels) if label else ()
            predictions.append(Prediction(row["path"], truth, tuple(top)))
    return predictions


def read_curves(run_dir: Path) -> dict[str, list[Point]]:
    """Read what the CSV logger wrote, in this attempt and in those before a resume.

    `metrics.1.csv`, `metrics.2.csv`, ... come before `metrics.csv`. An attempt replaces what
    earlier ones logged from its own first step on: going back to the checkpoint undid those steps.
    Columns of the test are left out: they are no curves.
    """
    earlier = [path for path in run_dir.glob("metrics.*.csv") if path.stem[8:].isdigit()]
    attempts = [*sorted(earlier, key=lambda path: int(path.stem[8:])), run_dir / "metrics.csv"]
    curves: dict[str, list[Point]] = {}
    for path in attempts:
        fresh = _attempt(path) if path.is_file() else {}
        start = min((p.step for points in fresh.values() for p in points), default=math.inf)
        for name in curves:
            curves[name] = [point for point in curves[name] if point.step < start]
        for name, points in fresh.items():
            curves.setdefault(name, []).extend(points)
    return {
        name: sorted(points, key=lambda point: point.step)
        for name, points in curves.items()
        if points
    }


def _attempt(path: Path) -> dict[str, list[Point]]:
    """Read one file of the CSV logger: sparse rows, a column for each metric."""
    curves: dict[str, list[Point]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            try:
                step = int(row.pop("step"))
                epoch = row.pop("epoch", None)
                at = (step, int(epoch) if epoch else None)
                values = {name: float(value) for name, value in row.items() if value}
            except (KeyError, TypeError, ValueError):
                continue  # a line that a crash cut short
            for name, value in values.items():
                if not name.startswith("test/"):
                    curves.setdefault(name, []).append(Point(at[0], value, at[1]))
    return curves
