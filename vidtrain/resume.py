"""Which run goes on: the one that `resume` names, or the newest unfinished one like this.

A run's `last.ckpt` that cannot be read is passed over for its `previous.ckpt`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vidtrain import checkpoint, config
from vidtrain.types import UserError

# Keys in which a run that is gone on with may differ from the one that stopped.
FREE_KEYS = ("resume", "test", "split", "logger", "callbacks", "paths", "debug", "profile")
# And those without which its state would not fit.
PART_KEYS = ("model", "clip", "task", "freeze", "multigrid")
OPTIM_KEYS = ("_target_", "groups", "layer_decay")
STATES = ("last.ckpt", "previous.ckpt")

Say = Callable[[str], Any]


def named(cfg: DictConfig, say: Say) -> Path | None:
    """Turn `resume=` a run or a checkpoint into the checkpoint.

    Args:
        cfg: of this run.
        say: told in a line which state is taken where the last one cannot be read.

    Raises:
        UserError: there is none, or none that can be read.
    """
    if cfg.resume is None or cfg.resume == "auto":
        return None
    path = Path(cfg.resume).expanduser().absolute()  # Lightning compares folders as text
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"resume={cfg.resume}: there is no {path}; name a run's folder")
        return path
    found = newest(path, say)
    if found is None:
        last = path / "checkpoints" / STATES[0]
        what = "cannot be gone on with" if last.is_file() else f"there is no {last}"
        raise UserError(f"resume={cfg.resume}: {what}; name a run's folder")
    return found[0]


def newest(run: Path, say: Say) -> tuple[Path, dict[str, Any]] | None:
    """Read a run's last state that can be read, and say where it lies; None where there is none."""
    refused = ""
    for name in STATES:
        path = run / "checkpoints" / name
        if not path.is_file():
            continue
        try:
            saved = checkpoint.load(path)
        except UserError as error:
            refused = str(error)
            continue
        if refused:
            say(f"{refused}; taking {name}, the state after step {saved['global_step']}")
        return path, saved
    if refused:
        say(refused)
    return None


def find(
    cfg: DictConfig, path: Path | None, run_dir: Path, description: dict[str, Any], say: Say
) -> Path | None:
    """Find the checkpoint to go on from: `resume=auto` takes the newest unfinished run like this.

    A job that Slurm has queued again goes on without being told to.

    Args:
        cfg: of this run.
        path: what `resume` names, if it does.
        run_dir: of this run, beside which others are looked for.
        description: what this run's checkpoints say of themselves.
        say: told in a line what was found.

    Raises:
        UserError: the run that `resume` names had another model, or other classes.
    """
    if path is not None:
        check_same(cfg, path, checkpoint.load(path), description, say)
        return path
    job = description["job"] if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else None
    if cfg.resume is None and job is None:
        return None
    here = config.resolved(cfg)
    for run, of_sweep in runs(run_dir):
        saved = run / "config.yaml"
        if not saved.is_file() or differences(OmegaConf.load(saved), here):
            continue
        found = newest(run, say)
        if found is None:
            continue
        state_path, state = found
        if cfg.resume is None and state["vidtrain"].get("job") != job:
            continue
        # A sweep that is started again asks for what a finished job had reached.
        if finished(state, cfg) and not of_sweep:
            continue
        check_same(cfg, state_path, state, description, say)
        say(f"going on with {run}")
        return state_path
    why = "resume=auto" if cfg.resume else f"job {job} was queued again"
    say(f"{why}: no unfinished run like this one; starting anew")
    return None


def runs(run_dir: Path) -> Iterator[tuple[Path, bool]]:
    """Walk the runs beside this one, the newest state first, and whether each is a job of a sweep.

    A sweep's jobs lie in `<date>/<number>-<model>-<data>`: those of all sweeps are looked through.
    """
    job = re.sub(r"^\d+", "", run_dir.name)
    found = {path.parent.parent: False for path in run_dir.parent.glob("*/checkpoints/*.ckpt")}
    jobs = run_dir.parent.parent.glob(f"*/*{glob_escape(job)}/checkpoints/*.ckpt")
    found |= {path.parent.parent: True for path in jobs if re.match(r"\d+-[^\d]", run_dir.name)}

    def when(run: Path) -> float:
        states = [run / "checkpoints" / name for name in STATES]
        return max((path.stat().st_mtime for path in states if path.is_file()), default=0.0)

    for run in sorted(found, key=when, reverse=True):
        yield run, found[run]


