"""Sweeps, `vidtrain VERB -m key=a,b`: a job that fails costs only itself, and a table ends it all.

Each job leaves a `job.json` in its folder; the table is made of these, so that it is the same for
jobs in this process, in others (joblib) and on other machines (submitit).
"""

from __future__ import annotations

import contextlib
import csv
import gc
import importlib.util
import io
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from vidtrain.types import UserError

# What Lightning sets when it starts other ranks, and takes for a cluster's words in the next job.
RANK_WORDS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STOPS = (130, 143)  # exit codes after Ctrl-C and SIGTERM: these end the sweep
# The first of them that a test wrote is shown.
TESTED = ("test/top1", "test/mAP", "test/hit1", "test/loss")


def is_job() -> bool:
    """Tell whether this is one job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def folder() -> Path | None:
    """Where the sweep lies that this job is of; None outside one."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().sweep.dir).resolve() if is_job() else None


def attempt(work: Callable[[], Any], cfg: DictConfig) -> float | None:
    """Do one job of a sweep; whatever goes wrong in it is written down, and the next one runs.

    Returns:
        The job's score for Hydra's sweeper: after a failure, and where it is not finite, the worst
        there is. None for a job that has no score.

    Raises:
        SystemExit: the job was told to stop (Ctrl-C, SIGTERM), which ends the sweep.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra: Any = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    # Lightning has the other ranks of this job write where a single run would.
    with read_write(hydra.run), open_dict(hydra.run):
        hydra.run.dir = str(run_dir)
    record = {
        "job": hydra.job.num,
        "overrides": list(hydra.overrides.task),
        "status": "running",  # what a job is for good whose process is killed
        "error": "",
        "metric": metric(cfg),
        "score": None,
        "minutes": 0.0,
    }
    _tell(run_dir, record)
    began = time.time()
    status, error, value = "done", "", None
    with alone():
        try:
            value = work()
            if isinstance(value, int) and value:  # an exit code, where a score is a float
                status = "stopped" if value in STOPS else "failed"
                error = f"exit code {value}"
        except UserError as mistake:
            status, error = "failed", one_line(mistake)
        except KeyboardInterrupt:
            status, value = "stopped", STOPS[0]
        except Exception as bug:
            traceback.print_exc()
            status, error = "failed", f"{type(bug).__name__}: {one_line(bug)}"
    score = value if isinstance(value, float) else None
    finite = score is not None and math.isfinite(score)
    minutes = round((time.time() - began) / 60, 2)
    record |= {"status": status, "error": error, "minutes": minutes}
    record["score"] = score if finite else None
    _tell(run_dir, record)
    write_table(Path(hydra.sweep.dir))
    if status == "stopped":
        sys.exit(value)
    bad = status == "failed" or (score is not None and not finite)
    return worst(hydra.sweeper) if bad else score


def _tell(run_dir: Path, record: dict[str, Any]) -> None:
    """Write down how a job stands, and say so where it failed."""
    if not _first_rank():
        return
    if record["status"] == "failed":
        say = f"job {record['job']} failed: {record['error']} ({run_dir})"
        print(say, file=sys.stderr, flush=True)
    write(run_dir / "job.json", json.dumps(record, indent=2) + "\n")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep what a job of several ranks leaves behind from the next one in the same process."""
    main: Any = sys.modules["__main__"]
    before = {word: os.environ.get(word) for word in RANK_WORDS}
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # a launcher's own program, which Lightning would start as another rank
        main.__spec__ = importlib.util.find_spec("vidtrain.__main__")
    try:
        yield
    finally:
        main.__spec__ = spec
        _end_ranks()
        for word, value in before.items():
            os.environ.pop(word, None)
            if value is not None:
                os.environ[word] = value


