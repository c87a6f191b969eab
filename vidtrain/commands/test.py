"""`vidtrain test`: score a checkpoint over many views of each video, and write the report."""

from __future__ import annotations

import csv
import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from vidtrain import __version__, build, checkpoint, config, provenance
from vidtrain.loggers import closing
from vidtrain.types import Failure, UserError, VideoReader


def main(cfg: DictConfig) -> int | None:
    """Score `ckpt` on `split`; what the command line says goes over the checkpoint's config."""
    from vidtrain.commands.train import quieten

    quieten()
    console = Console(quiet=rank_zero_only.rank != 0)
    path = checkpoint.find(cfg.ckpt)
    saved = checkpoint.load(path)
    overrides = config.task_overrides()
    for word in overrides:
        group = word.partition("=")[0].lstrip("+~").partition(".")[0]
        if group in ("model", "task", "experiment"):
            raise UserError(f"{group}= cannot be changed in a test: it comes out of the checkpoint")
    given = [word for word in overrides if word.partition("=")[0] not in OF_TEST]
    merged = config.overlay(checkpoint.config_of(saved), cfg, given)
    score(cfg, merged, saved, path, output_folder(cfg, path, "test"), console)
    return None


def score(
    cfg: DictConfig,
    merged: DictConfig,
    saved: dict[str, Any],
    path: Path,
    run_dir: Path,
    console: Console,
) -> dict[str, Any]:
    """Build a checkpoint's network, score `cfg.split` with it and write the report.

    Args:
        cfg: this command's config: trainer, callbacks, loggers, split, allow.
        merged: the checkpoint's config with what is changed for this test: data, clip, views.
        saved: the checkpoint.
        path: its file.
        run_dir: where the report goes.
        console: what is said.

    Returns:
        What `report.json` holds.
    """
    merged = checkpoint.plain(merged, path)
    L.seed_everything(merged.seed, workers=True, verbose=False)
    task = checkpoint.build_task(saved, path, cfg.allow)
    task.views_per_forward = merged.views.per_forward
    ours = list(
        build.targets(config.resolved(cfg)["data"])
    )  # the user's own files may name anything
    build.check_targets(merged.data, str(path), [*cfg.allow, *ours])
    data = build.data(merged)
    data.feed(task.model.inputs)
    data.test_split = data.split_of(cfg.split)
    if task.uses_labels:
        compare_labels(saved["vidtrain"]["label_names"], data.label_names, path)
    compare_data(saved["vidtrain"], data, console)
    build.check_shapes(task.model, data.shapes(training=False, testing=True))

    run_dir.mkdir(parents=True, exist_ok=True)
    seen = {k: v for k, v in config.resolved(merged).items() if k not in OF_COMMAND}
    facts = {**seen, "code": provenance.code(), "dataset": provenance.dataset(data)}
    with closing(build.loggers(cfg, run_dir, facts)) as loggers:
        trainer = build.trainer(cfg, run_dir, build.callbacks(cfg, run_dir), loggers)
        return run_test(data, task, trainer, run_dir, path, console)


OF_TEST = ("ckpt", "split", "output", "allow", "test", "resume")
# What a test has of its own; all other parts of its config come out of the checkpoint.
OF_COMMAND = (*OF_TEST, "trainer", "callbacks", "logger", "paths")


def output_folder(cfg: DictConfig, path: Path, verb: str) -> Path:
    """Choose where the report goes: `output`, else a new folder in the checkpoint's run."""
    if cfg.output:
        return Path(cfg.output).expanduser()
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return run / f"{verb}-{cfg.split}-{time.strftime('%Y-%m-%d_%H-%M-%S')}"


def compare_labels(trained: list[str], tested: list[str], path: Path) -> None:
    """Refuse to score class numbers that mean something else.

    Raises:
        UserError: naming the first class that differs.
    """
    for number, (ours, theirs) in enumerate(zip(trained, tested, strict=False)):
        if ours != theirs:
            raise UserError(
                f"class {number} is '{ours}' in {path} but '{theirs}' in the data:"
                " a score would compare different things"
            )
    if len(trained) < len(tested):
        raise UserError(f"the data has {len(tested)} classes, {path} was trained on {len(trained)}")


