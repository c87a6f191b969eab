"""Compute the flow of a dataset's videos, once, and keep it as video.

Below the output there is for each video `forward/<its path>.mp4`, and for flow in both directions
`backward/` as well: a grey H.264 video with a picture for each field, dx on the left and dy beside it,
as bytes (`data/flow.py`). Flow is smooth and changes slowly, so that a good quality takes less room than a
picture for each component would. Each file says of itself by which method it was made. A file that is there
under its name is whole; a ledger says what it was made of, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange

from vidtrain.data.flow import (
    BOUND,
    DIRECTIONS,
    check_method,
    estimator,
    file_of,
    to_bytes,
    to_pixels,
)
from vidtrain.data.ledger import Failed, Ledger, check_output, put, work, writing
from vidtrain.data.readers.flow import FORMAT, KEY, FlowReader
from vidtrain.types import DecodeError, UserError

if TYPE_CHECKING:
    import numpy.typing as npt

    from vidtrain.data.manifest import Manifest
    from vidtrain.types import VideoReader

LEDGER = ".vidtrain-flow"
FACTS = "flow.json"  # what came of it, in a few numbers
# Seven pictures of eight that no other refers to, as `encode` has it, and nothing that pleases the eye
# alone: a clip decodes what it wants and little else.
X264 = {
    "preset": "medium", "tune": "fastdecode", "bf": "7", "b_strategy": "0", "b-pyramid": "none",
    "psy": "0",
}  # fmt: skip


class Settings(NamedTuple):
    """How flow is computed and kept."""

    method: str
    bound: float = BOUND  # pixels
    short_side: int | None = 256  # pixels of the frames that it is computed on; None: as they are
    crf: float = 12
    keyframe_every: int = 12  # fields, at most


class Job(NamedTuple):
    """A video's flow in one direction."""

    path: str  # what the ledger calls it
    source: str
    part: str  # where it is written, ...
    target: str  # ... and what it is then called
    settings: Settings
    backward: bool
    weights: str | None


class Made(NamedTuple):
    """A file of flow that is there."""

    path: str  # what the ledger calls it
    size: int  # bytes of the source ...
    mtime_ns: int  # ... and its time, when it was read
    bytes: int
    fields: int
    width: int  # pixels
    height: int
    error: float  # mean absolute error of what is within the bound, in pixels
    beyond: float  # share of the components that are beyond the bound


class Outcome(NamedTuple):
    """What became of a dataset."""

    files: dict[str, Made]  # all that are there
    made: int  # how many of them in this run
    failed: list[Failed]

    def summary(self) -> dict[str, Any]:
        """Count everything; errors are means over all values."""
        files = list(self.files.values())
        weights = [file.fields * file.width * file.height for file in files]
        fields = sum(file.fields for file in files)
        return {
            "files": len(files),
            "fields": fields,
            "bytes": sum(file.bytes for file in files),
            "bytes_per_field": sum(file.bytes for file in files) / fields,
            "mean_abs_error": float(np.average([file.error for file in files], weights=weights)),
            "beyond_bound": float(np.average([file.beyond for file in files], weights=weights)),
        }


