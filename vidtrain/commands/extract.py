"""`vidtrain extract`: the features of whole videos, a .npy file each, and a table that names them.

Windows of the model's clip slide over a video from its first frame to its last, and what the network's
`forward_features` makes of each is kept. A run that was stopped goes on: a ledger in the folder says
what each file was made of and how, and only what is missing is made.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from vidtrain import build, checkpoint, config
from vidtrain.commands.predict import check_number, find_device, find_files, flow_of, to_device
from vidtrain.data import sampling
from vidtrain.data.cache import facts_of
from vidtrain.data.collate import collate
from vidtrain.data.dataset import Files, VideoDataset
from vidtrain.data.ledger import PARTS, Ledger, going_on
from vidtrain.data.loader import Loader, start_worker
from vidtrain.data.manifest import Row
from vidtrain.data.order import EvaluationOrder
from vidtrain.data.prepare.features import CLASSES, TABLE
from vidtrain.data.sources import Sources
from vidtrain.data.transforms.device import DeviceTransform
from vidtrain.types import Clip, UserError, Views
from vidtrain.weights.load import fill

FORMAT = 1  # raised when what is made of a video changes
LEDGER = ".vidtrain-extract"
CHOICES: dict[str, tuple[Any, ...]] = {
    "pool": ("window", "step", "none"),
    "dtype": ("float16", "float32"),
    "precision": (32, "bf16"),
}
# Of the verb itself; all else on the command line goes over the checkpoint's config.
OWN = ("ckpt", "input", "output", "split", "every", *CHOICES, "batch_size", "device", "allow")


class Made(NamedTuple):
    """A file of features, as the ledger notes it."""

    path: str  # of it, in the folder
    size: int  # of the video, by which a change of it is seen ...
    mtime_ns: int  # ... and its time
    bytes: int  # of the file
    features: int  # how many
    dim: int  # numbers of each
    rate: float  # features per second
    frames: int  # of the video
    fps: float


class Videos:
    """Rows of which features are wanted, and what the files of these are called.

    Args:
        source: what there is: `row(number)` and `location(row)`.
        numbers: which of its rows.
        base: the folder that names of files are relative to; empty where rows' paths are so already.
    """

    def __init__(self, source: Any, numbers: Sequence[int], base: str = "") -> None:
        self.source, self.numbers, self.base = source, numbers, base

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, index: int) -> Row:
        """Give row `index` of those wanted."""
        row: Row = self.source.row(int(self.numbers[index]))
        return row

    def location(self, row: Row) -> str:
        """Say what messages call the row's video."""
        return str(self.source.location(row))

    def target(self, row: Row) -> str:
        """Name the file of its features: its own path, the seconds of a piece, and `.npy`."""
        path = os.path.relpath(row.path, self.base) if self.base else row.path
        piece = ""
        if row.start is not None or row.end is not None:
            ends = ("" if second is None else f"{second:g}" for second in (row.start, row.end))
            piece = f"@{'-'.join(ends)}"
        return f"{path}{piece}.npy"

    def facts(self, row: Row) -> tuple[int, int]:
        """Give two numbers by which a change of the video is seen."""
        if row.place is not None:
            return row.place.size, row.place.offset
        return facts_of(self.location(row)) or (0, 0)

    def only(self, numbers: Sequence[int]) -> Videos:
        """Give the same with other rows."""
        return Videos(self.source, numbers, self.base)


class Todo(NamedTuple):
    """A file to be made."""

    target: str
    number: int  # of the row
    facts: tuple[int, int]  # of the video


