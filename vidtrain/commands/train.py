"""`vidtrain train`: build, fit, and with `test=true` score the best checkpoint."""

from __future__ import annotations

import logging
import shlex
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from vidtrain import build, checkpoint, config
from vidtrain.callbacks.checkpoint import Checkpoint, Stopped
from vidtrain.commands.test import run_test
from vidtrain.data.manifest import is_url
from vidtrain.loggers import closing
from vidtrain.types import UserError
from vidtrain.weights.load import fill

# Keys in which a run that is gone on with may differ from the one that stopped.
FREE_KEYS = ("resume", "test", "split", "logger", "callbacks", "paths", "debug")
# And those without which its state would not fit.
PART_KEYS = ("model", "clip", "task", "freeze")


def main(cfg: DictConfig) -> float | int | None:
    """Train. Returns the best validation score (a sweep maximises it), or an exit code above 0."""
    quieten()
    began = time.time()
    first = rank_zero_only.rank == 0
    console = Console(quiet=not first)
    run_dir = config.output_dir()
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    start = None if cfg.ckpt is None else checkpoint.find(cfg.ckpt)
    build.check_optim(cfg)
    weights = build.weights(cfg, start or run_to_go_on(cfg), partial(tell_line, console))
    with open_dict(cfg):  # so that the checkpoint can be tested from any folder
        if not is_url(cfg.data.root):
            cfg.data.root = str(Path(cfg.data.root).expanduser().absolute())
    data = build.data(cfg)
    if cfg.data.num_classes is None:  # the one thing that only the data can tell
        with open_dict(cfg):
            cfg.data.num_classes = len(data.label_names)
    tell(console, data)
    data.labelled("train")
    if cfg.test:
        data.test_split = data.labelled(cfg.split)

    network: Any = build.model(cfg)
    data.feed(network.inputs)
    task = build.task(cfg, network)
    name = config.choices().get("model", cfg.model._target_)
    task.description = checkpoint.describe(
        cfg, name, data.label_names, data.manifest.fingerprint, command()
    )
    if task.frozen or cfg.get("freeze"):
        tell_line(console, frozen_line(task))
    resume_from = find_run(cfg, run_dir, console)
    if resume_from is None:
        for part in weights:
            tell_line(console, fill(network, part, data.label_names))
    weights.clear()  # a whole network's tensors
    if resume_from is not None:
        made, run_dir = run_dir, resume_from.parent.parent
        if made != run_dir and made.is_dir() and not any(made.iterdir()):
            made.rmdir()
    run_dir.mkdir(parents=True, exist_ok=True)
    if first:
        OmegaConf.save(OmegaConf.create(config.resolved(cfg)), run_dir / "config.yaml")
    console.print(f"run [bold]{run_dir}[/bold]", highlight=False)

    callbacks = build.callbacks(cfg, run_dir)
    saver = next((c for c in callbacks if isinstance(c, Checkpoint)), None)
    with closing(build.loggers(cfg, run_dir)) as loggers:
        trainer = build.trainer(cfg, run_dir, callbacks, loggers)
        tell_line(console, build.scale_rate(cfg, task, data, trainer))
        try:
            trainer.fit(task, datamodule=data, ckpt_path=resume_from, weights_only=True)
        except Stopped as stop:
            words = [word for word in command().split() if not word.startswith("resume=")]
            again = " ".join([*words, f"resume={shlex.quote(str(run_dir))}"])
            console.print(f"{stop}; go on with", highlight=False)
            console.print(again, highlight=False, markup=False, soft_wrap=True)
            return stop.code
        console.print(f"trained in {time.time() - began:.0f} s", highlight=False)
        best = Path(saver.best_model_path) if saver and saver.best_model_path else None
        if cfg.test:
            if best is not None:
                task.load_state_dict(checkpoint.load(best)["state_dict"])
            run_test(data, task, trainer, run_dir, best, console)
    score = saver.best_model_score if saver is not None else None
    return float(score) if score is not None else None


