"""Which frames make a clip: pure index arithmetic, numbers in and an index array out.

No file, no state. Every function takes the number of frames, the distance `step` between two
sampled frames (in the video's own frames, need not be whole) and returns `(V, T)` int64 indices in
`0 <= i < length`. A clip longer than its video holds the last frame or starts over: `past_end`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from vidtrain.types import Clip, UserError

PastEnd = Literal["hold", "loop"]
Indices = npt.NDArray[np.int64]


def step(clip: Clip, fps: float) -> float:
    """Frames of the video between two frames of the clip.

    With `clip.fps` the stride is counted at that rate, whatever the video's: 16 frames at 5 fps
    are `Clip(num_frames=16, stride=1, fps=5)`, every sixth frame of a 30 fps video.
    """
    return clip.stride * (fps / clip.fps if clip.fps else 1.0)


def hop(every: int, clip: Clip, fps: float) -> int:
    """Frames of the video from one window to the next, where `every` is counted as the stride is."""
    return max(1, round(every * step(clip, fps) / clip.stride))


def _gather(starts: npt.NDArray[np.float64], num_frames: int, step: float) -> npt.NDArray[np.int64]:
    """Frames at `start, start + step, ...` for each start, rounded down: `(V, T)`."""
    offsets = np.arange(num_frames) * step
    # A hair is added before rounding down: 3 * 0.1 * 10 is 2.9999999999999996.
    return np.floor(starts[:, None] + offsets[None, :] + 1e-6).astype(np.int64)


def _bound(indices: npt.NDArray[np.int64], length: int, past_end: PastEnd) -> Indices:
    """Keep indices inside the video."""
    if length < 1:
        raise ValueError("a video without frames has no clips")
    if past_end == "loop":
        return np.asarray(indices % length)
    if past_end == "hold":
        return np.asarray(indices.clip(0, length - 1))
    raise UserError(f"data.past_end is '{past_end}'; it is hold or loop")


def _slack(length: int, num_frames: int, step: float) -> float:
    """How far a clip can move inside its video; 0 for one that does not fit."""
    return max(0.0, length - 1 - (num_frames - 1) * step)


def random_clips(
    length: int,
    num_frames: int,
    step: float,
    views: int,
    rng: np.random.Generator,
    past_end: PastEnd = "hold",
) -> Indices:
    """Draw clips anywhere in the video, every start equally likely."""
    starts = np.floor(rng.random(views) * (np.floor(_slack(length, num_frames, step) + 1e-6) + 1))
    return _bound(_gather(starts, num_frames, step), length, past_end)


def uniform_clips(
    length: int, num_frames: int, step: float, views: int, past_end: PastEnd = "hold"
) -> Indices:
    """Spread clips evenly: the first at the start, the last at the end, a single one in the middle."""
    slack = _slack(length, num_frames, step)
    starts = np.linspace(0.0, slack, views) if views > 1 else np.array([slack / 2])
    return _bound(_gather(np.floor(starts + 1e-6), num_frames, step), length, past_end)


def segments(
    length: int, num_frames: int, views: int, rng: np.random.Generator | None = None
) -> Indices:
    """Cut the video into T equal stretches and take one frame of each (TSN, Wang et al. 2016, 3.1).

    With `rng` a random one, else view `v` of `V` takes the frame at `(v + 1/2) / V` of each stretch:
    the middle for one view. A video shorter than T repeats frames.
    """
    edges = np.arange(num_frames) * (length / num_frames)
    if rng is None:
        inside = np.repeat((np.arange(views)[:, None] + 0.5) / views, num_frames, axis=1)
    else:
        inside = rng.random((views, num_frames))
    return _bound(
        np.floor(edges[None, :] + inside * (length / num_frames) + 1e-6).astype(np.int64),
        length,
        "hold",
    )


def dense_windows(
    length: int, num_frames: int, step: float, hop: int, past_end: PastEnd = "hold"
) -> Indices:
    """Slide a window over the whole video, `hop` frames at a time; every frame up to the last is seen."""
    if hop < 1:
        raise UserError(f"a window moves by {hop} frames; it must be at least 1")
    slack = _slack(length, num_frames, step)
    starts = np.arange(0, np.floor(slack) + hop, hop, dtype=np.float64).clip(max=np.floor(slack))
    return _bound(_gather(np.unique(starts), num_frames, step), length, past_end)