def main(cfg: DictConfig) -> int:
    """Extract the features of every video. Returns 1 when at least one could not be read, else 0."""
    check(cfg)
    device = find_device(cfg.device)
    if device.type == "cpu":
        build.share_cores()
    console = Console(stderr=True)
    network, merged = find_network(cfg, console)
    network.to(device).eval()
    data = build.data(merged)
    data.feed(network.inputs)
    every = cfg.every or data.clip.num_frames * data.clip.stride

    if cfg.input is not None:
        whole, names = files_of(cfg.input), []
        wanted = whole
    else:
        whole, names = Videos(data.manifest, range(len(data.manifest))), data.label_names
        split = None if cfg.split is None else data.manifest.split(data.split_of(cfg.split))
        wanted = whole if split is None else whole.only(split.tolist())
    output = Path(str(cfg.output)).expanduser()
    with (
        going_on(),
        writing(output) as parts,
        Ledger(
            output, LEDGER, settings(cfg, merged, data, network, every), Made, "extract"
        ) as ledger,
    ):
        refuse_others(ledger)
        parts.mkdir(exist_ok=True)
        count, todo = missing(wanted, ledger)
        numbers = [one.number for one in todo]
        dataset = windows(cfg, data, config.resolved(merged)["data"], wanted.only(numbers), every)
        failed = 0
        with Progress(console=console) as bar:
            shown = bar.add_task("extract", total=len(todo))
            for one, result in extracted(cfg, network, data, dataset, todo, device):
                if isinstance(result, str):
                    failed += 1
                    bar.console.print(result, markup=False, highlight=False, soft_wrap=True)
                else:
                    array, facts = result
                    size = write(output / one.target, parts, partial(np.save, arr=array))
                    made = Made(one.target, *one.facts, size, *array.shape[:2], **facts)
                    ledger.add(made)
                    ledger.lines[made.path] = made._asdict() | {"how": ledger.how}
                bar.advance(shown)
        tell(output, parts, whole, names, ledger)
    before = f", {count - len(todo)} of which were there" if count > len(todo) else ""
    Console(emoji=False).print(
        f"{count - failed} of {count} videos in {output}{before}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 1 if failed else 0


def check(cfg: DictConfig) -> None:
    """Refuse settings that cannot be used, before any work.

    Raises:
        UserError: naming the key.
    """
    for key, values in CHOICES.items():
        if cfg[key] not in values:
            raise UserError(f"{key} is {cfg[key]!r}; it is one of {', '.join(map(str, values))}")
    check_number("batch_size", cfg.batch_size, 1)
    if cfg.every is not None:
        check_number("every", cfg.every, 1)
    keys = {word.partition("=")[0].lstrip("+~") for word in config.task_overrides()}
    if cfg.ckpt is None and not keys & {"model", "model._target_", "experiment"}:
        raise UserError("whose features? add ckpt=..., or model=... with model.weights=...")
    for group in sorted({key.split(".")[0] for key in keys} & {"model", "task", "experiment"}):
        if cfg.ckpt is not None:
            raise UserError(f"{group}= cannot be changed here: it comes out of the checkpoint")
    if cfg.input is not None and (cfg.split is not None or "data" in keys):
        raise UserError("input= names files, data= and split= a dataset: give one or the other")


def find_network(cfg: DictConfig, console: Console) -> tuple[Any, DictConfig]:
    """Give the checkpoint's network, or the one that `model=` builds, and the config that counts.

    Raises:
        UserError: there is no such checkpoint, or the network takes no videos.
    """
    if cfg.ckpt is None:
        merged = cfg
        say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        parts = build.weights(cfg, None, say)
        built = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
        assert isinstance(built, DictConfig)
        with open_dict(built):
            built.data["num_classes"] = 1  # the data may not know theirs, and nobody asks
        torch.manual_seed(cfg.seed)
        network: Any = build.model(built)
        refuse_masked(network)
        for part in parts:
            say(fill(network, part))
        network.reset_classifier(0)
        if not parts:
            say("note: neither ckpt= nor model.weights=: features of a network as it is built")
    else:
        path = checkpoint.find(cfg.ckpt)
        saved = checkpoint.load(path)
        given = [word for word in config.task_overrides() if word.partition("=")[0] not in OWN]
        merged = config.overlay(checkpoint.config_of(saved), cfg, given)
        merged = checkpoint.plain(merged, path)
        ours = list(build.targets(config.resolved(cfg)["data"]))  # the user's own may name anything
        build.check_targets(merged.data, str(path), [*cfg.allow, *ours])
        network = checkpoint.build_task(saved, path, cfg.allow).model
        refuse_masked(network)
    if "features" in network.inputs:
        raise UserError("the network takes features itself; extract makes features of videos")
    return network, merged


def refuse_masked(network: nn.Module) -> None:
    """Say how to extract what a masked autoencoder's encoder makes.

    Raises:
        UserError: the network is one.
    """
    if hasattr(network, "draw"):
        raise UserError(
            f"{type(network).__name__} predicts pixels; for features of its encoder name the classifier"
            " with the same encoder: model=videomae_base model.weights=CHECKPOINT"
        )


def files_of(name: Any) -> Videos:
    """List the files of `input`; in the output they are called as below the folder they share."""
    source = Path(str(name)).expanduser()
    paths = [os.path.abspath(path) for path in find_files(source)]
    base = source if source.is_dir() else os.path.commonpath([os.path.dirname(p) for p in paths])
    return Videos(Files(paths), range(len(paths)), os.path.abspath(base))


def settings(
    cfg: DictConfig, merged: DictConfig, data: Any, network: nn.Module, every: int
) -> list[Any]:
    """List all that decides what is made of a video."""
    built = config.resolved(merged)["model"]  # what has no tensors counts too
    built = {key: value for key, value in built.items() if key not in build.FILL_KEYS}
    clip: Clip = data.clip
    seen = [clip.num_frames, clip.stride, clip.size, list(clip.mean), list(clip.std), clip.fps]
    seen += [data.views["short_side"], data.views["size"], data.past_end, data.region, data.span]
    if "flow" in data.inputs:
        seen += [data.flow_source, data.flow_method, data.flow_bound, data.flow_direction]
        seen += [data.flow_mean, str(data.flow_root)]
    if cfg.input is None:
        seen += [data.manifest.packed_version]
    own = [every, cfg.pool, cfg.dtype, cfg.precision]
    return list(json.loads(json.dumps([FORMAT, [digest(network), built], seen, own])))


def digest(network: nn.Module) -> str:
    """Hash a network: its class, and every tensor of it."""
    state = hashlib.blake2b(type(network).__qualname__.encode(), digest_size=12)
    for name, tensor in network.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


@contextlib.contextmanager
def writing(output: Path) -> Iterator[Path]:
    """Give a folder in the output for files that are not whole yet, and say what its disk refuses.

    Raises:
        UserError: the output is in use for something else, or cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; name a folder")
    if output.is_dir() and not (output / LEDGER).exists() and any(output.iterdir()):
        raise UserError(f"output={output} has other things in it; name a new or an empty folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield output / PARTS
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(output / PARTS, ignore_errors=True)


def write(target: Path, parts: Path, save: Callable[[Any], Any]) -> int:
    """Write a file whole or not at all; return its size."""
    part = parts / uuid.uuid4().hex
    with part.open("wb") as file:
        save(file)
    size = part.stat().st_size
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)
    return size


def refuse_others(ledger: Ledger) -> None:
    """Refuse to mix features with those of another network or of other settings.

    Raises:
        UserError: saying which of them.
    """
    for entry in ledger.lines.values():
        if entry.get("how") != ledger.how:
            theirs = [*entry.get("how", []), None, None, None, None]
            what = ("version of vidtrain", "network or weights", "clip or views")
            other = [w for w, a, b in zip(what, theirs, ledger.how, strict=False) if a != b]
            raise UserError(
                f"output={ledger.output} holds features of another"
                f" {other[0] if other else 'every, pool, dtype or precision'}; name another folder"
            )


def missing(wanted: Videos, ledger: Ledger) -> tuple[int, list[Todo]]:
    """Count the files of the rows that are wanted, and list those that are still to be made."""
    seen: set[str] = set()
    todo = []
    for index in range(len(wanted)):
        row = wanted.row(index)
        target = wanted.target(row)
        if target not in seen:
            seen.add(target)
            facts = wanted.facts(row)
            if find(ledger, target, facts) is None:
                todo.append(Todo(target, int(wanted.numbers[index]), facts))
    return len(seen), todo


def find(ledger: Ledger, target: str, facts: tuple[int, int]) -> Made | None:
    """Give what the ledger says of a file, if it is there and of today's video and settings."""
    entry = dict(ledger.lines.get(target, {}))
    try:
        if entry.pop("how") != ledger.how:
            return None
        made = Made(**entry)
        size = (ledger.output / target).stat().st_size
    except (OSError, TypeError, KeyError):
        return None
    return made if (made.size, made.mtime_ns, made.bytes) == (*facts, size) else None


def windows(
    cfg: DictConfig, data: Any, facts: dict[str, Any], videos: Videos, every: int
) -> VideoDataset:
    """Make the dataset of whole videos: windows of the model's clip, one crop in the middle."""
    if cfg.input is None:
        dataset: VideoDataset = data.dataset(next(iter(data.manifest.splits)), test_views=True)
        dataset.rows, dataset.every = videos, every
        dataset.clip, dataset.clips, dataset.crops, dataset.how = data.clip, 1, 1, "random"
        return dataset
    return VideoDataset(
        videos,
        data.clip,
        short_side=data.views["short_side"],
        size=data.views["size"],
        past_end=data.past_end,
        region=data.region,
        span=data.span,
        on_error=data.on_error,
        sources=Sources(data.decoder),
        flow=flow_of(facts) if "flow" in data.inputs else None,
        inputs=data.inputs,
        spill=Path(cfg.paths.cache).expanduser() / "spill",
        spill_above=data.views["memory"] << 20,
        every=every,
    )


def extracted(
    cfg: DictConfig,
    network: nn.Module,
    data: Any,
    dataset: VideoDataset,
    todo: Sequence[Todo],
    device: torch.device,
) -> Iterator[tuple[Todo, str | tuple[np.ndarray, dict[str, Any]]]]:
    """Yield each file's features and what is true of them, or why there are none."""
    if not todo:
        return
    loader = Loader(
        dataset,
        EvaluationOrder(len(todo), 1, 0, 1),
        collate,
        workers=min(data.workers, len(todo)),
        pin=device.type == "cuda",
        time_limit=data.time_limit,
        start_method=data.start_method,
        worker_init=start_worker,
    )
    # Windows are made a few at a time, of frames that are there once.
    transform = DeviceTransform(
        data.clip.mean, data.clip.std, lazily_above=0, flow_mean=data.flow_mean
    ).eval()
    with contextlib.closing(loader):
        for batch in loader:
            for failure in batch["failures"]:
                yield todo[failure.row], f"{failure.path}: {failure.reason}"
            for index in batch["index"].tolist():
                frames, fps = batch["extent"][0]
                views = transform(to_device(batch, device))
                inputs = [views[key] for key in network.inputs]  # type: ignore[union-attr]
                made = features_of(network, inputs, cfg.batch_size, cfg.pool, cfg.precision)
                hop = sampling.hop(dataset.every or 1, data.clip, fps)
                rate = fps / hop
                if cfg.pool == "step":
                    step = sampling.step(data.clip, fps)
                    starts = sampling.dense_windows(frames, data.clip.num_frames, step, hop)[:, 0]
                    length = data.clip.num_frames * step / made.shape[1]
                    made, rate = in_order(made, starts, length, frames), fps / length
                facts = {"rate": round(rate, 6), "frames": frames, "fps": round(fps, 6)}
                yield todo[index], (to_array(made, cfg.dtype, todo[index].target), facts)


def features_of(
    network: nn.Module, inputs: Sequence[Views], size: int, pool: str, precision: Any
) -> Tensor:
    """Run the network over the windows of one video, `size` at a time.

    Args:
        network: of which `forward_features` gives (n, D, t, h, w).
        inputs: what it takes.
        size: how many windows.
        pool: window: mean over t, h and w; step: over h and w; none.
        precision: 32 or bf16.

    Returns:
        `(N, D)`, `(N, t, D)` or `(N, D, t, h, w)` float32 on the CPU.
    """
    made = []
    device = next(network.parameters()).device
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.inference_mode(), bf16:
        for part in zip(*(views.pieces(size) for views in inputs), strict=True):
            maps = network.forward_features(*part).float()  # type: ignore[operator]
            if pool == "window":
                maps = maps.mean((2, 3, 4))
            elif pool == "step":
                maps = maps.mean((3, 4)).transpose(1, 2)
            made.append(maps.cpu())
    return torch.cat(made)


def in_order(steps: Tensor, starts: np.ndarray, length: float, frames: int) -> Tensor:
    """Lay the steps of all windows one behind the other: `(N, t, D) -> (n, D)`.

    Where windows overlap, as the last one does with that before it, the earlier one's steps stay. Steps
    behind the video's end, where a window is longer than it, are left out.

    Args:
        steps: of the windows.
        starts: `(N,)`, their first frames.
        length: of a step, in frames.
        frames: of the video.
    """
    times = (starts[:, None] + np.arange(steps.shape[1]) * length).ravel()
    before = np.maximum.accumulate(np.concatenate([[-np.inf], times[:-1]]))
    keep = (times > before + 1e-6) & (times < frames)
    keep[0] = True
    return steps.flatten(0, 1)[torch.from_numpy(keep)]


def to_array(made: Tensor, dtype: str, target: str) -> np.ndarray:
    """Turn features into an array of the files' type.

    Raises:
        UserError: they do not fit it, or are no numbers.
    """
    with np.errstate(over="ignore"):
        array = made.numpy().astype(dtype)
    if not np.isfinite(array).all():
        if dtype == "float16" and made.isfinite().all():
            raise UserError(f"{target}: features of {made.abs().max():.3g}; set dtype=float32")
        raise UserError(f"{target}: the network's features are not finite")
    return np.asarray(array)


def tell(
    output: Path, parts: Path, whole: Videos, label_names: Sequence[str], ledger: Ledger
) -> None:
    """Write the table of what is there, and the names of the classes in their order."""
    columns = ("path", "label", "split", "group", "video", "features", "rate", "frames", "fps")
    text = (parts / TABLE).open("w", newline="", encoding="utf-8", errors="backslashreplace")
    with text as file:
        lines = csv.writer(file)
        lines.writerow(columns)
        for index in range(len(whole)):
            row = whole.row(index)
            made = find(ledger, whole.target(row), whole.facts(row))
            if made is not None:
                label = "|".join(label_names[number] for number in row.labels)
                facts = (made.features, made.rate, made.frames, made.fps)
                lines.writerow([made.path, label, row.split, row.group or "", row.path, *facts])
    (parts / TABLE).replace(output / TABLE)
    if label_names:
        text_of = json.dumps(list(label_names), ensure_ascii=False, indent=0).encode()
        write(output / CLASSES, parts, lambda file: file.write(text_of))
