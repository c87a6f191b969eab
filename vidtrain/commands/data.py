"""`vidtrain data action=...`: what there is of a dataset, whether it is sound, how it looks."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vidtrain import build, config
from vidtrain.types import Clip, DecodeError, UserError


def main(cfg: DictConfig) -> int | None:
    """Run one action. Returns 1 when `check` found something unusable."""
    if cfg.action not in ACTIONS:
        raise UserError(f"no action '{cfg.action}'{config.nearest(cfg.action, list(ACTIONS))}")
    check_settings(cfg)
    data = build.data(cfg)
    if data.has_features and cfg.action != "prepare":
        raise UserError(f"action={cfg.action} is for videos, and data={data.name} has features")
    if cfg.split is not None:
        data.split_of(cfg.split)
    # No emoji: a class `:car:` is printed as it is.
    return ACTIONS[cfg.action](cfg, data, Console(emoji=False))


def check_settings(cfg: DictConfig) -> None:
    """Refuse bad settings before the work.

    Raises:
        UserError: naming the key.
    """
    clips = cfg.clips
    if not isinstance(clips, int) or isinstance(clips, bool) or clips < 1:
        raise UserError(f"clips is {clips!r}; it must be a whole number, at least 1")
    seconds_of(cfg.time_limit, "time_limit")
    if cfg.output is not None and cfg.action in ("check", "show"):  # the others write folders
        output_file(cfg, "")


def seconds_of(value: Any, key: str) -> float:
    """Read a time limit.

    Raises:
        UserError: it is none, naming the key.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{key} is {value!r}; it must be a number of seconds, more than 0")
    return float(value)


def output_file(cfg: DictConfig, default: str) -> Path:
    """Say where `output` goes.

    Raises:
        UserError: a folder, or in a folder that is not there.
    """
    output = Path(str(default if cfg.output is None else cfg.output)).expanduser()
    if output.is_dir():
        raise UserError(f"output={output} is a folder; name a file in it")
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}")
    return output


