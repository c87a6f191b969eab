"""Make the built-in dataset: real H.264 files whose classes differ only in motion.

A scene is a handful of textured objects over a cluttered background. It is filmed eight times, once
per class, and all its moving objects do the same:

    left  right  up  down        move over a torus: what leaves at one edge comes back at the other
    grow  shrink                 run through a cycle of sizes, even on a log scale, and jump back at
                                 its end
    clockwise  counterclockwise  turn on the spot

The eight films of a scene agree in the middle, and run from there at the same pace. So each film is,
before compression, another one played backwards, frame by frame. Places, sizes and angles in the
middle are drawn evenly from their cycles, so they are spread evenly at any other time too, whatever
the motion: a frame by itself says nothing about the class, and a bag of frames nothing about the
direction.
"""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from rich.console import Console
from rich.progress import track

from vidtrain.data.manifest import Annotations, make_rows
from vidtrain.types import UserError

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

MOTIONS = ("left", "right", "up", "down", "grow", "shrink", "clockwise", "counterclockwise")
SPLITS = ("train", "val", "test")
WIDTH, HEIGHT = 96, 72  # pixels; wider than high, so that three crops differ
MOVERS, STILL = 4, 3  # objects in a scene
RADIUS = (5.0, 22.0)  # pixels; the largest outline, a quarter wider, still fits into the height
VERSION = 1  # to be raised when a seed would give other pixels


def prepare(root: Path, scenes: Sequence[int] = (60, 8, 16), scene_seed: int = 0) -> Annotations:
    """Make the videos that are not there yet, and list them.

    What is in a file follows from its name, and a file is there whole or not at all, so one that
    is found is right.

    Args:
        root: gets `<split>/<class>/<file>.mp4`.
        scenes: for training, validation and testing; each makes one video per class.
        scene_seed: another one, other videos.

    Raises:
        UserError: an argument that makes no videos, or `root` cannot be written.
    """
    counts = list(scenes) if isinstance(scenes, Sequence) else [scenes]
    if len(counts) != len(SPLITS) or any(type(n) is not int or n < 1 for n in counts):
        raise UserError(
            f"data.scenes is {scenes}; it must be three whole numbers of at least 1:"
            " how many scenes to train, validate and test on, as in [60,8,16]"
        )
    if type(scene_seed) is not int or scene_seed < 0:
        raise UserError(f"data.scene_seed is {scene_seed}; it must be a whole number, 0 or more")
    root = Path(root).expanduser()
    plan = [
        (split, number)
        for split, count in zip(SPLITS, counts, strict=True)
        for number in range(count)
    ]
    try:
        _make_missing(root, plan, scene_seed)
    except OSError as error:
        raise UserError(f"data.root={root} cannot be written ({error}); name another") from None
    videos = [(motion, *scene) for motion in MOTIONS for scene in plan]
    rows = make_rows(
        paths=[video_path(motion, split, n, scene_seed) for motion, split, n in videos],
        labels=[[MOTIONS.index(motion)] for motion, _, _ in videos],
        splits=[split for _, split, _ in videos],
        group=[f"{split} {n}" for _, split, n in videos],  # the films of a scene stay together
    )
    official = {split: n * len(MOTIONS) for split, n in zip(SPLITS, counts, strict=True)}
    return Annotations(rows, list(MOTIONS), official)


def video_path(motion: str, split: str, number: int, scene_seed: int) -> str:
    """Name a video, relative to the root, by all that decides what is in it."""
    return f"{split}/{motion}/v{VERSION}_seed{scene_seed}_{number:04}.mp4"


def _make_missing(root: Path, plan: list[tuple[str, int]], scene_seed: int) -> None:
    """Film the scenes of which a video is missing, in parallel, with a progress bar."""
    missing = [
        (split, number)
        for split, number in plan
        if not all((root / video_path(m, split, number, scene_seed)).is_file() for m in MOTIONS)
    ]
    if not missing:
        return
    for split in SPLITS:
        for motion in MOTIONS:
            (root / split / motion).mkdir(parents=True, exist_ok=True)
    # Spawned: to fork a process that has threads, as one with torch has, is not safe.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(missing), 16), context) as pool:
        films = [pool.submit(film, root, *scene, scene_seed) for scene in missing]
        try:
            # On stderr: what a verb prints on stdout may be read by a program.
            console = Console(stderr=True)
            for made in track(as_completed(films), "Making videos", len(films), console=console):
                made.result()
        finally:
            pool.shutdown(cancel_futures=True)


