"""`vidtrain report`: one run, or several side by side, as one page that is complete in itself."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vidtrain.config import fail
from vidtrain.types import UserError
from vidtrain.visualize.charts import Point
from vidtrain.visualize.compare import Run, compare_page
from vidtrain.visualize.page import Opener, Prediction, report_page

USAGE = """usage: vidtrain report RUN [RUN ...] [output=report.html]

  RUN is a run's folder, a test's, or one that holds runs: a sweep's, runs/c3d-ucf101, runs.
  One run: its own page, as `vidtrain test` writes it. Several: side by side, on one page.
"""

# Parts of a config that say where and when, not what was done.
ASIDE = ("paths", "logger", "callbacks", "resume", "published", "allow", "debug", "test", "split")


def main(words: list[str]) -> int:
    """Write the page of the runs whose folders are named; its words are no config's."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0 if words else 2
    try:
        page = _report(words)
    except UserError as error:
        fail("report", error)
    print(f"report {page}")
    return 0


def _report(words: list[str]) -> Path:
    """Find the runs, gather what lies in them, write the page."""
    output, folders = None, []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and not Path(word).expanduser().exists():
            if name != "output" or not value:
                raise UserError(
                    f"cannot read '{word}': vidtrain report RUN [RUN ...] [output=FILE]"
                )
            output = Path(value).expanduser()
        else:
            folders.append(Path(word).expanduser())
    if not folders:
        raise UserError("no run is named: vidtrain report RUN [RUN ...]")
    runs = list(dict.fromkeys(run for folder in folders for run in find_runs(folder)))
    if output is None:
        alone = len(folders) == 1
        output = folders[0] / "report.html" if alone else Path("report.html")
    elif output.is_dir():
        output = output / "report.html"
    if runs == folders[:1] and (tested := tested_folder(runs[0])):
        page = tested / "report.html"
        if not page.is_file():  # a test's own has pictures of videos out of shards too
            write_report(tested)
        if output.absolute() == (runs[0] / "report.html").absolute():
            return page
        text = page.read_text(encoding="utf-8")
    else:
        failed = [job for folder in folders for job in _failed(folder)]
        text = compare_page(named(list(map(gather, runs))), failed)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(output.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(output)
    return output


def is_run(folder: Path) -> bool:
    """Tell a run's folder, or a test's, from one that holds runs."""
    logged = any((folder / name).exists() for name in ("metrics.csv", "checkpoints"))
    return (folder / "report.json").is_file() or ((folder / "config.yaml").is_file() and logged)


def find_runs(folder: Path) -> list[Path]:
    """List a run itself, or the runs below a folder, in the order of their names.

    Raises:
        UserError: there is none.
    """

    def below(folder: Path, depth: int) -> Iterator[Path]:
        if is_run(folder):
            yield folder
        elif depth:
            for child in sorted(filter(Path.is_dir, folder.iterdir()), key=by_number):
                if not child.name.startswith("."):
                    yield from below(child, depth - 1)

    if not folder.exists():
        raise UserError(f"{folder} is not there; name a run's folder, runs/MODEL-DATA/TIME")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; name a run's folder, runs/MODEL-DATA/TIME")
    found = list(below(folder, 3))  # runs/sweep/TIME/JOB
    if not found:
        raise UserError(
            f"{folder} is no run and holds none: a run has config.yaml and metrics.csv,"
            " a test report.json"
        )
    return found


def named(runs: list[Run]) -> list[Run]:
    """Name runs by their models where these differ, else by what tells their paths apart."""
    whole = [Path(run.folder).resolve() for run in runs]
    common = Path(os.path.commonpath([str(path.parent) for path in whole]))
    for names in ([run.model for run in runs], [path.name for path in whole]):
        if len(set(names)) == len(names):
            break
    else:
        names = [path.relative_to(common).as_posix() for path in whole]
    return [run._replace(name=name) for run, name in zip(runs, names, strict=True)]


def _failed(folder: Path) -> list[str]:
    """Say which jobs of a sweep left no run."""
    lines = []
    for path in sorted(folder.glob("*/job.json")):
        try:
            job = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if job.get("status") == "failed":
            lines.append(f"Job {job.get('job')} of {folder.name} failed: {job.get('error')}.")
    return lines


def by_number(path: Path) -> list[tuple[str, int]]:
    """Sort `2-c3d` before `10-c3d`."""
    return [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def tested_folder(run: Path) -> Path | None:
    """Find where a run's test lies: in the run, else its newest `test-*`; None without one."""
    folders = [run, *sorted(run.glob("test-*"), key=lambda path: path.stat().st_mtime)[::-1]]
    return next((folder for folder in folders if (folder / "report.json").is_file()), None)


def _trained_folder(folder: Path, report: Mapping[str, Any]) -> Path:
    """Find the run that a test in a folder of its own is of: its checkpoint lies there."""
    ckpt = Path(report.get("ckpt") or "")
    known = [folder, ckpt.parent.parent] if ckpt.parent.name == "checkpoints" else [folder]
    return next((path for path in known if (path / "config.yaml").is_file()), folder)


def gather(run: Path) -> Run:
    """Read what lies in a run's folder; its name is the folder's.

    Raises:
        UserError: a file is not what it should be.
    """
    from omegaconf import OmegaConf

    from vidtrain import sweep

    tested = tested_folder(run)
    report = read_report(tested / "report.json") if tested else {}
    many = bool(report.get("multi_label"))
    predictions = read_predictions(tested / "predictions.csv", multi_label=many) if tested else []
    trained = _trained_folder(run, report)
    path = trained / "config.yaml"
    try:
        cfg: Any = OmegaConf.load(path) if path.is_file() else OmegaConf.create({})
        settings = dict(_flat(OmegaConf.to_container(cfg)))
    except Exception as error:  # whatever the YAML's parser makes of a torn file
        raise UserError(f"{path} cannot be read as a config ({error})") from None
    target = str(OmegaConf.select(cfg, "model._target_") or "")
    made = _made(trained)
    return Run(
        name=run.name,
        folder=str(run),
        model=str(report.get("model") or target.rpartition(".")[2] or "-"),
        data=str(report.get("data") or OmegaConf.select(cfg, "data.name") or "-"),
        report=report,
        predictions=predictions,
        curves=read_curves(trained),
        settings=settings,
        metric=sweep.metric(cfg),
        minutes=_minutes(trained),
        code=made.get("code") or report.get("code") or {},
        fingerprint=str((made.get("dataset") or report).get("fingerprint") or ""),
        reconstructions=reconstructions(tested or run),
    )


def _made(run: Path) -> dict[str, Any]:
    """Read what a run says of its code and its data; empty where it says nothing."""
    try:
        made = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return made if isinstance(made, dict) else {}


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk a config's values by their dotted keys, without those that say where and when."""
    for key, value in node.items():
        if prefix or key not in ASIDE:
            if isinstance(value, dict) and value:
                yield from _flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value


def _minutes(run: Path) -> float | None:
    """How long a run took: a sweep's job says so; of others, from its config to its last log."""
    try:
        return float(json.loads((run / "job.json").read_text(encoding="utf-8"))["minutes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    begun, last = run / "config.yaml", run / "metrics.csv"
    if not (begun.is_file() and last.is_file()):
        return None
    minutes = (last.stat().st_mtime - begun.stat().st_mtime) / 60
    return minutes if minutes > 0 else None


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
    pictures = reconstructions(run_dir)
    text = report_page(report, predictions, curves, text, open_path, pictures)
    page.write_text(text, encoding="utf-8")
    return page


def reconstructions(run_dir: Path) -> bytes | None:
    """Read the picture of what a masked autoencoder made, of the test or else of the last validation."""
    for stage in ("test", "val"):
        path = run_dir / f"reconstructions_{stage}.png"
        if path.is_file():
            return path.read_bytes()
    return None


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
