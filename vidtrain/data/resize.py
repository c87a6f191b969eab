"""Re-encode a dataset into another folder, so that training decodes less.

The output holds the same videos under the same names, but for the ending; the dataset's annotation
files; `videos.parquet`, a table of its own that `data=folder` reads; and a ledger, by which a run
that was stopped goes on. A video that is there under its name is whole.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidtrain.data.decode import open_video
from vidtrain.data.encode import PRESETS, TUNES, Settings, encode
from vidtrain.data.ledger import Failed, Ledger, check_output, put, work, writing
from vidtrain.types import Clip, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vidtrain.data.manifest import Manifest

FORMAT = 1  # raised when `encode` makes of a video what is worth making it anew
LEDGER = ".vidtrain-resize"
TABLE = "videos.parquet"
CLIP = Clip(num_frames=16, stride=4, size=224, mean=(0, 0, 0), std=(1, 1, 1))  # what is timed


class Job(NamedTuple):
    """One video to make."""

    path: str  # its row's
    source: str
    part: str  # where it is written, ...
    target: str  # ... and what it is then called
    settings: Settings


class Made(NamedTuple):
    """A video that is there."""

    path: str  # its row's
    size: int  # bytes of the source ...
    mtime_ns: int  # ... and its time, when it was read
    bytes: int
    frames: int
    sound: str | None  # what became of it; None where there is none


class Outcome(NamedTuple):
    """What became of a dataset."""

    videos: dict[str, Made]  # all that are there, by their rows' paths
    targets: dict[str, str]  # their files' names under the output, by their rows' paths
    made: int  # how many of them in this run
    failed: list[Failed]


def resize(
    manifest: Manifest,
    split: str | None,
    output: Path,
    settings: Settings,
    lists: Sequence[Path] = (),
    workers: int = 0,
    time_limit: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Re-encode a dataset's videos, those that are not there yet.

    A run that is stopped, or its machine with it, leaves whole videos behind; called again, it goes
    on with the others. A video whose source or settings have changed is made anew.

    Args:
        manifest: of the dataset.
        split: only its videos; None: all.
        output: the folder; made if it is not there.
        settings: how to encode.
        lists: annotation files under the manifest's root, to be copied.
        workers: processes; 0: one for each core.
        time_limit: seconds that one video may take.
        progress: called with how many of the videos are done and how many there are.

    Raises:
        UserError: a setting or a folder that cannot be used, two videos that would get the same
            name, no space left, or not one video that could be made.
    """
    check_settings(settings)
    if manifest.is_packed:
        raise UserError(f"{manifest.name} is packed; resize the videos first, then pack them")
    root = str(manifest.root)
    paths = manifest.table["path"].unique().to_pylist()
    check_output(root, output, paths, LEDGER, "output")
    targets = target_names(root, paths)
    wanted = paths
    if split is not None:
        wanted = list(dict.fromkeys(manifest.row(n).path for n in manifest.split(split).tolist()))
    with writing(output, "output"), ledger_of(output, settings) as ledger:
        videos = {
            path: there
            for path in paths
            if (there := ledger.find(path, os.path.join(root, path), output / targets[path]))
        }
        todo = [path for path in wanted if path not in videos]
        jobs = [
            partial(
                Job,
                path=path,
                source=f"{root}/{path}",
                target=f"{output}/{targets[path]}",
                settings=settings,
            )
            for path in todo
        ]

        def tell(done: int) -> None:
            progress(len(wanted) - len(todo) + done, len(wanted))

        made, failed = work(make, jobs, ledger, workers, time_limit, tell, "the codec")
        videos |= made
        if not videos:
            path, reason, _ = failed[0]
            raise UserError(f"not one video could be made; {path}: {reason}")
        _copy_lists(lists, root, output)
        _write_table(manifest, output, videos, targets)
    return Outcome(videos, targets, len(made), failed)


def ledger_of(output: Path, settings: Settings) -> Ledger:
    """Give the ledger of what is re-encoded into a folder."""
    return Ledger(output, LEDGER, [FORMAT, *settings], Made, "resize")


def check_settings(settings: Settings) -> None:
    """Refuse what the encoder would not take.

    Raises:
        UserError: naming the key.
    """
    for key, least, most in (("short_side", 16, 4096), ("keyframe_every", 1, 250), ("crf", 0, 51)):
        value = getattr(settings, key)
        kinds = (int, float) if key == "crf" else int
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(
                f"resize.{key} is {value!r}; it must be a number from {least} to {most}"
            )
    for key, choice in (("preset", PRESETS), ("tune", (*TUNES, None))):
        if getattr(settings, key) not in choice:
            names = ", ".join(name or "null" for name in choice)
            raise UserError(f"resize.{key} is {getattr(settings, key)!r}; choose from {names}")