def film(root: Path, split: str, number: int, scene_seed: int) -> None:
    """Write a scene's eight videos."""
    scene = Scene.draw(np.random.default_rng([scene_seed, SPLITS.index(split), number]))
    for motion in MOTIONS:
        path = root / video_path(motion, split, number, scene_seed)
        write_video(path, render(scene, motion), scene.fps)


@dataclass(frozen=True)
class Thing:
    """An object: its looks, in units of its radius, its pose and its pace."""

    lobes: NDArray[np.complex64]  # (3,) Fourier coefficients of the outline
    colors: NDArray[np.float32]  # (3, 3) two for the stripes, one for the spot
    wave: np.complex64  # stripes: their direction and wave number
    spot: np.complex64  # centre
    x: float  # pixels; this and the next three in the middle of the film
    y: float
    size: float  # 0 <= size < 1, where in the cycle of sizes
    angle: float  # radians, clockwise
    speed: float  # pixels per second
    growth: float  # cycles per second
    spin: float  # radians per second

    @classmethod
    def draw(cls, rng: Generator) -> Thing:
        """Draw an object that no turn maps onto itself."""
        lobes = rng.uniform(0.5, 1.0, 3) * (0.07, 0.10, 0.07) * _phase(rng, 3)
        return cls(
            lobes=lobes.astype(np.complex64),
            colors=_palette(rng, 3),
            wave=np.complex64(rng.uniform(3.0, 6.0) * _phase(rng)),
            spot=np.complex64(0.45 * _phase(rng)),
            x=rng.uniform(0, WIDTH),
            y=rng.uniform(0, HEIGHT),
            size=rng.random(),
            angle=rng.uniform(0, 2 * np.pi),
            speed=rng.uniform(20, 50),
            growth=rng.uniform(0.6, 0.9),  # slower, and it is the hardest motion by far
            spin=rng.uniform(2.0, 4.5),
        )


@dataclass(frozen=True)
class Scene:
    """What the films of one scene have in common."""

    background: NDArray[np.float32]  # (3, H, W), with the objects that keep still
    movers: tuple[Thing, ...]
    num_frames: int
    fps: int

    @classmethod
    def draw(cls, rng: Generator) -> Scene:
        """Draw everything but the motion."""
        fps = int(rng.choice([24, 25, 30]))
        return cls(
            background=_background(rng),
            movers=tuple(Thing.draw(rng) for _ in range(MOVERS)),
            num_frames=round(rng.uniform(1.2, 2.0) * fps),
            fps=fps,
        )


def render(scene: Scene, motion: str) -> NDArray[np.uint8]:
    """Film a scene: `(T, H, W, 3)` RGB.

    The reverse motion gives the same frames, to the bit, in reverse order.
    """
    time = (np.arange(scene.num_frames) - (scene.num_frames - 1) / 2) / scene.fps
    frames = np.empty((scene.num_frames, HEIGHT, WIDTH, 3), np.uint8)
    for frame, now in zip(frames, time, strict=True):
        image = scene.background.copy()
        for thing in scene.movers:
            _paint(image, thing, **pose(thing, motion, now))
        frame[:] = np.rint(image * 255).transpose(1, 2, 0)
    return frames


def pose(thing: Thing, motion: str, time: float) -> dict[str, float]:
    """Say where an object is, how large and how turned, `time` seconds from its film's middle."""
    move = dict.fromkeys(MOTIONS, 0.0) | {motion: time}
    size = thing.size + thing.growth * (move["grow"] - move["shrink"])
    smallest, largest = RADIUS
    return {
        "x": (thing.x + thing.speed * (move["right"] - move["left"])) % WIDTH,
        "y": (thing.y + thing.speed * (move["down"] - move["up"])) % HEIGHT,
        "angle": thing.angle + thing.spin * (move["clockwise"] - move["counterclockwise"]),
        "radius": smallest * (largest / smallest) ** (size % 1.0),
    }