def compare_data(trained: dict[str, Any], data: Any, console: Console) -> None:
    """Warn when a dataset of the same name and place has changed since training.

    A video that has moved from training to test makes the score worth nothing.
    """
    same = trained["config"]["data"]["root"] == str(data.root)
    if same and trained["fingerprint"] != data.manifest.fingerprint:
        console.print(
            "note: the rows under this root are not those that the checkpoint was trained on"
            " (files came, went or changed their split): some of these videos may be training videos",
            style="yellow",
            highlight=False,
        )


class Predictions(L.Callback):
    """Collect what a test says of each video, and which it could not read."""

    def __init__(self) -> None:
        self.scores: dict[int, torch.Tensor] = {}  # row of the split -> (K,)
        self.failures: list[Failure] = []
        self.rates: list[float] = []  # frames per second, as the model saw them

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch."""
        self.failures += batch["failures"]
        self.rates += batch["fps"]
        if outputs:
            for index, scores in zip(batch["index"].tolist(), outputs["scores"].cpu(), strict=True):
                self.scores[index] = scores

    def gather(self, world: int) -> None:
        """Bring all ranks' videos together."""
        if world > 1:
            parts: list[Any] = [None] * world
            torch.distributed.all_gather_object(parts, (self.scores, self.failures, self.rates))
            self.scores = {k: v for scores, _, _ in parts for k, v in scores.items()}
            self.failures = [failure for _, failures, _ in parts for failure in failures]
            self.rates = [rate for _, _, rates in parts for rate in rates]


