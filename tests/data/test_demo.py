"""The built-in videos: nothing but the motion tells the class, and the files are real."""

import os
from dataclasses import replace

import av
import numpy as np
import pytest

from vidtrain.data.prepare import demo
from vidtrain.data.prepare.demo import HEIGHT, MOTIONS, RADIUS, WIDTH, Scene, Thing
from vidtrain.types import UserError

PAIRS = list(zip(MOTIONS[::2], MOTIONS[1::2], strict=True))
SIZES = (2, 1, 1)


def scene(number: int, **changes) -> Scene:
    return replace(Scene.draw(np.random.default_rng([7, number])), **changes)


def decode(path) -> tuple[np.ndarray, av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), stream


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "demo"
    return root, demo.prepare(root, scenes=SIZES)


@pytest.mark.parametrize("motion, reverse", PAIRS)
@pytest.mark.parametrize("number", range(3))
def test_the_reverse_motion_is_the_film_played_backwards(motion, reverse, number):
    forwards, backwards = (demo.render(scene(number), name) for name in (motion, reverse))
    assert np.array_equal(forwards[::-1], backwards)
    assert not np.array_equal(forwards, backwards)


def test_all_motions_have_the_middle_in_common():
    films = [demo.render(scene(3, num_frames=9), motion) for motion in MOTIONS]
    for film in films[1:]:
        assert np.array_equal(film[4], films[0][4])
        assert not np.array_equal(film[0], films[0][0])


@pytest.mark.parametrize("motion", MOTIONS)
def test_poses_are_spread_evenly_at_any_time(motion):
    rng = np.random.default_rng(0)
    things = [Thing.draw(rng) for _ in range(2000)]
    even = (np.arange(len(things)) + 0.5) / len(things)
    for time in (-0.9, -0.2, 0.0, 0.7):
        poses = [demo.pose(thing, motion, time) for thing in things]
        shares = {
            "x": np.array([pose["x"] for pose in poses]) / WIDTH,
            "y": np.array([pose["y"] for pose in poses]) / HEIGHT,
            "radius": np.log([pose["radius"] / RADIUS[0] for pose in poses])
            / np.log(RADIUS[1] / RADIUS[0]),
            "angle": np.array([pose["angle"] for pose in poses]) / (2 * np.pi) % 1,
        }
        for name, values in shares.items():
            # Kolmogorov and Smirnov's distance: 0.044 is passed once in a thousand even draws.
            assert np.abs(np.sort(values) - even).max() < 0.044, (name, time)


@pytest.mark.parametrize("number", range(3))
def test_what_leaves_at_an_edge_comes_back_at_the_other(number):
    empty = np.zeros((3, HEIGHT, WIDTH), np.float32)
    (thing, *_) = scene(number).movers
    plain, moved = empty.copy(), empty.copy()
    demo._paint(plain, thing, 40.25, 30.75, RADIUS[1], 1.0)
    demo._paint(moved, thing, 40.25 + 50, 30.75 - 29, RADIUS[1], 1.0)
    assert plain.any()
    assert not plain[:, 0].any() and not plain[..., 0].any()  # whole: reaches no edge
    assert np.array_equal(np.roll(plain, (-29, 50), (1, 2)), moved)


