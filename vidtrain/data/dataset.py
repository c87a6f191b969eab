"""From a row to a sample: open, choose frames, decode once, crop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vidtrain.data import sampling
from vidtrain.data.decode import open_video
from vidtrain.data.manifest import Row
from vidtrain.data.order import Key
from vidtrain.data.transforms import sample as geometry
from vidtrain.data.transforms.sample import Augment
from vidtrain.types import Clip, DecodeError, Failure, Sample, UserError, VideoReader

STAND_INS = 10  # rows tried in place of one that cannot be read, before giving up


class Rows(Protocol):
    """Something that hands out rows by number: a split of a manifest, or a list of files."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> Row: ...
    def absolute_path(self, row: Row) -> Path: ...


class VideoDataset(Dataset[Sample]):
    """Videos as samples, for training or for testing.

    Training (`augment` given): one random clip, one random crop, ready as `video`. Testing
    (`augment` None): `clips` x `crops` views of which each wanted frame is decoded and sent once.

    A video that cannot be read is a `Failure`: in training another row, drawn from the sample's own
    seed, stands in for it; in testing the sample is left without frames.
    """

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
        decoder: str = "auto",
        num_classes: int | None = None,
        on_error: str = "skip",
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
        settings = {"clips": clips, "crops": crops, "short_side": short_side or 1, "size": size or 1}
        for name, number in settings.items():
            if not isinstance(number, int) or number < 1:
                raise UserError(f"views.{name} is {number!r}; it must be a whole number, at least 1")
        self.size = size or clip.size
        self.short_side = short_side or self.size
        if self.size > self.short_side:
            raise UserError(
                f"views.size is {self.size}, more than views.short_side, {self.short_side}"
            )
        self.how, self.past_end = how, past_end
        self.region, self.span = region, span
        self.decoder, self.num_classes, self.on_error = decoder, num_classes, on_error

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, key: Key) -> Sample:
        """Load row `key[0]` with the random draws of seed `key[1]`."""
        index, seed = key
        rng = np.random.default_rng(seed)
        failures: list[Failure] = []
        for _ in range(STAND_INS):
            row = self.rows.row(index)
            path = self.rows.absolute_path(row)
            try:
                sample = self.load(path, row, rng)
            except DecodeError as error:
                if self.on_error == "raise":
                    raise UserError(f"{error} (data.on_error=skip would go on without)") from None
                failures.append(Failure(index, str(path), error.reason))
                if self.augment is None:
                    return {"index": index, "seed": seed, "failures": failures}
                index = int(rng.integers(len(self)))
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

    def label(self, row: Row) -> Tensor:
        """Give the class as `()` int64, -1 where unknown, or `(K,)` zeros and ones for many."""
        if self.num_classes is None:
            return torch.tensor(row.labels[0] if row.labels else -1)
        many = torch.zeros(self.num_classes)
        many[list(row.labels)] = 1
        return many

    def load(self, path: Path, row: Row, rng: np.random.Generator) -> Sample:
        """Open, choose, decode, crop.

        Raises:
            DecodeError: naming the file and the reason.
        """
        with open_video(path, self.decoder) as reader:
            first, length = stretch(reader, row, self.span)
            if self.augment is not None:
                indices = first + self.choose(length, reader.fps, 1, rng)
                sample: Sample = {"video": self.training_view(reader, indices, self.augment, rng)}
            else:
                indices = first + self.choose(length, reader.fps, self.clips, None)
                sample = self.testing_views(reader, indices)
            sample["fps"] = self.seen_rate(reader.fps, length)
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
        if self.how == "segments":
            return sampling.segments(length, count, views, rng)
        if rng is None:
            return sampling.uniform_clips(length, count, step, views, self.past_end)
        return sampling.random_clips(length, count, step, views, rng, self.past_end)

    def training_view(
        self,
        reader: VideoReader,
        indices: sampling.Indices,
        augment: Augment,
        rng: np.random.Generator,
    ) -> Tensor:
        """Decode one clip and crop it at random: `(1, T, C, H, W)` uint8."""
        top, left, height, width = self.region_of(reader)
        box = geometry.random_geometry(height, width, self.size, augment, rng)
        frames = reader.frames(indices[0].tolist())
        frames = frames[..., top : top + height, left : left + width]
        return geometry.crop(frames, box, self.size)[None]

    def testing_views(self, reader: VideoReader, indices: sampling.Indices) -> Sample:
        """Decode every wanted frame once; say which frames and which crop make each view."""
        wanted, position = np.unique(indices, return_inverse=True)
        top, left, height, width = self.region_of(reader)
        frames = reader.frames(wanted.tolist())[..., top : top + height, left : left + width]
        frames = geometry.resize(frames, *geometry.short_side_size(height, width, self.short_side))
        places = geometry.spread_crops(frames.shape[-2], frames.shape[-1], self.size, self.crops)
        # View v is clip v // crops, crop v % crops.
        view_frames = torch.from_numpy(position.reshape(indices.shape))
        return {
            "frames": frames,
            "view_frames": view_frames.repeat_interleave(self.crops, 0),
            "view_crops": torch.tensor([(*place, self.size) for place in places] * len(indices)),
        }

    def region_of(self, reader: VideoReader) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part that counts, in pixels."""
        if self.region is None:
            return 0, 0, reader.height, reader.width
        return geometry.region_box(self.region, reader.height, reader.width)


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