def _end_ranks() -> None:
    """Leave the process group and free the device; ranks that still run after a failure are ended."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":  # Lightning's: it would end this process too
            ranks, thread._child_processes = getattr(thread, "_child_processes", []), []  # type: ignore[attr-defined]
            for rank in ranks:
                with contextlib.suppress(Exception):
                    rank.wait(timeout=10)
                rank.kill()
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        with contextlib.suppress(Exception):  # of a group whose other half is gone
            torch.distributed.destroy_process_group()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _first_rank() -> bool:
    """Tell whether this process speaks for its job: under Slurm each rank is a task of its own."""
    return int(os.environ.get("SLURM_PROCID") or os.environ.get("RANK") or 0) == 0


def metric(cfg: DictConfig) -> str:
    """Name what the best epoch is chosen by: `val/top1`, or what the config says."""
    monitor = str(OmegaConf.select(cfg, "callbacks.checkpoint.monitor", default="auto"))
    if monitor != "auto":
        return monitor
    if str(OmegaConf.select(cfg, "task._target_")).endswith("MaskedPretraining"):
        return "val/loss"
    many = OmegaConf.select(cfg, "data.multi_label", default=False)
    return "val/mAP" if many else "val/top1"


def worst(sweeper: Any) -> float:
    """Give the score of a failed job: the lowest, or the highest for a sweeper that minimises."""
    direction = OmegaConf.select(sweeper, "direction", default=None)
    return math.inf if "minimize" in str(direction).lower() else -math.inf


def one_line(error: BaseException) -> str:
    """Put an error into one line, without the traceback of a worker that it came from."""
    text = str(error).split("vidtrain.types.UserError: ")[-1]
    return " ".join(text.split())


def read(folder: Path) -> list[dict[str, Any]]:
    """Read what the jobs of a sweep left, the best first, those without a score last."""
    jobs = []
    for path in sorted(folder.glob("**/job.json")):
        with contextlib.suppress(ValueError, OSError):
            job = json.loads(path.read_text(encoding="utf-8"))
            jobs.append({**job, "folder": str(path.parent), "test": _tested(path.parent)})

    def rank(job: dict[str, Any]) -> tuple[bool, float, int]:
        score = job["score"]
        lower = "loss" in job["metric"]
        return score is None, 0.0 if score is None else score if lower else -score, job["job"]

    return sorted(jobs, key=rank)


def _tested(run_dir: Path) -> dict[str, float]:
    """Give a job's test scores; empty where nothing was tested."""
    try:
        scores = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))["metrics"]
        return {str(name): float(value) for name, value in scores.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def table(jobs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Lay out the jobs: heads and rows. Of the settings only those in which the jobs differ."""
    given = [
        dict(word.lstrip("+").partition("=")[::2] for word in job["overrides"]) for job in jobs
    ]
    every = dict.fromkeys(key for words in given for key in words)
    keys = [key for key in every if len({words.get(key) for words in given}) > 1]
    metrics = list(dict.fromkeys(job["metric"] for job in jobs if job["score"] is not None))
    tested = next((name for name in TESTED if any(name in job["test"] for job in jobs)), None)
    heads = ["job", *keys, *metrics, *([tested] if tested else []), "minutes", "status", "folder"]
    rows = []
    for job, words in zip(jobs, given, strict=True):
        scores = [job["score"] if job["metric"] == name else None for name in metrics]
        test = [job["test"].get(tested)] if tested else []
        values = [words.get(key, "") for key in keys]
        end = [job["minutes"], job["status"], job["folder"]]
        rows.append([job["job"], *values, *scores, *test, *end])
    return heads, rows


def write_table(folder: Path) -> list[dict[str, Any]]:
    """Write `sweep.csv` and `sweep.json` into a sweep's folder; gives back its jobs."""
    jobs = read(folder)
    heads, rows = table(jobs)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*heads, "error"])
    writer.writerows([*row, job["error"]] for row, job in zip(rows, jobs, strict=True))
    write(folder / "sweep.csv", text.getvalue())
    write(folder / "sweep.json", json.dumps(jobs, indent=2) + "\n")
    return jobs


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all; jobs of one sweep may do so at once."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
    part.replace(path)


class Table(Callback):
    """Hydra's callback (conf/hydra/default.yaml): the table of jobs at the end of a sweep."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Forget an older sweep in the same folder; say when a search goes the wrong way."""
        for path in Path(config.hydra.sweep.dir).glob("**/job.json"):
            path.unlink()
        direction = str(OmegaConf.select(config.hydra.sweeper, "direction", default="")).lower()
        name, lower = metric(config), "loss" in metric(config)
        if ("maximize" if lower else "minimize") in direction:
            does, other = ("maximises", "minimize") if lower else ("minimises", "maximize")
            print(
                f"note: the sweeper {does} {name}; hydra.sweeper.direction={other} looks for the"
                f" {'lowest' if lower else 'highest'}",
                file=sys.stderr,
            )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and print the table.

        Raises:
            SystemExit: 1, a job failed.
        """
        folder = Path(config.hydra.sweep.dir)
        jobs = write_table(folder)
        print_table(folder, jobs)
        if any(job["status"] != "done" for job in jobs):
            sys.exit(1)


def print_table(folder: Path, jobs: Sequence[dict[str, Any]]) -> None:
    """Print the jobs, and a line for each that failed."""
    from rich.console import Console
    from rich.table import Table as Lines
    from rich.text import Text

    console = Console()
    heads, rows = table(jobs)
    heads = heads[:-1]  # the folders, which begin with the job's number, stand in the files
    lines = Lines()
    for head in heads:
        lines.add_column(head, overflow="fold")
    for row in rows:
        cells = []
        for head, value in zip(heads, row[:-1], strict=True):
            if value is None:
                text = ""
            elif head.startswith(("val/", "test/")) and "loss" not in head:
                text = f"{100 * value:.2f} %"
            else:
                text = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells.append(Text(text, style="red" if text == "failed" else ""))
        lines.add_row(*cells)
    console.print(lines)
    failed = [job for job in jobs if job["status"] == "failed"]
    for job in failed:
        say = f"job {job['job']} failed: {job['error']}"
        console.print(say, style="red", markup=False, highlight=False, soft_wrap=True)
    which = f"; {len(failed)} of {len(jobs)} jobs failed" if failed else ""
    console.print(f"sweep {folder / 'sweep.csv'}{which}", highlight=False, soft_wrap=True)
