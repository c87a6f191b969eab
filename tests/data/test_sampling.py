"""Which frames make a clip: tables of cases, no video needed."""

import numpy as np
import pytest

from vidtrain.data import sampling
from vidtrain.types import Clip, UserError

COLORS = {"mean": [0.5] * 3, "std": [0.5] * 3}


def clip(**changes):
    return Clip(**{"num_frames": 4, "stride": 2, "size": 32, **COLORS, **changes})


def test_step_counts_the_stride_in_the_clips_own_rate():
    assert sampling.step(clip(stride=4), fps=30) == 4
    assert sampling.step(clip(stride=1, fps=5), fps=30) == 6  # the lecture's 16 frames at 5 fps
    assert sampling.step(clip(stride=8, fps=30), fps=25) == pytest.approx(8 * 25 / 30)
    assert sampling.step(clip(stride=1, fps=30), fps=15) == 0.5  # a slow video repeats frames


@pytest.mark.parametrize(
    ("length", "count", "step", "views", "expected"),
    [
        (10, 4, 2, 1, [[1, 3, 5, 7]]),  # slack 3, half of it rounded down
        (7, 4, 2, 1, [[0, 2, 4, 6]]),  # just fits
        (16, 4, 2, 4, [[0, 2, 4, 6], [3, 5, 7, 9], [6, 8, 10, 12], [9, 11, 13, 15]]),
        (3, 4, 1, 1, [[0, 1, 2, 2]]),  # too short: the last frame is held
        (1, 3, 5, 2, [[0, 0, 0], [0, 0, 0]]),
        (30, 5, 1, 3, [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16], [25, 26, 27, 28, 29]]),
        (75, 16, 5, 1, [[0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 74]]),
        (300, 16, 6, 1, [list(range(104, 104 + 96, 6))]),
        (100, 1, 1, 3, [[0], [49], [99]]),  # single frames: first, middle, last
    ],
)
def test_uniform_clips(length, count, step, views, expected):
    assert sampling.uniform_clips(length, count, step, views).tolist() == expected


def test_uniform_clips_can_start_over():
    assert sampling.uniform_clips(3, 7, 1, 1, "loop").tolist() == [[0, 1, 2, 0, 1, 2, 0]]


def test_fractional_steps_do_not_lose_a_frame_to_rounding():
    # 29.97 fps seen at 29.97 fps is every frame, though the quotient is not exactly 1.
    step = sampling.step(clip(stride=1, fps=29.97), fps=30000 / 1001)
    assert sampling.uniform_clips(50, 50, step, 1).tolist() == [list(range(50))]
    # A 25 fps video at 10 fps: 0, 2.5, 5, 7.5, ...
    assert sampling.uniform_clips(9, 4, 2.5, 1).tolist() == [[0, 2, 5, 7]]


def test_random_clips_start_everywhere_equally_often_and_stay_inside():
    rng = np.random.default_rng(0)
    clips = sampling.random_clips(10, 4, 2, 4000, rng)
    starts, counts = np.unique(clips[:, 0], return_counts=True)
    assert starts.tolist() == [0, 1, 2, 3]
    assert counts.min() > 900
    assert (np.diff(clips, axis=1) == 2).all()
    assert clips.max() == 9


def test_random_clips_of_a_short_video_hold_or_loop():
    rng = np.random.default_rng(0)
    assert sampling.random_clips(2, 4, 1, 1, rng).tolist() == [[0, 1, 1, 1]]
    assert sampling.random_clips(2, 4, 1, 1, rng, "loop").tolist() == [[0, 1, 0, 1]]
    with pytest.raises(UserError, match=r"data\.past_end"):
        sampling.random_clips(2, 4, 1, 1, rng, "wrap")


def test_segments_take_one_frame_of_each_stretch():
    assert sampling.segments(16, 4, 1).tolist() == [[2, 6, 10, 14]]
    assert sampling.segments(16, 4, 2).tolist() == [[1, 5, 9, 13], [3, 7, 11, 15]]
    assert sampling.segments(2, 4, 1).tolist() == [[0, 0, 1, 1]]
    rng = np.random.default_rng(0)
    drawn = sampling.segments(40, 4, 500, rng)
    assert (drawn // 10 == np.arange(4)).all()
    assert len(np.unique(drawn)) == 40  # every frame has its turn


@pytest.mark.parametrize(
    ("length", "hop", "expected"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (6, 1, [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]),
        (9, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [5, 6, 7, 8]]),  # the last one is moved back
        (3, 4, [[0, 1, 2, 2]]),
    ],
)
def test_dense_windows_see_every_frame(length, hop, expected):
    windows = sampling.dense_windows(length, 4, 1, hop)
    assert windows.tolist() == expected
    assert set(windows.ravel()) == set(range(length))


def test_dense_windows_must_move():
    with pytest.raises(UserError, match="at least 1"):
        sampling.dense_windows(10, 4, 1, 0)


def test_a_clip_refuses_what_no_sampler_could_use():
    with pytest.raises(UserError, match=r"clip\.num_frames"):
        clip(num_frames=0)
    with pytest.raises(UserError, match=r"clip\.fps"):
        clip(fps=0)