def _paint(
    image: NDArray[np.float32], thing: Thing, x: float, y: float, radius: float, angle: float
) -> None:
    """Lay an object over `image (3, H, W)`; what leaves at one edge comes back at the other."""
    reach = int(1.25 * radius) + 2
    side = 2 * reach + 1
    left, top = round(x) - reach, round(y) - reach
    # The object's own plane: pixels from its centre, turned back and scaled to a radius of 1.
    turn = np.exp(-1j * angle) / radius
    across, along = np.arange(side) + (left - x), np.arange(side) + (top - y)
    z = ((across + 1j * along[:, None]) * turn).astype(np.complex64)  # (S, S)
    r = np.abs(z)
    unit = z / np.maximum(r, 1e-6)
    # The outline is 1 + Re(sum of lobes[k - 2] * unit^k, k = 2, 3, 4).
    outline = (
        1 + (unit**2 * (thing.lobes[0] + unit * (thing.lobes[1] + unit * thing.lobes[2]))).real
    )
    inside = _soft((outline - r) * radius)
    spot = _soft((0.3 - np.abs(z - thing.spot)) * radius)
    stripe = _soft(np.sin((z * thing.wave).real) * radius / abs(thing.wave))
    first, second, third = thing.colors[..., None, None]
    color = first + stripe * (second - first)  # (3, S, S)
    color += spot * (third - color)
    for rows, rows_there in _wrap(top, side, HEIGHT):
        for columns, columns_there in _wrap(left, side, WIDTH):
            there = image[:, rows_there, columns_there]
            there += inside[rows, columns] * (color[:, rows, columns] - there)


def _wrap(start: int, length: int, period: int) -> Iterator[tuple[slice, slice]]:
    """Cut a window where it leaves a circle: pieces of the window, and where on it they lie."""
    start %= period
    first = min(length, period - start)
    yield slice(0, first), slice(start, start + first)
    if first < length:
        yield slice(first, length), slice(0, length - first)


def _soft(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pixels inside an edge -> opacity, with an edge one pixel wide."""
    return np.clip(depth + 0.5, 0, 1)


def _phase(rng: Generator, count: int | None = None) -> NDArray[np.complex128]:
    """Draw complex numbers of length 1."""
    return np.exp(2j * np.pi * rng.random(count))


def _palette(rng: Generator, count: int) -> NDArray[np.float32]:
    """Draw `(count, 3)` colours that differ in brightness."""
    level = rng.permutation(np.linspace(0.15, 0.85, count))[:, None]
    tint = rng.uniform(-0.3, 0.3, (count, 3))
    return np.clip(level + tint, 0, 1).astype(np.float32)


def _background(rng: Generator) -> NDArray[np.float32]:
    """Draw smooth noise at three scales with still objects over it: `(3, H, W)`."""
    image = np.full((3, HEIGHT, WIDTH), rng.uniform(0.3, 0.7))
    for cells, strength in ((2, 0.25), (6, 0.1), (18, 0.04)):
        grey = rng.uniform(-strength, strength, (1, cells + 1, cells + 1))
        tint = rng.uniform(-strength, strength, (3, cells + 1, cells + 1))
        image += _stretch(HEIGHT, cells) @ (grey + tint / 2) @ _stretch(WIDTH, cells).T
    image = np.clip(image, 0, 1).astype(np.float32)
    for _ in range(STILL):
        thing = Thing.draw(rng)
        _paint(image, thing, **pose(thing, "left", 0.0))
    return image


def _stretch(length: int, cells: int) -> NDArray[np.float64]:
    """Weights `(length, cells + 1)` that stretch a grid smoothly over `length` pixels."""
    distance = np.abs(np.linspace(0, cells, length)[:, None] - np.arange(cells + 1))
    return np.where(distance < 1, 0.5 + 0.5 * np.cos(np.pi * distance), 0)


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: int) -> None:
    """Encode frames `(H, W, 3)` as H.264; the file appears whole or not at all."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with av.open(str(part), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps)
            stream.height, stream.width = HEIGHT, WIDTH
            stream.pix_fmt = "yuv420p"
            # One quantiser throughout: with rate control a frame's sharpness would depend on what
            # moves, and x264's is not reproducible on frames of this height.
            stream.options = {"preset": "veryfast", "qp": "22"}
            stream.codec_context.thread_count = 1  # the files are made side by side
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