def target_names(root: str, paths: Iterable[str]) -> dict[str, str]:
    """Name each video's copy: as the video, but ending in `.mp4`.

    Raises:
        UserError: two would get the same name.
    """
    from vidtrain.data.prepare.scan import VIDEO_EXTENSIONS  # not for the workers: slow to import

    targets: dict[str, str] = {}
    owners: dict[str, str] = {}
    for path in paths:
        stem, ending = os.path.splitext(path)
        is_file = ending.lower() in VIDEO_EXTENSIONS and not os.path.isdir(os.path.join(root, path))
        targets[path] = (stem if is_file else path) + ".mp4"
        other = owners.setdefault(targets[path], path)
        if other != path:
            raise UserError(
                f"{other} and {path} under {root} would both become {targets[path]}; rename one"
            )
    return targets


def make(job: Job) -> Made | Failed:
    """Write one video, in a worker."""
    done = put(job, lambda: encode(job.source, job.part, job.settings))
    if isinstance(done, Failed):
        return done
    frames, sound = done.facts.frames, done.facts.sound
    return Made(job.path, done.size, done.mtime_ns, done.bytes, frames, sound)


def cpu_per_clip(
    pairs: Sequence[tuple[str, str]], clips: int = 2, rounds: int = 3, seed: int = 0
) -> tuple[float, float]:
    """Measure what a training clip costs before and after: decoding `CLIP` and cropping at random.

    The same clips of both, in turn. Frame indices are known beforehand, as training knows them
    after its first epoch.

    Args:
        pairs: each video and its copy.
        clips: of each video.
        rounds: the quickest counts, since other work on the machine can only slow it down.
        seed: of the clips.

    Returns:
        Mean CPU seconds of one clip, of the videos and of their copies.
    """
    import torch

    from vidtrain.data import sampling
    from vidtrain.data.dataset import VideoDataset
    from vidtrain.data.transforms.sample import Augment

    augment = Augment(area=(0.25, 1.0), hflip=0.5)
    training = VideoDataset((), CLIP, augment=augment)
    rng = np.random.default_rng(seed)
    seconds: tuple[list[float], list[float]] = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    try:
        for pair in pairs:
            known = []
            for path in pair:
                with open_video(path) as reader:
                    reader.frames([0])
                    known.append(getattr(reader, "index", None))
                    length = len(reader)
            for indices in sampling.random_clips(length, CLIP.num_frames, CLIP.stride, clips, rng):
                best = [float("inf"), float("inf")]
                for _ in range(rounds):
                    for side in (0, 1):
                        draws = np.random.default_rng(seed)  # the same crop of both
                        began = time.process_time()
                        with open_video(pair[side], index=known[side]) as reader:
                            training.training_views(reader, indices[None], augment, draws)
                        best[side] = min(best[side], time.process_time() - began)
                for side in (0, 1):
                    seconds[side].append(best[side])
    finally:
        torch.set_num_threads(threads)
    return float(np.mean(seconds[0])), float(np.mean(seconds[1]))


def bytes_of(path: str) -> int:
    """Count the bytes of a file, or of the files in a folder of pictures."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            return sum(entry.stat().st_size for entry in entries)
    return os.stat(path).st_size


def _copy_lists(lists: Sequence[Path], root: str, output: Path) -> None:
    for path in lists:
        target = output / os.path.relpath(path, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _write_table(
    manifest: Manifest, output: Path, videos: dict[str, Made], targets: dict[str, str]
) -> None:
    """Write the rows whose videos are there, as `data=folder` reads them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from vidtrain.data.manifest import export

    table = manifest.table
    table = table.filter(pc.is_in(table["path"], value_set=pa.array(list(videos), pa.string())))
    names = pa.array([targets[path] for path in table["path"].to_pylist()], pa.string())
    table = table.set_column(table.column_names.index("path"), "path", names)
    part = output / f".{TABLE}.{uuid.uuid4().hex}.parquet"
    export(_Rows(table, manifest.label_names), part)  # type: ignore[arg-type]
    part.replace(output / TABLE)


class _Rows(NamedTuple):
    """What `export` needs of a manifest."""

    table: Any
    label_names: list[str]
