"""`vidtrain train`: build, fit, and with `test=true` score the best checkpoint."""

from __future__ import annotations

import logging
import shlex
import sys
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from vidtrain import build, checkpoint, config, parallel, provenance, resume
from vidtrain.callbacks import largest_batch, profile
from vidtrain.callbacks.checkpoint import Checkpoint, Stopped
from vidtrain.callbacks.finite import NotFinite
from vidtrain.callbacks.saving import CannotSave
from vidtrain.commands.test import run_test, write_json
from vidtrain.data.manifest import is_url
from vidtrain.loggers import closing
from vidtrain.types import UserError
from vidtrain.weights.load import fill


def main(cfg: DictConfig) -> float | int | None:
    """Train. Returns the best validation score (a sweep maximises it), or an exit code above 0."""
    quieten()
    began = time.time()
    first = rank_zero_only.rank == 0
    console = Console(quiet=not first)
    run_dir = config.output_dir()
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    if cfg.profile:
        profile.check(cfg)
    start = None if cfg.ckpt is None else checkpoint.find(cfg.ckpt)
    build.check_optim(cfg)
    if cfg.data.batch_size == largest_batch.AUTO and cfg.resume is None:  # which has a number
        largest_batch.check_accelerator(cfg.trainer.accelerator)
    named = resume.named(cfg, partial(tell_line, console))
    weights = build.weights(cfg, start or named, partial(tell_line, console))
    with open_dict(cfg):  # so that the checkpoint can be tested from any folder
        if not is_url(cfg.data.root):
            cfg.data.root = str(Path(cfg.data.root).expanduser().absolute())
    data = build.data(cfg)
    if cfg.data.num_classes is None:  # the one thing that only the data can tell
        with open_dict(cfg):
            cfg.data.num_classes = len(data.label_names)
    tell(console, data)
    network: Any = build.model(cfg)
    data.feed(network.inputs)
    task = build.task(cfg, network)
    data.split_for("train", task.uses_labels)
    if data.balance and not data.manifest.label_counts("train").sum():
        raise UserError(
            "data.balance goes by classes, and these videos have no labels; set it to 0"
        )
    if cfg.test:
        data.test_split = data.split_for(cfg.split, task.uses_labels)
    build.check_shapes(network, data.shapes(training=True, testing=cfg.test))
    name = config.choices().get("model", cfg.model._target_)
    task.description = checkpoint.describe(
        cfg, name, data.label_names, data.manifest.fingerprint, command()
    )
    if task.frozen or cfg.get("freeze"):
        tell_line(console, frozen_line(task))
    # Here, so that a mistake leaves no run behind.
    recomputed = build.checkpointing(cfg, network)
    plan = build.multigrid_plan(cfg, network, data)
    resume_from = resume.find(cfg, named, run_dir, task.description, partial(tell_line, console))
    if resume_from is None:
        for part in weights:
            tell_line(console, fill(network, part, data.label_names))
    elif cfg.data.batch_size == largest_batch.AUTO:  # as before, or it would be another run
        before = checkpoint.load(resume_from)["vidtrain"]["config"]
        take_batch_size(cfg, before["data"]["batch_size"], task, data)
    weights.clear()  # a whole network's tensors
    if resume_from is not None:
        made, run_dir = run_dir, resume_from.parent.parent
        if made != run_dir and made.is_dir() and not any(made.iterdir()):
            made.rmdir()
    callbacks = build.callbacks(cfg, run_dir)
    facts = {key: task.description[key] for key in ("command", "code")}
    facts["dataset"] = provenance.dataset(data)
    if first:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(cfg, run_dir)
        write_json(run_dir / "run.json", facts)
    console.print(f"run [bold]{run_dir}[/bold]", highlight=False)

    if cfg.profile:  # what waits for a score would wait in vain
        callbacks = [c for c in callbacks if getattr(c, "monitor", None) is None]
    saver = next((c for c in callbacks if isinstance(c, Checkpoint)), None)
    with closing(build.loggers(cfg, run_dir, facts)) as loggers:
        trainer = build.trainer(cfg, run_dir, callbacks, loggers)
        for split in ("train", "val", *([data.test_split] if cfg.test else [])):
            if 0 < (count := data.manifest.splits.get(split, 0)) < trainer.world_size:
                raise UserError(
                    f"the '{split}' split of {data.name} has {count} videos for {trainer.world_size}"
                    " devices; each needs one: set trainer.devices"
                )
        if cfg.data.batch_size == largest_batch.AUTO:
            largest_batch.check_accelerator(cfg.trainer.accelerator)

            def settle(size: int) -> None:
                take_batch_size(cfg, size, task, data)
                if first:
                    save_config(cfg, run_dir)
                for logger in loggers:
                    if isinstance(logger, WandbLogger):
                        logger.log_hyperparams({"data": config.resolved(cfg)["data"]})
                tell_line(console, build.scale_rate(cfg, task, data, trainer))

            finder: Any = largest_batch.LargestBatch(settle, partial(tell_line, console))
            trainer.callbacks.append(finder)  # type: ignore[attr-defined]
        else:
            tell_line(console, build.scale_rate(cfg, task, data, trainer))
        if plan is not None:
            tell_line(console, build.multigrid(cfg, plan, task, data, trainer))
        tell_line(console, build.speed_up(cfg, network, trainer, recomputed))
        parallel.prepare(task, trainer)
        if cfg.profile:
            found = profile.run(task, data, trainer, run_dir / "trace.json" if first else None)
            if first:
                profile.show(found, run_dir, console)
            return None
        try:
            trainer.fit(task, datamodule=data, ckpt_path=resume_from, weights_only=True)
        except Stopped as stop:
            tell_line(console, f"{stop}; go on with\n{again(run_dir)}")
            return stop.code
        except Exception as error:
            if saver is not None and saver.kept and not isinstance(error, CannotSave):
                tell_line(
                    console,
                    f"an error ended training; the state after step {saver.kept} is kept; go on with"
                    f"\n{again(run_dir)}",
                )
            if isinstance(error, NotFinite) and not first:
                return 2  # every rank has raised it; the first one says so
            raise
        if not first:
            with suppress(OSError):  # another node began at another second: its folder is empty
                config.output_dir().rmdir()
        console.print(f"trained in {time.time() - began:.0f} s", highlight=False)
        best = Path(saver.best_model_path) if saver and saver.best_model_path else None
        if cfg.test:
            if best is not None:
                parallel.restore(task, checkpoint.load(best)["state_dict"])
            run_test(data, task, trainer, run_dir, best, console)
    score = saver.best_model_score if saver is not None else None
    return float(score) if score is not None else None


