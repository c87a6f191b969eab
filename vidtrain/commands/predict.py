"""`vidtrain predict`: name what is in files, a folder or a list of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vidtrain import build, checkpoint, config
from vidtrain.data.collate import collate
from vidtrain.data.dataset import Files, VideoDataset
from vidtrain.data.fields import STORED, Flow
from vidtrain.data.loader import Loader, start_worker
from vidtrain.data.module import check_views, default_workers, tested_clip
from vidtrain.data.order import EvaluationOrder
from vidtrain.data.sources import Sources
from vidtrain.data.transforms.device import DeviceTransform
from vidtrain.tasks.base import VideoTask
from vidtrain.types import Clip, UserError

VIDEO_ENDINGS = {
    *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".3gp", ".ts", ".m2ts", ".mts", ".ogv", ".gif", ".vob", ".mjpeg", ".y4m"),
}
SHOWN = 30  # rows of the table on the terminal; the file has them all


def main(cfg: DictConfig) -> int:
    """Predict every file. Returns 1 when at least one could not be read, else 0."""
    check_number("batch_size", cfg.batch_size, 1)
    check_number("top", cfg.top, 1)
    if cfg.workers != "auto":
        check_number("workers", cfg.workers, 0)
    device = find_device(cfg.device)
    if device.type == "cpu":
        build.share_cores()
    output = output_file(cfg.output)
    path = checkpoint.find(cfg.ckpt)
    saved = checkpoint.load(path)
    overrides = [
        word
        for word in config.task_overrides()
        if word.split("=")[0].split(".")[0] in ("views", "clip")
    ]
    merged = config.overlay(checkpoint.config_of(saved), cfg, overrides)
    merged = checkpoint.plain(merged, path)
    for part in ("views", "clip"):
        build.check_targets(merged[part], str(path), cfg.allow)
    for key in ("short_side", "size", "per_forward"):
        if merged.views[key] is not None:
            check_number(f"views.{key}", merged.views[key], 1)
    check_views(merged.views)
    task = checkpoint.build_task(saved, path, cfg.allow)
    if not task.uses_labels:
        raise UserError(
            f"{path} was pretrained without labels and knows no classes; train a classifier from it first:"
            f" vidtrain train model=NAME ckpt={path}"
        )
    task.views_per_forward = merged.views.per_forward
    task.to(device).eval()
    inputs: tuple[str, ...] = task.model.inputs  # type: ignore[assignment]
    if "features" in inputs:
        raise UserError(
            f"{path} takes features, not videos: `vidtrain extract`, then `vidtrain test data=features`"
        )

    files = find_files(Path(str(cfg.input)).expanduser())
    clip = Clip(**{k: v for k, v in config.resolved(merged)["clip"].items() if k != "_target_"})
    clip = tested_clip(clip, merged.views)
    build.check_shapes(task.model, [(clip.num_frames, merged.views.size or clip.size)])
    facts = config.resolved(merged)["data"]
    dataset = VideoDataset(
        Files(files),
        clip,
        clips=merged.views.clips,
        crops=merged.views.crops,
        short_side=merged.views.short_side,
        size=merged.views.size,
        how=merged.views.get("sampling") or facts["sampling"],
        past_end=facts["past_end"],
        region=facts["region"],
        span=facts["span"],
        sources=Sources(cfg.decoder),
        flow=flow_of(facts) if "flow" in inputs else None,
        inputs=inputs,
        spill=Path(cfg.paths.cache).expanduser() / "spill",
        spill_above=merged.views.memory << 20,
    )
    workers = default_workers() if cfg.workers == "auto" else cfg.workers
    loader = Loader(
        dataset,
        EvaluationOrder(len(dataset), cfg.batch_size, 0, 1),
        collate,
        workers=min(workers, len(files)),
        worker_init=start_worker,
    )
    transform = DeviceTransform(
        clip.mean,
        clip.std,
        lazily_above=4 * merged.views.memory << 20,
        flow_mean=facts.get("flow_mean", False),
    ).eval()
    names = saved["vidtrain"]["label_names"]
    console = Console(emoji=False)  # a label `:car:` is printed as it is
    shown: list[dict[str, Any]] = []
    failed = 0
    # A file name may hold bytes that are no text: JSON's own escapes carry them. The bar goes to
    # stderr, apart from a table that somebody pipes on.
    with (
        output.open("w", encoding="utf-8", errors="backslashreplace") as file,
        Progress(console=Console(stderr=True)) as bar,
    ):
        bar_of_files = bar.add_task("predict", total=len(files))
        for line in predictions(task, loader, transform, device, files, names, cfg.top):
            failed += "error" in line
            write_line(file, line)
            if len(shown) < SHOWN:
                shown.append(line)
            bar.advance(bar_of_files)
    console.print(as_table(shown, len(files)))
    console.print(
        f"{len(files) - failed} of {len(files)} videos, in {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if failed else 0


def flow_of(facts: dict[str, Any]) -> Flow:
    """Compute flow as the checkpoint's data had it; what was stored there, by the same method."""
    method = facts["flow_method"] if facts["flow"] == STORED else facts["flow"]
    return Flow(method, facts["flow_bound"], facts["flow_direction"], weights=facts["flow_weights"])


