"""Re-encode a dataset into another folder, so that training decodes less.

The output holds the same videos under the same names, but for the ending; the dataset's annotation
files; `videos.parquet`, a table of its own that `data=folder` reads; and a ledger, by which a run
that was stopped goes on. A video that is there under its name is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vidtrain.data import crew
from vidtrain.data.crew import Lost
from vidtrain.data.decode import open_video
from vidtrain.data.encode import FULL, LIBAV_ERRORS, PRESETS, TUNES, Settings, encode
from vidtrain.types import Clip, DecodeError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from vidtrain.data.manifest import Manifest

FORMAT = 1  # raised when `encode` makes of a video what is worth making it anew
LEDGER = ".vidtrain-resize"
PARTS = ".vidtrain-parts"  # files being written
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


class Failed(NamedTuple):
    """A video that could not be made."""

    path: str  # its row's
    reason: str
    full: bool = False  # for want of space


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
    check_output(root, output, paths)
    targets = target_names(root, paths)
    wanted = paths
    if split is not None:
        wanted = list(dict.fromkeys(manifest.row(n).path for n in manifest.split(split).tolist()))
    with _writing(output), _Ledger(output, settings) as ledger:
        videos = {
            path: there for path in paths if (there := ledger.find(root, path, targets[path]))
        }
        before, todo = len(videos), [path for path in wanted if path not in videos]
        failed: list[Failed] = []

        def take(result: Made | Failed | Lost) -> None:
            if isinstance(result, Lost):
                result = Failed(result.job.path, result.reason)
            if isinstance(result, Made):
                videos[result.path] = result
                ledger.add(result)
            elif result.full:
                raise OSError(FULL[0], os.strerror(FULL[0]))
            else:
                failed.append(result)
            left = len(todo) - (len(videos) - before) - len(failed)
            progress(len(wanted) - left, len(wanted))

        with _parts(output) as part:
            jobs = (
                Job(path, f"{root}/{path}", f"{part}{n}", f"{output}/{targets[path]}", settings)
                for n, path in enumerate(todo)
            )
            with contextlib.closing(
                crew.run(make, jobs, workers, time_limit, take, "the codec")
            ) as run:
                for _ in run:  # `take` has had it: there, as soon as it was ready
                    pass
        if not videos:
            path, reason, _ = failed[0]
            raise UserError(f"not one video could be made; {path}: {reason}")
        _copy_lists(lists, root, output)
        _write_table(manifest, output, videos, targets)
    return Outcome(videos, targets, len(videos) - before, failed)


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


def check_output(root: str, output: Path, paths: Sequence[str]) -> None:
    """Refuse a folder where a source could be overwritten, or that is in use for something else.

    Raises:
        UserError: saying why.
    """
    base = os.path.realpath(root)
    if base == os.path.dirname(base):  # the root of all, of a table with absolute paths
        base = os.path.realpath(os.path.join(base, os.path.dirname(os.path.commonpath(paths))))
    if os.path.commonpath([base, os.path.realpath(output)]) in (base, os.path.realpath(output)):
        raise UserError(
            f"output={output} and the videos in {base} must not lie within one another;"
            " name a folder beside them"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"output={output} is a file; name a folder")
    if output.is_dir() and not (output / LEDGER).exists() and any(output.iterdir()):
        raise UserError(f"output={output} has other things in it; name a new or an empty folder")


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
    """Write one video, in a worker: under another name until it is whole and on the disk."""
    try:
        facts = os.stat(job.source)  # before reading: a change on the way makes it anew next time
        encoded = encode(job.source, job.part, job.settings)
        with open(job.part, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        os.makedirs(os.path.dirname(job.target), exist_ok=True)
        os.replace(job.part, job.target)
    except DecodeError as error:
        return Failed(job.path, error.reason)
    except LIBAV_ERRORS as error:
        full = getattr(error, "errno", None) in FULL
        return Failed(job.path, getattr(error, "strerror", None) or str(error), full)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(job.part)
    return Made(job.path, facts.st_size, facts.st_mtime_ns, size, encoded.frames, encoded.sound)


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


class _Ledger:
    """What was made of what, a line each; the newest line of a video counts."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.output = output
        self.how = [FORMAT, *settings]
        self.lines: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> _Ledger:
        self.output.mkdir(parents=True, exist_ok=True)
        self.file = open(self.output / LEDGER, "a+", encoding="utf-8")
        try:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another action=resize is writing to {self.output}") from None
            self.file.seek(0)
            text = self.file.read()
            if text and not text.endswith("\n"):
                self.file.write("\n")  # the last line was cut off
            for line in text.splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    self.lines[entry["path"]] = entry
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def find(self, root: str, path: str, target: str) -> Made | None:
        """Say what is there of a video, if it is of today's source and settings."""
        entry = self.lines.get(path)
        try:
            if entry is None or entry.pop("how") != self.how:
                return None
            made = Made(**entry)
            source = os.stat(os.path.join(root, path))
            size = (self.output / target).stat().st_size
        except (OSError, TypeError, KeyError):
            return None
        facts = (source.st_size, source.st_mtime_ns, size)
        return made if facts == (made.size, made.mtime_ns, made.bytes) else None

    def add(self, made: Made) -> None:
        self.file.write(json.dumps(made._asdict() | {"how": self.how}) + "\n")
        self.file.flush()


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Turn what the output's disk says into words for the user."""
    try:
        yield
    except OSError as error:
        room = "; make room, and the same command goes on" if error.errno in FULL else ""
        raise UserError(f"output={output} cannot be written: {error.strerror}{room}") from None


@contextlib.contextmanager
def _parts(output: Path) -> Iterator[str]:
    """Give what the names of files begin with that are being written; none of them stays."""
    parts = output / PARTS
    shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
    parts.mkdir()
    try:
        # a process of the run that was killed may still be at work on its own
        yield f"{parts}/{uuid.uuid4().hex}-"
    finally:
        shutil.rmtree(parts, ignore_errors=True)


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