@contextmanager
def in_pieces(name: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far work is that can be stopped and goes on then.

    Yields:
        What is told how many pieces are done, of how many.
    """
    from vidtrain.data.ledger import going_on

    bar = Progress(console=Console(stderr=True))
    task = bar.add_task(name)

    def tell(done: int, total: int) -> None:
        if not bar.live.is_started:  # not before mistakes in the settings are out of the way
            bar.start()
        bar.update(task, completed=done, total=total)

    with going_on():
        try:
            yield tell
        finally:
            if bar.live.is_started:  # else it would print a line
                bar.stop()


def print_failed(console: Console, failed: Sequence[Any]) -> None:
    """Name each file that nothing could be made of."""
    for path, reason, _ in failed:
        console.print(f"unusable: {path}: {reason}", style="red", markup=False, soft_wrap=True)


def rows_of(cfg: DictConfig, data: Any) -> list[Any]:
    """List the manifest's rows, of one split or of all."""
    source = data.manifest
    numbers = range(len(source)) if cfg.split is None else source.split(cfg.split).tolist()
    return [source.row(number) for number in numbers]


def prepare(cfg: DictConfig, data: Any, console: Console) -> None:
    """Read the annotations anew and write the manifest."""
    found = data.write_manifest()
    console.print(
        f"{data.name}: {len(found)} rows, {len(found.label_names)} classes",
        markup=False,
        highlight=False,
    )
    print_counts(console, found)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    console.print(f"manifest {data.manifest_path()}", markup=False, highlight=False, soft_wrap=True)


def print_counts(console: Console, found: Any) -> None:
    """Compare what there is with what the dataset's authors count."""
    table = Table("split")
    heads = ["videos", "official", "missing"] if found.official else ["videos"]
    for head in heads:
        table.add_column(head, justify="right")
    for split in {**found.splits, **found.official}:
        here, official = found.splits.get(split, 0), found.official.get(split)
        missing = "" if official is None else str(official - here)
        cells = [str(here), "" if official is None else str(official), missing]
        table.add_row(escape(split), *cells[: len(heads)])
    console.print(table)


def check(cfg: DictConfig, data: Any, console: Console) -> int:
    """Decode every file; name those that are unusable, and what is in training and test alike."""
    from vidtrain.data.check import check_files, check_packed, leaks, write_table

    rows = rows_of(cfg, data)
    output = output_file(cfg, f"{data.name}-check.csv")
    places = {data.manifest.location(row): row.place for row in rows}
    workers, seconds = max(1, data.workers), float(cfg.time_limit)
    if data.manifest.is_packed:
        found_of_each = check_packed(places.items(), data.sources.shards, workers, seconds)
    else:
        found_of_each = check_files(places, workers, seconds)
    probes = []
    with Progress(console=Console(stderr=True)) as bar:
        bar_of_files = bar.add_task("check", total=len(places))
        for probe in found_of_each:
            probes.append(probe)
            bar.advance(bar_of_files)
    write_table(probes, output)
    bad = [probe for probe in probes if not probe.ok]
    print_counts(console, data.manifest)
    for probe in bad:
        console.print(
            f"unusable: {probe.path}: {probe.error}", style="red", markup=False, soft_wrap=True
        )
    found = leaks((data.manifest.location(row), row.split, row.group, row.labels) for row in rows)
    for leak in found:
        line = f"{leak.what}: {', '.join(leak.paths[:3])}"
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"{len(probes) - len(bad)} of {len(probes)} files are sound, {len(bad)} unusable,"
        f" {len(found)} leaks; table in {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if bad else 0


def stats(cfg: DictConfig, data: Any, console: Console) -> None:
    """Count classes, and measure durations, rates and sizes from the files' headers."""
    rows = rows_of(cfg, data)
    names = data.label_names
    splits = list(data.manifest.splits) if cfg.split is None else [cfg.split]
    counts = Counter((label, row.split) for row in rows for label in row.labels)
    console.print(
        f"{data.name}: {len(rows)} videos, {len(names)} classes", markup=False, highlight=False
    )
    table = Table("class")
    for split in splits:
        table.add_column(escape(split), justify="right")
    for number, name in enumerate(names):
        table.add_row(escape(name), *(str(counts[number, split]) for split in splits))
    console.print(table)

    some = rows if len(rows) <= SAMPLED else [rows[i] for i in sample_of(len(rows), SAMPLED)]
    seconds, rates, sizes, failed = [], Counter[float](), Counter[str](), 0
    with Progress(console=Console(stderr=True)) as bar:
        bar_of_files = bar.add_task("stats", total=len(some))
        for row in some:
            try:
                with data.sources.open(data.manifest.location(row), row) as reader:
                    seconds.append(len(reader) / reader.fps)
                    rates[round(reader.fps, 2)] += 1
                    sizes[f"{reader.width}x{reader.height}"] += 1
            except DecodeError:
                failed += 1
            bar.advance(bar_of_files)
    if not seconds:
        raise UserError(
            f"none of the {len(some)} videos can be opened; vidtrain data action=check says why"
        )
    low, median, high = np.percentile(seconds, [0, 50, 100])
    facts = Table(title=f"of {len(seconds)} videos", title_justify="left", show_header=False)
    facts.add_row(
        "seconds", f"{low:.2f} to {high:.2f}, median {median:.2f}, {sum(seconds) / 3600:.2f} h"
    )
    facts.add_row("frames per second", common(rates))
    facts.add_row("width x height", common(sizes))
    if failed:
        facts.add_row("cannot be opened", str(failed))
    console.print(facts)


SAMPLED = 2000  # files that stats opens at most


def sample_of(count: int, size: int) -> list[int]:
    """Choose rows spread over the whole dataset."""
    return np.linspace(0, count - 1, size).astype(int).tolist()


def common(counts: Counter[Any]) -> str:
    """Name the commonest values with their share."""
    total = sum(counts.values())
    shown = [f"{value} ({count / total:.0%})" for value, count in counts.most_common(5)]
    return ", ".join(shown) + (f" and {len(counts) - 5} more" if len(counts) > 5 else "")


def show(cfg: DictConfig, data: Any, console: Console) -> None:
    """Write a contact sheet of training clips, exactly as the chosen model would get them."""
    from vidtrain.visualize.clips import contact_sheet
    from vidtrain.visualize.flow import flow_pictures

    split = data.split_of(cfg.split or "train")
    dataset = data.dataset(split, training=split == "train")
    rng = np.random.default_rng(cfg.seed)
    clips, captions = [], []
    for index in rng.permutation(len(dataset))[: cfg.clips].tolist():
        sample = dataset[index, int(rng.integers(2**31))]
        for failure in sample["failures"]:
            console.print(f"skipped {failure.path}: {failure.reason}", style="yellow", markup=False)
        if "fps" not in sample:
            continue
        row = dataset.rows.row(sample["index"])
        pixels, flow = seen_by_model(data, sample)
        clips.append(pixels)
        label = ", ".join(data.label_names[number] for number in row.labels) or "no label"
        captions.append(f"{label}\n{row.path}, {sample['fps']:.4g} frames/s")
        if flow is not None:
            pictures, brightest = flow_pictures(flow)
            clips.append(pictures)
            captions.append(f"its flow; the strongest colour is {brightest:.3g} pixels")
    if not clips:
        raise UserError(
            f"not one clip of '{split}' can be read; vidtrain data action=check says why"
        )
    output = output_file(cfg, f"{data.name}-{split}.png")
    contact_sheet(clips, captions, output)
    clip: Clip = data.clip
    console.print(
        f"{len(clips) // (1 if data.flow is None else 2)} clips of {clip.num_frames} frames, {clip.size} x {clip.size}, in {output}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def seen_by_model(data: Any, sample: Any) -> tuple[Any, Any]:
    """Run a sample through the device transform and back.

    Returns:
        Its frames as `(T, C, H, W)` uint8, and its flow as `(T, 2, H, W)` pixels, None where it has none.
    """
    import torch

    from vidtrain.data.collate import collate

    data.transform.train("video" in sample)
    batch = data.transform(collate([sample]))
    video = batch["video"][0, 0]  # (C, T, H, W)
    pixels = (video - data.transform.shift) / data.transform.scale
    pixels = pixels.round().clamp(0, 255).transpose(0, 1).to(torch.uint8)
    if "flow" not in batch:
        return pixels, None
    return pixels, batch["flow"][0, 0].transpose(0, 1) * data.flow_bound


def pack(cfg: DictConfig, data: Any, console: Console) -> int:
    """Pack the files, as they are, into tar shards that can be read clip by clip or in sequence."""
    from vidtrain.data import pack as packing

    shard_mb = cfg.pack.shard_mb
    if not isinstance(shard_mb, (int, float)) or isinstance(shard_mb, bool) or not shard_mb > 0:
        raise UserError(f"pack.shard_mb is {shard_mb!r}; it must be a number of MiB, more than 0")
    output = Path(str(cfg.output or f"{data.name}-packed")).expanduser()
    found = data.manifest
    rows = len(found) if cfg.split is None else found.splits[cfg.split]
    # What is true of the data and lies in its config, not in its files.
    facts = [
        f"data.{key}={json.dumps(value, separators=(',', ':'))}".replace('"', "")
        for key, default in PACKED_AS.items()
        if (value := OmegaConf.to_object(cfg.data)[key]) != default
    ]
    if (data.num_classes or 0) > len(found.label_names):
        facts.append(f"data.num_classes={data.num_classes}")
    notes = [f"packed from {found.name}: set {' '.join(facts)} as there"] if facts else []
    with Progress(console=Console(stderr=True)) as bar:
        looked = bar.add_task("look", total=rows)
        plan = packing.plan(
            found, cfg.split, shard_mb, cfg.seed, data.multi_label, lambda: bar.advance(looked)
        )
        bar.update(looked, completed=rows)  # several may be pieces of one file
        size = sum(video.size for shard in plan.shards for video in shard.videos)
        task = bar.add_task("pack", total=size)
        packed = packing.pack(
            found, plan, output, min(8, data.workers), notes, lambda size: bar.advance(task, size)
        )
    for path, reason in packed.left_out:
        console.print(f"left out: {path}: {reason}", style="red", markup=False, soft_wrap=True)
    console.print(
        f"{packed.videos} videos, {size / 1e6:,.0f} MB, in {packed.shards} shards in {output}"
        f" ({packed.kept} of them from before), {len(packed.left_out)} left out;"
        f" to use them: {shlex.join(['data=packed', f'data.root={output}', *facts])}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if packed.left_out else 0


PACKED_AS = {
    "hflip": True,
    "multi_label": False,
    "sampling": "random",
    "region": None,
    "span": None,
}


def resize(cfg: DictConfig, data: Any, console: Console) -> int:
    """Re-encode the videos into another folder so that training decodes less; say what was gained."""
    from vidtrain.data import resize as resizing
    from vidtrain.data.module import annotation_files

    if cfg.output is None:
        raise UserError("output is not set; add output=FOLDER for the re-encoded videos")
    output = Path(str(cfg.output)).expanduser()
    settings = dict(cfg.resize)
    seconds = seconds_of(settings.pop("time_limit"), "resize.time_limit")
    # A table of one's own names files with their endings: it is replaced by the one that is written.
    own = str(cfg.data.prepare._target_).startswith("vidtrain.data.prepare.folder")
    lists = [] if own else [Path(path) for path, *_ in annotation_files(data.root, {})]
    with in_pieces("resize") as tell:
        outcome = resizing.resize(
            data.manifest,
            cfg.split,
            output,
            resizing.Settings(**settings),
            [path for path in lists if path.is_file()],
            max(1, data.workers),
            seconds,
            tell,
        )
    print_failed(console, outcome.failed)
    print_gain(console, data.manifest.root, output, outcome)
    options = ["data=folder", f"data.root={output}"]
    options += ["data.multi_label=true"] if data.multi_label else []
    console.print(
        f"{outcome.made} videos made, {len(outcome.videos) - outcome.made} there before,"
        f" {len(outcome.failed)} unusable; to use them: {shlex.join(options)}"
        + ("" if own else f", or this dataset's own config with {shlex.join(options[1:2])}"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if outcome.failed else 0


def print_gain(console: Console, root: str, output: Path, outcome: Any) -> None:
    """Compare the videos with their copies: bytes, and the CPU that a training clip costs."""
    from vidtrain.data.resize import CLIP, bytes_of, cpu_per_clip

    paths = list(outcome.videos)
    pairs = [(f"{root}/{path}", str(output / outcome.targets[path])) for path in paths]
    timed = [pairs[i] for i in sample_of(len(pairs), min(TIMED, len(pairs)))]
    before, after = cpu_per_clip(timed)
    sizes = [sum(map(bytes_of, side)) / 1e6 for side in zip(*pairs, strict=True)]
    table = Table()
    for head in ("", "before", "after", ""):
        table.add_column(head, justify="right" if head else "left")
    table.add_row("files", str(len(pairs)), str(len(pairs)))
    table.add_row("MB", *(f"{size:,.1f}" for size in sizes), f"{sizes[1] / sizes[0]:.2f} of it")
    table.add_row(
        "ms per clip", f"{1e3 * before:.1f}", f"{1e3 * after:.1f}", f"{before / after:.1f}x less"
    )
    table.add_row("clips/s", f"{1 / before:.1f}", f"{1 / after:.1f}", f"{before / after:.1f}x")
    console.print(table)
    console.print(
        f"a clip: {CLIP.num_frames} frames {CLIP.stride} apart, at random, decoded and cropped; CPU of"
        f" one core, measured on {len(timed)} of {len(pairs)} files",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    sounds = Counter(made.sound for made in outcome.videos.values() if made.sound)
    for sound, count in sorted(sounds.items()):
        console.print(f"sound of {count} files: {sound}", markup=False, highlight=False)


TIMED = 16  # files of which resize takes clips


def flow(cfg: DictConfig, data: Any, console: Console) -> int:
    """Compute the flow of all videos, once, into `data.flow_root`; say what it takes and how exact it is."""
    import torch

    from vidtrain.data import flow_store

    if cfg.output is not None:
        raise UserError("flow goes into data.flow_root; set that in place of output")
    if data.flow_root is None:
        raise UserError("data.flow_root is not set; name a folder for the flow")
    settings = dict(cfg.flow)
    seconds = seconds_of(settings.pop("time_limit"), "flow.time_limit")
    workers = max(1, data.workers)
    if data.flow_method == "raft" and torch.cuda.is_available():
        # of each GPU one computes while the other reads and writes
        workers = min(workers, 2 * torch.cuda.device_count())
    with in_pieces("flow") as tell:
        outcome = flow_store.compute(
            data.manifest,
            cfg.split,
            data.flow_root,
            flow_store.Settings(data.flow_method, data.flow_bound, **settings),
            data.flow_direction,
            data.flow_weights,
            workers,
            seconds,
            tell,
        )
    print_failed(console, outcome.failed)
    found = outcome.summary()
    console.print(
        f"{found['fields']:,} fields in {found['files']:,} files, {found['bytes'] / 1e6:,.1f} MB,"
        f" {found['bytes_per_field']:,.0f} bytes a field; rounding and coding change them by"
        f" {found['mean_abs_error']:.3f} pixels on average, and {found['beyond_bound']:.2%} is beyond"
        f" {data.flow_bound:g} pixels",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    options = ["data.flow=stored", f"data.flow_method={data.flow_method}"]
    options += [f"data.flow_root={data.flow_root}"] if data.wanted_flow_root else []
    console.print(
        f"{outcome.made} files made, {len(outcome.files) - outcome.made} there before,"
        f" {len(outcome.failed)} unusable; to use them: {shlex.join(options)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if outcome.failed else 0


ACTIONS: dict[str, Callable[[DictConfig, Any, Console], int | None]] = {
    "prepare": prepare,
    "check": check,
    "stats": stats,
    "show": show,
    "pack": pack,
    "resize": resize,
    "flow": flow,
}