def compute(
    manifest: Manifest,
    split: str | None,
    output: Path,
    settings: Settings,
    direction: str = "forward",
    weights: str | None = None,
    workers: int = 0,
    time_limit: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Compute the flow of a dataset's videos, of those that have none yet.

    A run that is stopped, or its machine with it, leaves whole files behind; called again, it goes on
    with the others. Flow of a video that has changed, or by other settings, is computed anew.

    Args:
        manifest: of the dataset.
        split: only its videos; None: all.
        output: the folder; made if it is not there.
        settings: how.
        direction: `forward`, or `both` for backward flow beside it, as where there is some already.
        weights: RAFT's file.
        workers: processes; 0: one for each core.
        time_limit: seconds that one video may take.
        progress: called with how many of the files are done and how many there are.

    Raises:
        UserError: a setting or a folder that cannot be used, no space left, or not one video whose
            flow could be computed.
    """
    check_settings(settings, direction, weights)
    if manifest.is_packed:
        raise UserError(
            f"{manifest.name} is packed; compute the flow of its videos before packing them, and name"
            " that folder by data.flow_root when you train on the shards"
        )
    root = str(manifest.root)
    paths = manifest.table["path"].unique().to_pylist()
    check_output(root, output, paths, LEDGER, "data.flow_root")
    wanted = paths
    if split is not None:
        wanted = list(dict.fromkeys(manifest.row(n).path for n in manifest.split(split).tolist()))
    with writing(output, "data.flow_root"), ledger_of(output, settings) as ledger:
        _refuse_another_method(ledger, settings)
        files = {
            name: there
            for path in paths
            for side in (False, True)
            if (name := file_of(path, side))
            and (there := ledger.find(name, os.path.join(root, path), output / name))
        }
        # A folder that holds both goes on to: of two methods they would not belong together.
        both = direction == "both" or (output / "backward").is_dir()
        sides = (False, True) if both else (False,)
        jobs = [
            partial(
                Job,
                path=file_of(path, side),
                source=os.path.join(root, path),
                target=str(output / file_of(path, side)),
                settings=settings,
                backward=side,
                weights=weights,
            )
            for path in wanted
            for side in sides
            if file_of(path, side) not in files
        ]

        def tell(done: int) -> None:
            total = len(wanted) * len(sides)
            progress(total - len(jobs) + done, total)

        tell(0)
        made, failed = work(make, jobs, ledger, workers, time_limit, tell, "the codec")
        source = {file_of(path, side): path for path in wanted for side in sides}
        failed = [lost._replace(path=source.get(lost.path, lost.path)) for lost in failed]
        outcome = Outcome(files | made, len(made), failed)
        if not outcome.files:
            path, reason, _ = failed[0]
            raise UserError(f"the flow of not one video could be computed; {path}: {reason}")
        _write_facts(output, settings, outcome)
    return outcome


def _refuse_another_method(ledger: Ledger, settings: Settings) -> None:
    """Leave flow alone that was computed by another method: it may have taken days.

    Raises:
        UserError: naming that method.
    """
    for line in ledger.lines.values():
        method = dict(zip(("format", *Settings._fields), line.get("how", ()), strict=False)).get(
            "method"
        )
        if method not in (None, settings.method):
            raise UserError(
                f"{ledger.output} holds flow computed by {method}; name another folder for"
                f" {settings.method} (data.flow_root=...), or delete that one"
            )


def ledger_of(output: Path, settings: Settings) -> Ledger:
    """Give the ledger of the flow that is kept in a folder."""
    return Ledger(output, LEDGER, [FORMAT, *settings], Made, "flow")


def check_settings(settings: Settings, direction: str, weights: str | None) -> None:
    """Refuse what cannot be computed or encoded.

    Raises:
        UserError: naming the key.
    """
    check_method(settings.method, "data.flow_method", weights)
    if direction not in DIRECTIONS:
        raise UserError(
            f"data.flow_direction is {direction!r}; it is one of {', '.join(DIRECTIONS)}"
        )
    for key, value, least, most, kinds in (
        ("flow.short_side", settings.short_side, 16, 4096, int),
        ("flow.keyframe_every", settings.keyframe_every, 1, 250, int),
        ("flow.crf", settings.crf, 0, 51, (int, float)),
        ("data.flow_bound", settings.bound, 0.1, 1000, (int, float)),
    ):
        if value is None and key == "flow.short_side":
            continue
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"{key} is {value!r}; it must be a number from {least} to {most}")


def make(job: Job) -> Made | Failed:
    """Compute and write the flow of one video, in a worker."""
    import torch

    torch.set_num_threads(1)  # the workers fill the cores
    done = put(job, lambda: write_checked(job))
    if isinstance(done, Failed):
        return done
    return Made(job.path, done.size, done.mtime_ns, done.bytes, *done.facts)


def write_checked(job: Job) -> tuple[int, int, int, float, float]:
    """Write the flow of a video, and open what was written.

    Returns:
        Its fields, width and height; and what `write` returns.

    Raises:
        DecodeError: the video cannot be read, or fields are missing.
    """
    from vidtrain.data.decode import open_video

    with open_video(job.source) as reader:
        count = max(1, len(reader) - 1)
        error, beyond = write(reader, job)
    with FlowReader(job.part) as made:
        if len(made) != count:
            raise DecodeError(job.source, f"its file of flow has {len(made)} fields, not {count}")
        return count, made.width, made.height, error, beyond


def write(reader: VideoReader, job: Job) -> tuple[float, float]:
    """Write the flow of an open video.

    Returns:
        The mean absolute error in pixels of what can be read of it, as far as the bound goes, and the
        share of the components that are beyond it.
    """
    settings = job.settings
    facts = {
        "vidtrain flow": FORMAT,
        "method": settings.method,
        "bound": settings.bound,
        "backward": job.backward,
    }
    # the index first: who reads over a network need not ask for the end of the file
    with av.open(
        f"file:{job.part}", "w", format="mp4", container_options={"movflags": "+faststart"}
    ) as out:
        out.metadata[KEY] = json.dumps(facts)
        sink: _Sink | None = None
        for fields in compute_fields(reader, settings, job.backward, job.weights):
            if sink is None:
                sink = _Sink(out, fields.shape[1:3], settings, reader.fps)
            for field in fields:
                sink.take(field)
        if sink is None:
            raise DecodeError(reader.path, "it has no frames")
        sink.finish()
    return sink.error / sink.values, sink.beyond / sink.values


def compute_fields(
    reader: VideoReader, settings: Settings, backward: bool, weights: str | None
) -> Iterator[npt.NDArray[np.float32]]:
    """Compute the fields between all neighbouring frames of a video, some at a time.

    Field k is between the frames k and k + 1: from the first to the second, or, backward, from the
    second to the first. A single frame has one field, without motion.

    Yields:
        `(n, H, W, 2)` pixels.
    """
    from vidtrain.data.transforms.sample import resize, short_side_size

    between = estimator(settings.method, weights)
    last: npt.NDArray[np.uint8] | None = None
    for piece in reader.pieces(range(len(reader))):
        height, width = piece.shape[-2:]
        side = settings.short_side
        if side is not None and side < min(height, width):
            piece = resize(piece, *short_side_size(height, width, side))
        frames = piece.permute(0, 2, 3, 1).numpy()
        if last is not None:
            frames = np.concatenate([last[None], frames])
        elif len(reader) == 1:
            yield np.zeros((1, *frames.shape[1:3], 2), np.float32)
        last = frames[-1].copy()
        pairs = [(n + backward, n + (not backward)) for n in range(len(frames) - 1)]
        if pairs:
            yield between(frames, pairs)


class _Sink:
    """Encodes fields, and decodes what comes out to see what that has cost."""

    def __init__(self, out: Any, size: tuple[int, int], settings: Settings, fps: float) -> None:
        self.out, self.bound = out, settings.bound
        self.height, self.width = size
        rate = Fraction(fps).limit_denominator(100_000)
        options = X264 | {"crf": str(settings.crf)}
        self.stream = out.add_stream("libx264", rate=rate, options=options)
        # grey alone: no colours that would call for even sizes
        self.stream.width, self.stream.height = 2 * self.width, self.height
        self.stream.pix_fmt = "gray"
        codec = self.stream.codec_context
        codec.gop_size, codec.thread_count = settings.keyframe_every, 1
        codec.color_range = ColorRange.JPEG  # all bytes count
        self.decoder: Any = None
        self.pending: dict[int, npt.NDArray[np.float32]] = {}  # fields that have not come out yet
        self.count = 0
        self.error = self.beyond = 0.0
        self.values = 0

    def take(self, field: npt.NDArray[np.float32]) -> None:
        codes = to_bytes(field, self.bound)
        picture = av.VideoFrame.from_ndarray(
            np.ascontiguousarray(np.concatenate([codes[..., 0], codes[..., 1]], 1)), "gray"
        )
        picture.pts, picture.time_base = self.count, 1 / self.stream.codec_context.framerate
        self.beyond += float((np.abs(field) > self.bound).sum())
        self.values += field.size
        self.pending[self.count] = field.clip(-self.bound, self.bound)
        self.count += 1
        self._pass_on(self.stream.encode(picture))

    def finish(self) -> None:
        self._pass_on(self.stream.encode(None))
        if self.decoder is not None:
            self._compare(self.decoder.decode(None))
        if self.pending:
            raise DecodeError("flow", f"{len(self.pending)} fields were lost in encoding")

    def _pass_on(self, packets: list[Any]) -> None:
        for packet in packets:
            if self.decoder is None:
                self.decoder = av.CodecContext.create("h264", "r")
                self.decoder.extradata = self.stream.codec_context.extradata
                self.decoder.thread_count = 1
            self._compare(self.decoder.decode(packet))
            self.out.mux(packet)

    def _compare(self, frames: list[Any]) -> None:
        for frame in frames:
            plane = frame.planes[0]
            rows = np.ndarray(
                (self.height, 2 * self.width), np.uint8, plane, 0, (plane.line_size, 1)
            )
            codes = np.stack([rows[:, : self.width], rows[:, self.width :]], -1)
            truth = self.pending.pop(frame.pts)
            self.error += float(np.abs(to_pixels(codes, self.bound) - truth).sum(dtype=np.float64))


def _write_facts(output: Path, settings: Settings, outcome: Outcome) -> None:
    facts = settings._asdict() | outcome.summary()
    part = output / f".{FACTS}.part"
    part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    part.replace(output / FACTS)