def check_number(key: str, value: Any, least: int) -> None:
    """Refuse a setting that is not a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key} is {value!r}; it must be a whole number, at least {least}")


def find_device(name: Any) -> torch.device:
    """Turn the setting `device` into a device that works here; `auto` is a GPU where there is one.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
        torch.zeros(1, device=device).cpu()  # what is not there shows only in use
    except (RuntimeError, AssertionError, ImportError) as error:
        gpus = torch.cuda.device_count()
        there = ["auto", "cpu", *(f"cuda:{number}" for number in range(gpus))]
        # what torch says goes on for lines, about debugging
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device={name}: {reason}; one of: {', '.join(there)}") from None
    return device


def output_file(name: Any) -> Path:
    """Check where the predictions go, before the work.

    Raises:
        UserError: a folder, or in a folder that is not there.
    """
    output = Path(str(name)).expanduser()
    if output.is_dir():
        raise UserError(f"output={output} is a folder; name a file in it")
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}")
    return output


def find_files(source: Path) -> list[Path]:
    """List the videos that `input` names: one file, a folder's (all the way down), or a list's.

    A list is a .txt file with a path a line, relative to the list. Files in it, and a file that is
    named itself, are taken whatever their ending: what cannot be read becomes a row that says so.

    Raises:
        UserError: there is no such thing, or nothing in it.
    """
    if source.is_dir():
        found = sorted(
            path
            for path in source.rglob("*")
            if path.suffix.lower() in VIDEO_ENDINGS and not path.is_dir()
        )
        if not found:
            raise UserError(f"input={source}: no videos in it ({', '.join(sorted(VIDEO_ENDINGS))})")
        return found
    if source.suffix.lower() == ".txt" and source.is_file():
        text = source.read_text(encoding="utf-8-sig", errors="surrogateescape")
        lines = text.splitlines()
        found = [source.parent / line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"input={source}: the list is empty")
        return found
    if not source.exists():
        raise UserError(f"input={source}: there is no such file or folder")
    return [source]


def predictions(
    task: VideoTask,
    loader: Loader,
    transform: DeviceTransform,
    device: torch.device,
    files: list[Path],
    names: list[str],
    top: int,
) -> Iterator[dict[str, Any]]:
    """Yield one line a file, in order: its best labels, or its error."""
    for batch in loader:
        lines: dict[int, dict[str, Any]] = {}
        for failure in batch["failures"]:
            lines[failure.row] = {"path": str(files[failure.row]), "error": failure.reason}
        if len(batch["index"]):
            with torch.inference_mode():
                views = transform(to_device(batch, device))
                scores = task.probabilities(task.logits(views)).cpu()
            for index, values in zip(batch["index"].tolist(), scores, strict=True):
                best, places = values.topk(min(top, len(names)))
                labels = [
                    {"label": names[place], "score": round(value, 6)}
                    for value, place in zip(best.tolist(), places.tolist(), strict=True)
                ]
                lines[index] = {"path": str(files[index]), "predictions": labels}
        for index in sorted(lines):
            yield lines[index]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move what a network sees of a batch of videos under test."""
    for key in ("frames", "view_frames", "fields", "view_fields"):
        if key in batch:
            batch[key] = [
                part.to(device) if isinstance(part, torch.Tensor) else part for part in batch[key]
            ]
    if "flow_steps" in batch:
        batch["flow_steps"] = batch["flow_steps"].to(device)
    return batch


def write_line(file: TextIO, line: dict[str, Any]) -> None:
    """Write a line at once, so that a stopped run keeps what it has."""
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def as_table(lines: list[dict[str, Any]], total: int) -> Table:
    """Lay the first lines out for the terminal."""
    table = Table()
    table.add_column("video", overflow="fold")
    table.add_column("label")
    table.add_column("score", justify="right")
    table.add_column("next", style="dim")
    for line in lines:
        name = escape(printable(Path(line["path"]).name))
        if "error" in line:
            table.add_row(name, f"[red]{escape(printable(line['error']))}[/red]", "", "")
        else:
            first, *others = line["predictions"]
            rest = ", ".join(f"{p['label']} {p['score']:.2f}" for p in others[:2])
            table.add_row(name, escape(first["label"]), f"{first['score']:.3f}", escape(rest))
    if total > len(lines):
        table.add_row(f"... and {total - len(lines)} more", "", "", "")
    return table


def printable(text: str) -> str:
    """Show bytes of a file name that are no text as escapes; a terminal refuses them."""
    return text.encode("utf-8", "backslashreplace").decode()