def run_test(
    data: Any,
    task: Any,
    trainer: L.Trainer,
    run_dir: Path,
    ckpt: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Score `data.test_split`, write report.json, predictions.csv and report.html into `run_dir`.

    Raises:
        UserError: not one video could be scored.
    """
    from vidtrain.commands.report import write_report

    began = time.time()
    predictions = Predictions()
    trainer.callbacks = [*trainer.callbacks, predictions]  # type: ignore[attr-defined]
    results = trainer.test(task, datamodule=data, verbose=False)
    predictions.gather(trainer.world_size)
    rows = data.dataset(data.test_split, test_views=True).rows
    names = task.description["label_names"]
    if not predictions.scores:
        first = predictions.failures[0] if predictions.failures else None
        why = f" ({first.path}: {first.reason})" if first else ""
        raise UserError(f"none of the {len(rows)} videos of '{data.test_split}' can be scored{why}")
    metrics = {key: float(value) for key, value in results[0].items() if key.startswith("test/")}
    report: dict[str, Any] = {
        "vidtrain": __version__,
        "verb": "test",
        "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": task.description.get("command", ""),
        "code": task.description.get("code"),  # that it was trained with
        "model": task.description["model"],
        "data": data.name,
        "split": data.test_split,
        "ckpt": str(ckpt) if ckpt else None,
        "params": sum(p.numel() for p in task.model.parameters()),
        "metrics": metrics,
        "protocol": protocol(data, predictions.rates),
        "videos": {
            "asked": len(rows),
            "scored": len(predictions.scores),
            "failed": [{"path": f.path, "reason": f.reason} for f in predictions.failures],
        },
        "label_names": names,
        "multi_label": data.multi_label and task.uses_labels,
        "fingerprint": data.manifest.fingerprint,
        "data_root": data.manifest.root,
        "seconds": round(time.time() - began, 1),
    }
    if data.multi_label and task.uses_labels:
        report["class_ap"] = class_ap(predictions.scores, rows, names)
    if trainer.is_global_zero:
        if task.uses_labels:
            write_predictions(run_dir / "predictions.csv", rows, predictions.scores, names)
        else:
            write_losses(run_dir / "losses.csv", rows, predictions.scores)
        write_json(run_dir / "report.json", report)
        by_path = {(row := rows.row(index)).path: row for index in predictions.scores}

        def open_path(path: str) -> AbstractContextManager[VideoReader]:
            return data.sources.open(rows.location(by_path[path]), by_path[path])

        page = write_report(run_dir, open_path if data.manifest.is_packed else None)
        print_report(console, report)
        console.print(f"report {page}", highlight=False, soft_wrap=True)
    return report


def protocol(data: Any, rates: list[float]) -> dict[str, Any]:
    """State how a video was looked at; `fps` is what the model saw, [lowest, highest] of the videos."""
    (clip, how), views = data.as_tested(), data.views
    low, high = round(min(rates), 2), round(max(rates), 2)
    size = None if data.has_features else views["size"] or clip.size
    return {
        "contents": data.contents,
        "frames": clip.num_frames,
        "stride": clip.stride,
        "sampling": how,
        "clips": views["clips"],
        "crops": views["crops"],
        "size": size,
        "short_side": size and (views["short_side"] or size),
        "region": data.region,
        "span": data.span,
        "fps": low if low == high else [low, high],
    }


def class_ap(scores: dict[int, torch.Tensor], rows: Any, names: list[str]) -> dict[str, Any]:
    """Give each class's average precision; None where no scored video has it."""
    from vidtrain.metrics.mean_ap import MeanAveragePrecision

    metric = MeanAveragePrecision()
    for index, values in scores.items():
        target = torch.zeros(1, len(names))
        target[0, list(rows.row(index).labels)] = 1
        metric.update(values[None, : len(names)], target)
    values = metric.per_class().tolist()
    return {n: None if v != v else round(v, 6) for n, v in zip(names, values, strict=True)}


def write_predictions(
    path: Path, rows: Any, scores: dict[int, torch.Tensor], names: list[str], best: int = 5
) -> None:
    """Write one row per scored video: its label and the best labels with their scores."""
    best = min(best, len(names))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heads = [head for k in range(1, best + 1) for head in (f"top{k}", f"top{k}_score")]
        writer.writerow(["path", "label", *heads])
        for index in sorted(scores):
            row = rows.row(index)
            values, places = scores[index].float().topk(best)
            cells: list[str] = []
            for value, place in zip(values.tolist(), places.tolist(), strict=True):
                cells += [names[place], f"{value:.6f}"]
            label = "|".join(names[number] for number in row.labels)
            writer.writerow([row.path, label, *cells])


def write_losses(path: Path, rows: Any, scores: dict[int, torch.Tensor]) -> None:
    """Write one row per scored video of a task without labels: its loss, the highest first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "loss"])
        for index in sorted(scores, key=lambda index: (-scores[index].item(), index)):
            writer.writerow([rows.row(index).path, f"{scores[index].item():.6f}"])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Print the scores with what they rest on."""
    shape, videos = report["protocol"], report["videos"]
    is_video = shape["contents"] == "videos"
    is_spread = shape["sampling"] == "segments"
    apart = "over the whole video" if is_spread else f"x {shape['stride']}"
    console.print(
        f"{report['model']} on {report['data']}, {report['split']} split: {shape['frames']}"
        f" {'frames' if is_video else 'features'} {apart}, {shape['clips']} clips"
        + (f" x {shape['crops']} crops of {shape['size']}" if is_video else ""),
        highlight=False,
    )
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in report["metrics"].items():
        table.add_row(name, f"{value:.4f}" if name.endswith("loss") else f"{100 * value:.2f} %")
    console.print(table)
    console.print(f"on {videos['scored']} of {videos['asked']} videos", highlight=False)
    failed = videos["failed"]
    left_out = videos["asked"] - videos["scored"] - len(failed)
    if left_out:
        console.print(f"{left_out} left out by trainer.limit_test_batches", style="bold yellow")
    if failed:
        console.print(f"{len(failed)} cannot be read:", style="bold yellow", highlight=False)
    for failure in failed[:5]:
        console.print(f"  {failure['path']}: {failure['reason']}", markup=False, highlight=False)
    if len(failed) > 5:
        console.print(f"  and {len(failed) - 5} more, in report.json")