def take_batch_size(cfg: DictConfig, size: int, task: Any, data: Any) -> None:
    """Make a number of `data.batch_size=auto`, here and in the checkpoints; `measured` keeps that it was."""
    with open_dict(cfg):
        cfg.data.batch_size, cfg.measured = size, ["data.batch_size"]
    data.batch_size = size
    template = OmegaConf.to_container(cfg, resolve=False)
    task.description |= {"config": config.resolved(cfg), "template": template}


def save_config(cfg: DictConfig, run_dir: Path) -> None:
    """Write `config.yaml`."""
    OmegaConf.save(OmegaConf.create(config.resolved(cfg)), run_dir / "config.yaml")


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


def again(run_dir: Path) -> str:
    """Give the command line with which this run goes on."""
    words = [word for word in command().split() if not word.startswith("resume=")]
    return " ".join([*words, f"resume={shlex.quote(str(run_dir))}"])


def tell(console: Console, data: Any) -> None:
    """Say in a line or two what there is to learn from."""
    splits = ", ".join(f"{count} {name}" for name, count in data.manifest.splits.items())
    known = data.manifest.label_names
    classes = f"{len(data.label_names)} classes" if known else "no labels"
    console.print(f"{data.name}: {classes}; {splits}", highlight=False)
    for note in data.manifest.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    if (note := missing_classes(data)) is not None:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    if not data.has_split("val"):
        console.print(
            "note: no validation videos, so the last epoch counts as the best"
            " (data.val_fraction=0.1 takes some from training)",
            style="yellow",
            highlight=False,
        )


def missing_classes(data: Any) -> str | None:
    """Say which classes nothing is there to learn from; None where there are no such classes."""
    if not data.has_split("train"):
        return None
    counts = data.manifest.label_counts("train")
    names = [
        name for name, count in zip(data.manifest.label_names, counts, strict=True) if not count
    ]
    if not names or len(names) == len(counts):
        return None
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    have = "has" if len(names) == 1 else "have"
    return f"{len(names)} of {len(counts)} classes {have} no training video: {listed}"


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