def quieten() -> None:
    """Silence Lightning's advice on matters that vidtrain has decided."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # frozen
    warnings.filterwarnings(
        "ignore", ".*your dataloader is not resumable.*"
    )  # ours resumes exactly
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists.*")
    warnings.filterwarnings("ignore", ".*returned an empty.*|.*Total length of.*zero.*")
    warnings.filterwarnings("ignore", ".*It is recommended to use `self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec.*|.*LeafSpec.*")


def command() -> str:
    """Give the command line of this job, as one could type it again."""
    words = config.task_overrides() or sys.argv[1:]
    return " ".join(["vidtrain", "train", *map(shlex.quote, words)])


def tell(console: Console, data: Any) -> None:
    """Say in a line or two what there is to learn from."""
    splits = ", ".join(f"{count} {name}" for name, count in data.manifest.splits.items())
    console.print(f"{data.name}: {len(data.label_names)} classes; {splits}", highlight=False)
    for note in data.manifest.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    if not data.has_split("val"):
        console.print(
            "note: no validation videos, so the last epoch counts as the best"
            " (data.val_fraction=0.1 takes some from training)",
            style="yellow",
            highlight=False,
        )


def tell_line(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def frozen_line(task: Any) -> str:
    """Count what `freeze` took out of training."""
    parameters = list(task.model.parameters())
    still = sum(p.numel() for p in parameters if not p.requires_grad)
    every = sum(p.numel() for p in parameters)
    what = ", ".join(task.frozen) or "single parameters"
    return f"frozen: {what}: {still:,} of {every:,} parameters"


def run_to_go_on(cfg: DictConfig) -> Path | None:
    """Turn `resume=` a run or a checkpoint into the checkpoint.

    Raises:
        UserError: there is none.
    """
    if cfg.resume is None or cfg.resume == "auto":
        return None
    path = Path(cfg.resume).expanduser().absolute()  # Lightning compares folders as text
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"resume={cfg.resume}: there is no {path}; name a run's folder")
    return path


def find_run(cfg: DictConfig, run_dir: Path, console: Console) -> Path | None:
    """Find the checkpoint to go on from: `resume=auto` takes the newest unfinished run like this.

    Raises:
        UserError: `resume` names something without a `last.ckpt`.
    """
    if cfg.resume is None:
        return None
    if (path := run_to_go_on(cfg)) is not None:
        check_same(cfg, path)
        return path
    here = config.resolved(cfg)
    runs = sorted(run_dir.parent.glob("*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
    for path in reversed(runs):
        saved = path.parent.parent / "config.yaml"
        if not saved.is_file() or differences(OmegaConf.load(saved), here):
            continue
        if finished(path, cfg):
            continue
        console.print(f"going on with {path.parent.parent}", highlight=False)
        return path
    console.print("resume=auto: no unfinished run like this one; starting anew", highlight=False)
    return None


def differences(saved: Any, here: dict[str, Any]) -> list[str]:
    """List the top-level parts in which two configs differ, apart from FREE_KEYS."""
    before = OmegaConf.to_container(saved) if not isinstance(saved, dict) else saved
    keys = (set(before) | set(here)) - set(FREE_KEYS)
    return sorted(key for key in keys if before.get(key) != here.get(key))


def check_same(cfg: DictConfig, path: Path) -> None:
    """Refuse to go on with another model or data than the run had."""
    saved = checkpoint.load(path)["vidtrain"]["config"]
    wrong = [k for k in differences(saved, config.resolved(cfg)) if k in PART_KEYS]
    if wrong:
        raise UserError(
            f"resume={cfg.resume}: that run had another {' and '.join(wrong)};"
            " give the same settings, or ckpt= to start anew from its weights"
        )


def finished(path: Path, cfg: DictConfig) -> bool:
    """Say whether a run has done all its epochs or steps."""
    try:
        saved = checkpoint.load(path)
    except UserError:
        return True  # torn: nothing to go on from
    epochs, steps = cfg.trainer.max_epochs, cfg.trainer.max_steps
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = saved["epoch"] + (1 if progress["is_last_batch"] else 0)
    enough_steps = steps is not None and 0 < steps <= saved["global_step"]
    return bool((epochs is not None and 0 < epochs <= done) or enough_steps)