def glob_escape(text: str) -> str:
    """Write a name so that a pattern means just it."""
    return re.sub(r"([*?[])", r"[\1]", text)


def differences(saved: Any, here: dict[str, Any]) -> list[str]:
    """List the top-level parts in which two configs differ, apart from FREE_KEYS."""
    before = OmegaConf.to_container(saved) if not isinstance(saved, dict) else saved
    before, here = as_asked(before), as_asked(here)
    keys = (set(before) | set(here)) - set(FREE_KEYS)
    return sorted(key for key in keys if before.get(key) != here.get(key))


def as_asked(values: dict[str, Any]) -> dict[str, Any]:
    """Put `auto` back where a run has written what it measured, and named it in `measured`."""
    asked = {key: value for key, value in values.items() if key != "measured"}
    for key in values.get("measured", []):
        group, name = key.split(".")
        asked[group] = {**asked[group], name: "auto"}
    return asked


def check_same(
    cfg: DictConfig, path: Path, state: dict[str, Any], description: dict[str, Any], say: Say
) -> None:
    """Refuse to go on with another model or data than the run had.

    Raises:
        UserError: naming what differs.
    """
    saved = state["vidtrain"]
    run = path.parent.parent
    before, now = saved["label_names"], description["label_names"]
    if before != now:
        first = next(((a, b) for a, b in zip(before, now, strict=False) if a != b), None)
        what = (
            f"has {len(before)} classes, the data {len(now)}"
            if len(before) != len(now) or first is None
            else f"has the class '{first[0]}' where the data have '{first[1]}'"
        )
        raise UserError(
            f"resume={run}: that run {what}; give it its own data, or ckpt= to start anew from its"
            " weights"
        )
    wrong = [k for k in differences(saved["config"], config.resolved(cfg)) if k in PART_KEYS]
    if wrong:
        raise UserError(
            f"resume={run}: that run had another {' and '.join(wrong)};"
            " give the same settings, or ckpt= to start anew from its weights"
        )
    optim = dict(saved["config"].get("optim") or {}), config.resolved(cfg)["optim"]
    wrong = [key for key in OPTIM_KEYS if optim[0].get(key) != optim[1].get(key)]
    if sum(one.get("schedule") == "one_cycle" for one in optim) == 1:
        wrong.append("schedule")
    if wrong:
        raise UserError(
            f"resume={run}: that run had another {' and '.join(f'optim.{key}' for key in wrong)}, into which"
            " its optimizer's state does not fit; give the same, or ckpt= to start anew from its weights"
        )
    sizes = saved["config"]["data"].get("batch_size"), cfg.data.batch_size
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if sizes[0] != sizes[1] and sizes[1] != "auto" and not progress["is_last_batch"]:
        say(
            f"note: {run} stopped in an epoch of batches of {sizes[0]} videos: with {sizes[1]}, some of that"
            " epoch's videos are seen twice, or not at all"
        )
    if saved["fingerprint"] != description["fingerprint"]:
        say(f"note: the data are not those that {run} began with, so it ends otherwise")


def finished(state: dict[str, Any], cfg: DictConfig) -> bool:
    """Say whether a run has done all its epochs or steps."""
    epochs, steps = cfg.trainer.max_epochs, cfg.trainer.max_steps
    progress = state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    validated = state["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    whole = progress["is_last_batch"] and validated["ready"] == validated["completed"]
    done = state["epoch"] + (1 if whole else 0)
    enough_steps = steps is not None and 0 < steps <= state["global_step"]
    return bool((epochs is not None and 0 < epochs <= done) or enough_steps)
