"""From a row to a sample: open, choose frames, decode once, crop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vidtrain.data import sampling
from vidtrain.data.collate import Empty, plain_memory
from vidtrain.data.fields import Flow, Wanted
from vidtrain.data.manifest import Row
from vidtrain.data.multigrid import Shape
from vidtrain.data.order import Key
from vidtrain.data.sources import Sources
from vidtrain.data.spill import Spill
from vidtrain.data.transforms import sample as geometry
from vidtrain.data.transforms.sample import Augment, Geometry
from vidtrain.types import Box, Clip, DecodeError, Failure, Sample, UserError, VideoReader

STAND_INS = 10  # rows tried in place of one that cannot be read, before giving up


class Rows(Protocol):
    """Something that hands out rows by number: a split of a manifest, or a list of files."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> Row:
        """Give row `index`."""
        ...

    def location(self, row: Row) -> str:
        """Say what messages call the row's video: its file, where it has one of its own."""
        ...


class Files:
    """Files as rows without labels."""

    def __init__(self, paths: Sequence[Path | str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def row(self, index: int) -> Row:
        """Give file `index` as a row."""
        return Row(str(self.paths[index]), (), None, None, "", None)

    def location(self, row: Row) -> str:
        """Say where it lies."""
        return row.path


class VideoDataset(Dataset[Sample]):
    """Videos as samples, for training or for testing.

    Training (`augment` given): random clips, each with a random crop, ready as `video`. Testing
    (`augment` None): `clips` x `crops` views of which each wanted frame is decoded and sent once.

    A video that cannot be read is a `Failure`: in training another row, drawn from the sample's own
    seed, stands in for it; in testing the sample is left without frames.

    Args:
        rows: what there is.
        clip: what the model eats.
        augment: how a training clip is disturbed; None for testing.
        clips: views in time, of a video under test.
        crops: views in space, of each of them.
        short_side: what the shorter side of a frame under test is resized to, in pixels.
        size: of its crops, in pixels.
        how: `random` or `segments`.
        past_end: `hold` or `loop`.
        region: `[left, top, width, height]`, relative, cut out before everything else.
        span: `[from, to]`, seconds that count.
        num_classes: of labels that are sets; None where there is one label a video.
        on_error: `skip` or `raise`.
        sources: what opens a row's video; None: plainly, from its file.
        flow: how samples come by flow; None: they have none.
        inputs: of `video` and `flow`, what the model takes; frames that it does not take are not
            even decoded.
        spill: the folder for frames of a video under test that take more than `spill_above` bytes;
            None: memory takes any.
        every: in place of `clips`, a clip at every so many frames (counted as `clip.stride` is), over
            the whole video.

    Attributes:
        watch: told row and path of each video before it is opened.
        lost: rows that count as unreadable, and why: what a worker died of.
        empty: makes the memory for frames that come in pieces; a worker's is shared with the main
            process, and not new each time.
    """

    watch: Callable[[int, str], None] | None = None
    empty: Empty = staticmethod(plain_memory)

    def __init__(
        self,
        rows: Rows,
        clip: Clip,
        *,
        augment: Augment | None = None,
        clips: int = 1,
        crops: int = 1,
        short_side: int | None = None,
        size: int | None = None,
        how: str = "random",
        past_end: sampling.PastEnd = "hold",
        region: Sequence[float] | None = None,
        span: Sequence[float] | None = None,
        num_classes: int | None = None,
        on_error: str = "skip",
        sources: Sources | None = None,
        flow: Flow | None = None,
        inputs: Sequence[str] = ("video",),
        spill: Path | None = None,
        spill_above: int = 512 << 20,
        every: int | None = None,
    ) -> None:
        if how not in ("random", "segments"):
            raise UserError(f"data.sampling is '{how}'; it is random or segments")
        if on_error not in ("skip", "raise"):
            raise UserError(f"data.on_error is '{on_error}'; it is skip or raise")
        if region is not None:
            geometry.region_box(region, 1, 1)  # refuse a bad one now, not in a worker
        self.rows, self.clip, self.augment = rows, clip, augment
        self.clips, self.crops = clips, crops
        if span is not None and not (len(span) == 2 and 0 <= span[0] < span[1]):
            raise UserError(f"data.span is {list(span)}; it must be [from, to] in seconds")
        settings = {
            "clips": clips,
            "crops": crops,
            "short_side": short_side or 1,
            "size": size or 1,
        }
        for name, number in settings.items():
            if not isinstance(number, int) or number < 1:
                raise UserError(
                    f"views.{name} is {number!r}; it must be a whole number, at least 1"
                )
        self.size = size or clip.size
        self.short_side = short_side or self.size
        if self.size > self.short_side:
            raise UserError(
                f"views.size is {self.size}, more than views.short_side, {self.short_side}"
            )
        self.how, self.past_end = how, past_end
        self.region, self.span = region, span
        self.num_classes, self.on_error = num_classes, on_error
        self.sources = sources or Sources()
        self.has_video = "video" in inputs
        self.flow = flow if "flow" in inputs else None
        if "flow" in inputs and flow is None:
            raise UserError(
                "the model takes optical flow; add data.flow=stored, or a method to compute it"
            )
        self.spill, self.spill_above = spill, spill_above
        self.every = every
        self.lost: dict[int, str] = {}

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, key: Key) -> Sample:
        """Load row `key[0]` with the random draws of seed `key[1]`, as a clip of the shape `key[2]`, if any."""
        index, seed, *shape = key
        seen = self.seen_as(*shape) if shape else self
        failures: list[Failure] = []
        for attempt in range(STAND_INS):
            # Anew for each, so that what is drawn does not depend on how far the last one came.
            rng = np.random.default_rng([seed, attempt])
            row = self.rows.row(index)
            name = self.rows.location(row)
            if self.watch is not None:
                self.watch(index, name)
            try:
                if index in self.lost:
                    raise DecodeError(name, self.lost[index])
                sample = seen.load(row, name, rng)
            except DecodeError as error:
                if self.on_error == "raise":
                    raise UserError(f"{error} (data.on_error=skip would go on without)") from None
                failures.append(Failure(index, name, error.reason))
                if self.augment is None:
                    return {"index": index, "seed": seed, "failures": failures}
                index = int(np.random.default_rng([attempt, seed]).integers(len(self)))
                continue
            sample["index"], sample["seed"] = index, seed
            sample["failures"] = failures
            sample["label"] = self.label(row)
            return sample
        listed = "; ".join(f"{failure.path}: {failure.reason}" for failure in failures[:3])
        raise UserError(
            f"{STAND_INS} videos in a row cannot be read ({listed}; ...);"
            " `vidtrain data action=check` lists what is wrong with each"
        )

    def seen_as(self, shape: Shape) -> VideoDataset:
        """Give the same videos as clips of another shape."""
        seen = copy.copy(self)
        seen.clip = shape.of(self.clip)
        seen.size = shape.size
        return seen

    def label(self, row: Row) -> Tensor:
        """Give the class as `()` int64, -1 where unknown, or `(K,)` zeros and ones for many."""
        if self.num_classes is None:
            return torch.tensor(row.labels[0] if row.labels else -1)
        many = torch.zeros(self.num_classes)
        many[list(row.labels)] = 1
        return many

    def load(self, row: Row, name: str, rng: np.random.Generator) -> Sample:
        """Open, choose, decode, crop.

        Raises:
            DecodeError: naming the file and the reason.
        """
        with self.sources.open(name, row) as reader:
            first, length = stretch(reader, row, self.span)
            if self.augment is not None:
                count = self.augment.repeats
                indices = first + self.choose(length, reader.fps, count, rng)
                sample = self.training_sample(reader, indices, row, self.augment, rng)
            else:
                indices = first + self.choose(length, reader.fps, self.clips, None)
                sample = self.testing_sample(reader, indices, row)
            sample["fps"] = self.seen_rate(reader.fps, length)
            if self.every is not None:
                sample["extent"] = length, reader.fps
            return sample

    def seen_rate(self, fps: float, length: int) -> float:
        """Frames per second as the model sees them."""
        if self.how == "segments":
            return fps * self.clip.num_frames / length
        return fps / sampling.step(self.clip, fps)

    def choose(
        self, length: int, fps: float, views: int, rng: np.random.Generator | None
    ) -> sampling.Indices:
        """Choose frames, `(V, T)`; evenly spread without `rng`."""
        count, step = self.clip.num_frames, sampling.step(self.clip, fps)
        if self.every is not None:
            hop = sampling.hop(self.every, self.clip, fps)
            return sampling.dense_windows(length, count, step, hop, self.past_end)
        if self.how == "segments":
            return sampling.segments(length, count, views, rng)
        if rng is None:
            return sampling.uniform_clips(length, count, step, views, self.past_end)
        return sampling.random_clips(length, count, step, views, rng, self.past_end)

    def training_sample(
        self,
        reader: VideoReader,
        indices: sampling.Indices,
        row: Row,
        augment: Augment,
        rng: np.random.Generator,
    ) -> Sample:
        """Give the crops of each clip's frames, of its flow, or of both, from the same boxes."""
        if self.flow is None:
            return {"video": self.training_views(reader, indices, augment, rng)}
        wanted = self.flow.wanted(indices, len(reader))
        if self.flow.is_computed:  # between crops, in the pixels that the model sees
            return self.computed_views(reader, indices, wanted, augment, rng)
        sample: Sample = {}
        boxes: list[Geometry] = []
        if self.has_video:
            sample["video"] = self.training_views(reader, indices, augment, rng, boxes)
        else:
            boxes = self.draw(reader.height, reader.width, len(indices), augment, rng)
        height, width = reader.height, reader.width
        scaled: list[Geometry] = []

        def choose(h: int, w: int) -> Box:
            """Find the boxes in fields, which may have another size than the frames."""
            scaled[:] = [box.scaled(h / height, w / width) for box in boxes]
            return geometry.around(scaled)

        pieces = list(self.flow.stored(row.path, reader.path, wanted, len(reader), choose))
        fields = torch.cat([piece.fields for piece in pieces])
        steps = torch.cat([self.flow.steps(piece) for piece in pieces])
        top, left, *_ = geometry.around(scaled)
        crops, worth = [], []
        for position, box in zip(wanted.position, scaled, strict=True):
            crop, across, down = geometry.crop_fields(
                fields[position], box.moved(-top, -left), self.size
            )
            crops.append(crop)
            worth.append(steps[position] * torch.tensor([across, down]))
        sample["flow"], sample["flow_steps"] = torch.stack(crops), torch.stack(worth)
        return sample

    def computed_views(
        self,
        reader: VideoReader,
        indices: sampling.Indices,
        wanted: Wanted,
        augment: Augment,
        rng: np.random.Generator,
    ) -> Sample:
        """Crop each clip's frames and those that its flow leads to, and compute flow between them."""
        assert self.flow is not None
        ends = np.stack([wanted.first, wanted.other])[:, wanted.position]  # (2, V, T)
        views = [np.unique(view) for view in np.concatenate([indices, *ends], 1)]
        longest = max(map(len, views))
        table = np.stack([np.pad(view, (0, longest - len(view)), "edge") for view in views])
        crops = self.training_views(reader, table, augment, rng)  # (V, longest, C, size, size)
        flow, steps = [], []
        for frames, view, first, other in zip(crops, views, *ends, strict=True):
            fields = self.flow.between(
                frames, np.searchsorted(view, first), np.searchsorted(view, other)
            )
            flow.append(fields[0])
            steps.append(fields[1])
        sample: Sample = {"flow": torch.stack(flow), "flow_steps": torch.stack(steps)}
        if self.has_video:
            places = np.stack([np.searchsorted(*pair) for pair in zip(views, indices, strict=True)])
            rows = crops.movedim(-3, -1)[np.arange(len(places))[:, None], places]
            sample["video"] = rows.movedim(-1, -3)
        return sample

    def draw(
        self, height: int, width: int, count: int, augment: Augment, rng: np.random.Generator
    ) -> list[Geometry]:
        """Draw the boxes of `count` views, in pixels of whole frames."""
        top, left, h, w = self.region_of(height, width)
        return [
            geometry.random_geometry(h, w, self.size, augment, rng).moved(top, left)
            for _ in range(count)
        ]

    def training_views(
        self,
        reader: VideoReader,
        indices: sampling.Indices,
        augment: Augment,
        rng: np.random.Generator,
        boxes: list[Geometry] | None = None,
    ) -> Tensor:
        """Decode once, crop each clip at random: `(V, T, C, H, W)` uint8.

        Args:
            reader: of the video.
            indices: `(V, T)`.
            augment: how boxes are drawn.
            rng: what they are drawn with.
            boxes: gets what was drawn, a box for each view, in pixels of whole frames.
        """
        wanted, position = np.unique(indices, return_inverse=True)
        drawn: list[Geometry] = [] if boxes is None else boxes

        def choose(height: int, width: int) -> Box:
            """Draw a box for each view; only what lies in one of them is converted."""
            drawn[:] = self.draw(height, width, len(indices), augment, rng)
            return geometry.around(drawn)

        pieces = reader.pieces(wanted.tolist(), choose)
        if len(indices) == 1:  # pieces are no larger than the box, and need not stay
            cropped = [
                geometry.crop(piece, drawn[0]._replace(top=0, left=0), self.size)
                for piece in pieces
            ]
            return gathered(cropped, position.reshape(1, -1))
        frames = list(pieces)
        top, left, *_ = geometry.around(drawn)
        clips = [
            geometry.crop(gathered(frames, places), box.moved(-top, -left), self.size)
            for places, box in zip(position.reshape(indices.shape), drawn, strict=True)
        ]
        return torch.stack(clips)

    def testing_sample(self, reader: VideoReader, indices: sampling.Indices, row: Row) -> Sample:
        """Decode every wanted frame and field once; say which of them and which crop make each view."""
        wanted, position = np.unique(indices, return_inverse=True)
        frames, fields = Stack(len(wanted), self.room), None
        if self.flow is None:
            for piece in self.resized(reader, wanted):
                frames.add(piece)
        else:
            called = self.flow.wanted(indices, len(reader))
            fields = Stack(len(called.first), self.room)
            if self.flow.is_computed:
                steps = self.add_computed(reader, wanted, called, frames, fields)
            else:
                steps = self.add_stored(reader, wanted, called, frames, fields, row)
        sample: Sample = {}
        # View v is clip v // crops, crop v % crops.
        if self.has_video:
            sample["frames"] = frames.whole  # type: ignore[typeddict-item]  # or a Spill
            view_frames = torch.from_numpy(position.reshape(indices.shape))
            sample["view_frames"] = view_frames.repeat_interleave(self.crops, 0)
        if fields is not None:
            sample["fields"] = fields.whole  # type: ignore[typeddict-item]  # or a Spill
            view_fields = torch.from_numpy(called.position).repeat_interleave(self.crops, 0)
            sample["view_fields"] = view_fields
            sample["flow_steps"] = steps[view_fields]
        height, width = (frames if fields is None else fields).size
        places = geometry.spread_crops(height, width, self.size, self.crops)
        sample["view_crops"] = np.array([(*place, self.size) for place in places] * len(indices))
        return sample

    def resized(self, reader: VideoReader, wanted: np.ndarray) -> Iterator[Tensor]:
        """Decode frames, cut to the region that counts, at the size that views are cropped from."""
        for piece in reader.pieces(wanted.tolist(), self.region_of):
            height, width = piece.shape[-2:]
            height, width = geometry.short_side_size(height, width, self.short_side)
            yield geometry.resize(piece, height, width)

    def add_stored(
        self,
        reader: VideoReader,
        wanted: np.ndarray,
        called: Wanted,
        frames: Stack,
        fields: Stack,
        row: Row,
    ) -> Tensor:
        """Read frames and fields, these at the size of those; say what their steps are worth, `(M, 2)`."""
        assert self.flow is not None
        if self.has_video:
            for piece in self.resized(reader, wanted):
                frames.add(piece)
            height, width = frames.size
        else:
            *_, height, width = self.region_of(reader.height, reader.width)
            height, width = geometry.short_side_size(height, width, self.short_side)
        steps = []
        for part in self.flow.stored(row.path, reader.path, called, len(reader), self.region_of):
            h, w = part.fields.shape[-2:]
            fields.add(geometry.resize_fields(part.fields, height, width))
            steps.append(self.flow.steps(part) * torch.tensor([width / w, height / h]))
        return torch.cat(steps)

    def add_computed(
        self,
        reader: VideoReader,
        wanted: np.ndarray,
        called: Wanted,
        frames: Stack,
        fields: Stack,
    ) -> Tensor:
        """Read frames and compute fields between them as they come; say what their steps are worth."""
        assert self.flow is not None
        read = np.union1d(wanted, np.concatenate([called.first, called.other]))
        later = np.maximum(called.first, called.other)
        steps = torch.empty(len(later), 2)
        done, last = 0, None
        for piece in self.resized(reader, read):
            here = read[done : done + len(piece)]
            if self.has_video:
                chosen = torch.from_numpy(np.isin(here, wanted))
                frames.add(piece if chosen.all() else piece[chosen])
            ready = np.flatnonzero((later >= here[0]) & (later <= here[-1]))
            if last is not None:  # a field may lead to it, or from it
                here = read[done - 1 : done + len(piece)]
                piece = torch.cat([last, piece])
            if len(ready):
                first, other = (np.searchsorted(here, end[ready]) for end in called[:2])
                codes, steps[torch.from_numpy(ready)] = self.flow.between(piece, first, other)
                fields.add(codes, ready)
            done += len(here) - (last is not None)
            last = piece[-1:].clone()
        return steps

    def room(self, shape: tuple[int, int, int, int]) -> Tensor | Spill:
        """Make room for `(N, H, W, C)` bytes, as `(N, C, H, W)`."""
        if self.spill is not None and np.prod(shape) > self.spill_above:
            return Spill(shape, self.spill)
        return self.empty(shape, torch.uint8).permute(0, 3, 1, 2)

    def region_of(self, height: int, width: int) -> Box:
        """Top, left, height and width of the part that counts, in pixels."""
        if self.region is None:
            return 0, 0, height, width
        return geometry.region_box(self.region, height, width)


class Stack:
    """Pictures that come a piece at a time, together in memory or in a file.

    Args:
        count: of all of them.
        room: makes the place for `(N, H, W, C)` bytes, as `(N, C, H, W)`.
    """

    def __init__(self, count: int, room: Callable[..., Tensor | Spill]) -> None:
        self.count, self.room = count, room
        self.size = (0, 0)  # height and width in pixels, known once there is one
        self.done = 0
        self._whole: Tensor | Spill | None = None

    def add(self, piece: Tensor, places: np.ndarray | None = None) -> None:
        """Take `(n, C, H, W)` pictures, the next ones unless their places are given, ascending."""
        channels, height, width = piece.shape[1:]
        self.size = height, width
        if len(piece) == self.count:
            self._whole = piece
            return
        if self._whole is None:
            self._whole = self.room((self.count, height, width, channels))
        memory = self._whole.tensor if isinstance(self._whole, Spill) else self._whole
        if places is None:
            memory[self.done : self.done + len(piece)] = piece
        else:
            memory[torch.from_numpy(places)] = piece
        self.done += len(piece)

    @property
    def whole(self) -> Tensor | Spill:
        """All of them: `(N, C, H, W)`."""
        assert self._whole is not None
        return self._whole


def gathered(pieces: Sequence[Tensor], places: np.ndarray) -> Tensor:
    """Take frames, `(..., C, H, W)` with C innermost in memory, by an array of their places."""
    frames = torch.cat([piece.permute(0, 2, 3, 1) for piece in pieces])
    if not np.array_equal(places.ravel(), np.arange(len(frames))):
        frames = frames[torch.from_numpy(places.ravel())]
    return frames.view(*places.shape, *frames.shape[1:]).movedim(-1, -3)


def stretch(reader: VideoReader, row: Row, span: Sequence[float] | None) -> tuple[int, int]:
    """Find the first frame that counts and how many do: the row's own seconds, else `data.span`.

    Raises:
        DecodeError: the video has no frames there.
    """
    length = len(reader)
    start, end = (row.start, row.end) if span is None else (span[0], span[1])
    if row.start is not None or row.end is not None:
        start, end = row.start, row.end
    first = 0 if start is None else max(0, round(start * reader.fps))
    last = length if end is None else min(length, round(end * reader.fps))
    if length < 1:
        raise DecodeError(reader.path, "it has no frames")
    if first >= length or last <= first:
        raise DecodeError(
            reader.path,
            f"nothing between {start} and {end} s: it has {length / reader.fps:.2f} s",
        )
    return first, last - first