def spot_and_body(number: int, motion: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Film one object, red with a green spot: centres `(T, 2)` of body and spot, and the area."""
    (thing, *_) = scene(number).movers
    red, green = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
    thing = replace(thing, x=48.0, y=36.0, size=0.5, colors=np.array([red, red, green], np.float32))
    empty = np.zeros((3, HEIGHT, WIDTH), np.float32)
    film = demo.render(scene(number, background=empty, movers=(thing,), num_frames=6), motion)
    masks = film[..., 0] + film[..., 1] > 127, film[..., 1] > 127
    centres = [np.array([np.argwhere(frame).mean(0)[::-1] for frame in mask]) for mask in masks]
    return *centres, masks[0].sum((1, 2)).tolist()


@pytest.mark.parametrize("number", range(3))
def test_motions_do_as_they_are_called(number):
    steps = {
        "left": (-1, 0),
        "right": (1, 0),
        "up": (0, -1),
        "down": (0, 1),
    }  # rows count downwards
    for motion, step in steps.items():
        body, _, _ = spot_and_body(number, motion)
        path = body[-1] - body[0]
        assert path @ step > 2 and abs(path @ step[::-1]) < 0.5, motion
    for motion, order in (("grow", 1), ("shrink", -1)):
        _, _, area = spot_and_body(number, motion)
        assert area[::order] == sorted(area) and max(area) > 1.1 * min(area), motion
    for motion, sense in (("clockwise", 1), ("counterclockwise", -1)):
        body, spot, _ = spot_and_body(number, motion)
        arms = spot - body
        # x to the right, y downwards: a positive cross product turns clockwise
        turns = arms[:-1, 0] * arms[1:, 1] - arms[:-1, 1] * arms[1:, 0]
        assert (sense * turns > 0).all(), motion


def test_a_seed_gives_one_scene_and_another_seed_another():
    first, again, other = (
        demo.render(Scene.draw(np.random.default_rng(seed)), "grow") for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first[:20], other[:20])


def test_lengths_rates_and_looks_vary_within_bounds():
    scenes = [scene(number) for number in range(60)]
    assert {s.fps for s in scenes} == {24, 25, 30}
    lengths = [s.num_frames / s.fps for s in scenes]
    assert 1.15 < min(lengths) < 1.35 and 1.85 < max(lengths) < 2.05
    assert all(t.speed >= 20 and t.growth >= 0.6 and t.spin >= 2 for s in scenes for t in s.movers)


def test_prepare_lists_what_it_made(made):
    root, annotations = made
    rows = annotations.rows.to_pylist()
    assert annotations.label_names == list(MOTIONS)
    assert annotations.official == {"train": 16, "val": 8, "test": 8}
    assert len(rows) == 32 == len(list(root.rglob("*"))) - 3 - 3 * 8  # files, without folders
    for split, count in zip(("train", "val", "test"), SIZES, strict=True):
        labels = [row["labels"] for row in rows if row["split"] == split]
        assert sorted(labels) == sorted([[k] for k in range(8)] * count)
    for row in rows:
        split, motion, _ = row["path"].split("/")
        assert (split, motion) == (row["split"], MOTIONS[row["labels"][0]])
    groups = [{row["group"] for row in rows if row["split"] == s} for s in annotations.official]
    assert [len(group) for group in groups] == list(SIZES)
    assert len(set.union(*groups)) == sum(SIZES)


def test_files_are_h264_of_the_rendered_frames(made):
    root, annotations = made
    sizes = []
    for row in annotations.rows.to_pylist():
        split, number = row["group"].split()
        key = [0, ("train", "val", "test").index(split), int(number)]
        filmed = Scene.draw(np.random.default_rng(key))
        expected = demo.render(filmed, MOTIONS[row["labels"][0]])
        frames, stream = decode(root / row["path"])
        assert stream.codec_context.name == "h264" and stream.average_rate == filmed.fps
        assert frames.shape == expected.shape == (filmed.num_frames, 72, 96, 3)
        error = np.square(frames.astype(float) - expected).mean((1, 2, 3))
        assert 10 * np.log10(255**2 / error.max()) > 25  # dB, the worst frame
        sizes.append((root / row["path"]).stat().st_size)
    assert np.mean(sizes) < 30e6 / (8 * (60 + 8 + 16))  # what the default set may weigh


def test_prepare_makes_only_what_is_missing_and_the_same_again(made):
    root, before = made
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in root.rglob("*.mp4")}
    lost = root / before.rows["path"][0].as_py()
    lost.unlink()
    after = demo.prepare(root, scenes=SIZES)
    assert after.rows.equals(before.rows)
    assert lost.read_bytes() == files[lost][0]
    other_scene = {row["path"] for row in before.rows.to_pylist() if row["group"] != "train 0"}
    for path, (_, time) in files.items():
        if path.relative_to(root).as_posix() in other_scene:
            assert path.stat().st_mtime_ns == time
    assert {path for path in root.rglob("*") if path.is_file()} == set(files)


def test_a_film_that_breaks_off_leaves_no_file(tmp_path):
    def frames():
        yield from demo.render(scene(0), "left")[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.write_video(tmp_path / "a.mp4", frames(), 25)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"scenes": (1, 1)}, "data.scenes"),
        ({"scenes": (1, 0, 1)}, "data.scenes"),
        ({"scenes": (1, "a", 1)}, "data.scenes"),
        ({"scenes": 5}, "data.scenes"),
        ({"scene_seed": -1}, "data.scene_seed"),
    ],
)
def test_settings_that_make_no_videos(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        demo.prepare(tmp_path, **settings)
    assert not os.listdir(tmp_path)


def test_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data\.root=.*cannot be written"):
        demo.prepare(tmp_path / "file", scenes=(1, 1, 1))
