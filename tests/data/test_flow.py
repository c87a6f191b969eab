"""Optical flow: that it leads from frame to frame, whichever way it comes and whatever is done to it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_video import read_numbers, write_audio, write_video
from torch import Tensor

from vidtrain.data import flow_store
from vidtrain.data import manifest as manifests
from vidtrain.data.cache import FrameCache
from vidtrain.data.collate import collate
from vidtrain.data.dataset import VideoDataset
from vidtrain.data.decode import open_video
from vidtrain.data.fields import Flow, wanted_fields
from vidtrain.data.flow import (
    BOUND,
    check_method,
    estimator,
    file_of,
    raft_network,
    to_bytes,
    to_pixels,
)
from vidtrain.data.flow_store import Failed, Job, Settings, compute, make
from vidtrain.data.indices import IndexStore
from vidtrain.data.manifest import Manifest, Row
from vidtrain.data.prepare import folder
from vidtrain.data.readers.flow import FlowReader
from vidtrain.data.sources import Sources
from vidtrain.data.spill import Spill
from vidtrain.data.transforms.device import DeviceTransform, Views
from vidtrain.data.transforms.sample import Augment, Geometry
from vidtrain.types import Clip, DecodeError, UserError
from vidtrain.visualize.clips import write_mp4

CLIP = Clip(num_frames=4, stride=2, size=48, mean=[0] * 3, std=[1 / 255] * 3)
OPENCV = ("tvl1", "dis", "farneback")


def texture(x: np.ndarray, y: np.ndarray, seed: int = 0) -> np.ndarray:
    """An endless smooth pattern at given places, grey in three channels: `(3, H, W)` in 0 to 255."""
    rng = np.random.default_rng(seed)
    length, turn, phase = rng.uniform((8, 0, 0), (40, 2 * np.pi, 2 * np.pi), (40, 3)).T
    waves = 2 * np.pi / length * np.stack([np.cos(turn), np.sin(turn)])
    angles = waves[0][:, None, None] * x + waves[1][:, None, None] * y
    return np.repeat(128 + 14 * np.sin(angles + phase[:, None, None]).sum(0)[None], 3, 0)


def moving(count: int, velocity: tuple[float, float], size: tuple[int, int] = (72, 96)) -> Tensor:
    """Frames of the pattern, moving so many pixels right and down a frame: `(T, 3, H, W)` uint8."""
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    frames = [texture(x - velocity[0] * t, y - velocity[1] * t) for t in range(count)]
    return torch.from_numpy(np.stack(frames).clip(0, 255).round().astype(np.uint8))


def zooming(factor: float, size: tuple[int, int] = (72, 96)) -> tuple[Tensor, np.ndarray]:
    """Two frames, the second `factor` as large around the middle, and the flow between them."""
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    away = x - size[1] / 2, y - size[0] / 2
    frames = np.stack([texture(*away), texture(away[0] / factor, away[1] / factor)])
    flow = np.stack([part * (factor - 1) for part in away], -1)
    return torch.from_numpy(frames.clip(0, 255).round().astype(np.uint8)), flow


def warp(other: Tensor, flow: Tensor) -> Tensor:
    """See what is where flow leads: `(N, C, H, W)` and `(N, 2, H, W)` pixels -> `(N, C, H, W)`."""
    height, width = other.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = (x + flow[:, 0]) * 2 / (width - 1) - 1, (y + flow[:, 1]) * 2 / (height - 1) - 1
    return F.grid_sample(
        other.float(), torch.stack([x, y], -1), padding_mode="border", align_corners=True
    )


def gain(frames: Tensor, others: Tensor, flow: Tensor, rim: int = 6) -> float:
    """Say how many times nearer the warped frames are than those that are not, but for the rim."""
    inside = (..., slice(rim, -rim), slice(rim, -rim))
    moved = (warp(others, flow) - frames.float()).abs()[inside].mean()
    still = (others.float() - frames.float()).abs()[inside].mean()
    return float(still / moved)


def rows_of(frames: Tensor) -> np.ndarray:
    return frames.permute(0, 2, 3, 1).numpy()


# --- methods ---


@pytest.mark.parametrize("method", OPENCV)
@pytest.mark.parametrize("velocity", [(3.4, -1.8), (-2.0, 0.5)])
def test_a_field_leads_to_the_next_frame_and_its_reverse_back(method, velocity):
    frames = moving(2, velocity)
    fields = estimator(method)(rows_of(frames), [(0, 1), (1, 0)])
    assert fields.shape == (2, 72, 96, 2) and fields.dtype == np.float32
    forward, backward = np.median(fields[:, 8:-8, 8:-8], (1, 2))
    assert forward == pytest.approx(velocity, abs=0.15)
    assert backward == pytest.approx([-v for v in velocity], abs=0.15)
    flow = torch.from_numpy(fields).permute(0, 3, 1, 2)
    assert gain(frames, frames.flip(0), flow) > 8
    assert gain(frames, frames.flip(0), -flow) < 1  # the other convention


@pytest.mark.parametrize("method", OPENCV)
def test_fields_that_differ_from_place_to_place(method):
    frames, expected = zooming(1.08)
    field = estimator(method)(rows_of(frames), [(0, 1)])[0]
    far = np.abs(field - expected)[8:-8, 8:-8]
    assert np.median(far) < 0.15
    assert gain(frames[:1], frames[1:], torch.from_numpy(field).permute(2, 0, 1)[None]) > 6


@pytest.mark.parametrize("method", OPENCV)
def test_flow_of_a_real_video(method, shared):
    with open_video(shared / "videos" / "ucf_test.avi") as reader:
        frames = reader.frames(range(30, 33))
    frames = F.interpolate(frames, (120, 160), mode="bilinear", antialias=True)
    fields = estimator(method)(rows_of(frames), [(0, 1), (1, 2)])
    flow = torch.from_numpy(fields).permute(0, 3, 1, 2)
    assert gain(frames[:2], frames[1:], flow) > 1.8
    assert gain(frames[:2], frames[1:], -flow) < 1


@pytest.mark.parametrize("method", OPENCV)
def test_tiny_frames_have_flow_too(method):
    frames = rows_of(moving(3, (1, 0), (7, 5)))
    assert estimator(method)(frames, [(0, 1), (1, 2)]).shape == (2, 7, 5, 2)


def save_raft(path: Path, network: str) -> torch.nn.Module:
    from torchvision.models import optical_flow

    torch.manual_seed(0)
    raft = getattr(optical_flow, network)(weights=None).eval()
    torch.save(raft.state_dict(), path)
    return raft


def test_raft_is_torchvisions(tmp_path):
    raft = save_raft(tmp_path / "raft.pth", "raft_small")
    frames = moving(2, (1, 2), (75, 131))
    fields = estimator("raft", tmp_path / "raft.pth")(rows_of(frames), [(1, 0)])
    padded = F.pad(frames.float() / 127.5 - 1, (0, 5, 0, 53), mode="replicate")  # 128 x 136
    with torch.inference_mode():
        expected = raft(padded[1:], padded[:1])[-1][..., :75, :131]
    np.testing.assert_allclose(fields, expected.permute(0, 2, 3, 1), atol=1e-3)
    large = save_raft(tmp_path / "raft.pth", "raft_large").state_dict()
    assert raft_network(large, "it").state_dict().keys() == large.keys()


@pytest.mark.slow
def test_raft_with_its_own_weights_leads_to_the_next_frame():
    try:
        between = estimator("raft")
    except UserError as error:
        pytest.skip(str(error))
    frames = moving(2, (3.4, -1.8), (128, 160))
    flow = torch.from_numpy(between(rows_of(frames), [(0, 1)])).permute(0, 3, 1, 2)
    assert gain(frames[:1], frames[1:], flow) > 8


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"download https.*raft_large.*\.pth to .*hub/checkpoints"):
        check_method("raft", "data.flow")
    with pytest.raises(UserError, match=r"data.flow_weights=.*gone.pth: there is no such file"):
        check_method("raft", "data.flow", str(tmp_path / "gone.pth"))
    (tmp_path / "text.pth").write_text("nothing")
    with pytest.raises(UserError, match=r"text.pth holds no weights of RAFT"):
        estimator("raft", str(tmp_path / "text.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"holds no weights of torchvision's raft"):
        estimator("raft", str(tmp_path / "other.pth"))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"dis needs OpenCV.*pip install vidtrain\[flow\]"):
        check_method("dis", "data.flow")
    with pytest.raises(UserError, match=r"data.flow is 'lk'; it is one of tvl1, dis"):
        check_method("lk", "data.flow")


# --- bytes ---


def test_bytes_are_exact_to_half_a_step_and_saturate():
    pixels = np.linspace(-BOUND, BOUND, 10_001, dtype=np.float32)
    back = to_pixels(to_bytes(pixels, BOUND), BOUND)
    assert np.abs(back - pixels).max() <= 40 / 255 / 2 + 1e-5
    assert to_bytes(np.array([-1e9, -20.1, 0, 20.1, 1e9]), BOUND).tolist() == [1, 1, 128, 255, 255]
    assert to_pixels(np.array([128], np.uint8), BOUND) == 0
    codes = np.arange(1, 256, dtype=np.uint8)
    assert (to_bytes(-to_pixels(codes, BOUND), BOUND) == 256 - codes.astype(int)).all()


def test_which_field_belongs_to_a_frame():
    indices = np.array([[0, 3, 6, 9], [6, 7, 8, 9]])
    found = wanted_fields(indices, 10)
    leads = np.stack([found.first, found.other], -1)[found.position].tolist()
    assert leads[0] == [[0, 1], [3, 4], [6, 7], [8, 9]]  # the last repeats the one before it
    assert leads[1] == [[6, 7], [7, 8], [8, 9], [8, 9]]
    assert len(found.first) == 5  # each once
    both = wanted_fields(indices, 10, "both")
    leads = np.stack([both.first, both.other], -1)[both.position].tolist()
    assert leads[0] == [[1, 0], [3, 2], [6, 7], [8, 9]]
    assert leads[1] == [[6, 5], [7, 6], [8, 9], [8, 9]]
    assert (np.diff((both.first > both.other).astype(int)) >= 0).all()  # forward ones come first
    single = wanted_fields(np.zeros((1, 4), int), 1, "both")
    assert (single.first.tolist(), single.other.tolist()) == ([0], [0])


def test_a_clip_played_backwards_swaps_the_two_halves():
    """models.md B4.5: what is forward in time becomes backward, in the other half."""
    length, indices = 20, np.array([[4, 6, 8, 10, 12, 14]])
    ahead = wanted_fields(indices, length, "both")
    leads = np.stack([ahead.first, ahead.other], -1)[ahead.position[0]]
    back = wanted_fields(length - 1 - indices[:, ::-1], length, "both")
    mirrored = length - 1 - np.stack([back.first, back.other], -1)[back.position[0]]
    assert mirrored.tolist() == leads[::-1].tolist()


# --- what is kept ---


def manifest_of(root: Path) -> Manifest:
    path = root.parent / f"{root.name}.arrow"
    manifests.save(folder.prepare(root), path, "folder", root)
    return Manifest(path)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Two videos of a moving pattern, in a folder of their own."""
    root = tmp_path_factory.mktemp("flow") / "videos"
    for name, velocity in (("a/right.mp4", (2, 0)), ("b/up.mp4", (0, -3))):
        (root / name).parent.mkdir(parents=True)
        write_mp4(moving(21, velocity), 25, root / name)
    return root


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """Do without worker processes, which take seconds to import what they need."""

    def run(function, jobs, workers, time_limit, progress, culprit):
        for job in jobs:
            progress(function(job))
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vidtrain.data.crew.run", run)
        yield


@pytest.fixture(scope="module")
def store(videos: Path, in_this_process: None) -> Path:
    """Their flow, forward and backward."""
    output = videos.parent / "flow"
    outcome = compute(manifest_of(videos), None, output, Settings("dis"), "both", workers=2)
    assert outcome.made == 4 and not outcome.failed
    return output


def read(file: Path) -> Tensor:
    """All fields of a file: `(N, 2, H, W)` pixels."""
    with FlowReader(str(file)) as reader:
        codes = torch.cat([*reader.fields(range(len(reader)))])
        return torch.from_numpy(to_pixels(codes.numpy(), reader.bound))


def test_kept_flow_leads_to_the_next_frame(videos, store):
    for name in ("a/right.mp4", "b/up.mp4"):
        with open_video(videos / name) as reader:
            frames = reader.frames(range(len(reader)))
        forward, backward = (read(store / file_of(name, side)) for side in (False, True))
        assert forward.shape == backward.shape == (20, 2, 72, 96)
        assert gain(frames[:-1], frames[1:], forward) > 5
        assert gain(frames[1:], frames[:-1], backward) > 5


def test_the_stated_error_is_that_of_what_is_read(videos, store):
    found = read(store / file_of("a/right.mp4"))
    with open_video(videos / "a/right.mp4") as reader:
        truth = np.concatenate([*flow_store.compute_fields(reader, Settings("dis"), False, None)])
    error = (found.permute(0, 2, 3, 1) - torch.from_numpy(truth)).abs().mean()
    lines = (store / flow_store.LEDGER).read_text().splitlines()
    stated = {entry["path"]: entry["error"] for entry in map(json.loads, lines)}
    assert stated[file_of("a/right.mp4")] == pytest.approx(float(error), rel=1e-3)
    assert 0.02 < error < 0.08  # a step is 0.157 pixels
    facts = json.loads((store / flow_store.FACTS).read_text())
    assert facts["method"] == "dis" and facts["files"] == 4 and facts["fields"] == 80
    assert facts["mean_abs_error"] == pytest.approx(np.mean([*stated.values()]))
    assert facts["bytes"] == sum(file.stat().st_size for file in store.rglob("*.mp4"))


def test_what_is_there_is_not_computed_again(videos, tmp_path, in_this_process):
    found, output, seen = manifest_of(videos), tmp_path / "o", []

    plain = Settings("farneback")

    def run(settings=plain, direction="forward"):
        return compute(
            found, None, output, settings, direction, workers=2, progress=lambda *n: seen.append(n)
        ).made

    assert run() == 2
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert run() == 0
    os.utime(videos / "a/right.mp4")
    assert run() == 1
    (output / file_of("b/up.mp4")).write_bytes(b"not as it was left")
    assert run() == 1
    assert run(direction="both") == 2  # backward alone
    assert (
        run(Settings("farneback", bound=5.0)) == 4
    )  # of other settings they would not belong together
    with FlowReader(str(output / file_of("b/up.mp4"))) as reader:
        assert (reader.bound, reader.method) == (5.0, "farneback")


def test_a_video_that_cannot_be_read_is_named(tmp_path, in_this_process):
    root = tmp_path / "videos"
    for label in "ab":
        (root / label).mkdir(parents=True)
    write_video(root / "a" / "good.mp4", 5)
    write_video(root / "a" / "single.mp4", 1)
    write_audio(root / "b" / "sound.mp4")
    outcome = compute(manifest_of(root), None, tmp_path / "o", Settings("farneback"), workers=1)
    assert outcome.failed == [("b/sound.mp4", "no video stream (sound only)", False)]
    assert outcome.made == 2
    still = read(tmp_path / "o" / file_of("a/single.mp4"))
    assert still.shape[0] == 1 and (still == 0).all()
    assert not list((tmp_path / "o").rglob("*.part*"))


def test_odd_sizes_and_smaller_flow(tmp_path):
    write_mp4(moving(5, (2, 1), (75, 99)), 25, tmp_path / "a.mp4")  # is made 76 x 100
    write_video(tmp_path / "b.mp4", 5, size=(97, 65), pix_fmt="yuv444p")
    for name, settings, size in (
        ("a.mp4", Settings("dis", short_side=33), (33, 43)),
        ("b.mp4", Settings("dis"), (65, 97)),
    ):
        target = tmp_path / f"{name}.flow"
        job = Job(
            "x", str(tmp_path / name), str(tmp_path / "part"), str(target), settings, False, None
        )
        made = make(job)
        assert not isinstance(made, Failed), made
        assert read(target).shape == (4, 2, *size)
    field = read(tmp_path / "a.mp4.flow")[0, :, 5:-5, 5:-5].mean((1, 2))
    assert field.tolist() == pytest.approx([2 * 33 / 76, 33 / 76], abs=0.1)  # in its own pixels


def test_settings_and_folders_that_are_refused(videos, tmp_path):
    found = manifest_of(videos)
    for settings, message in (
        (Settings("lk"), "data.flow_method is 'lk'"),
        (Settings("dis", bound=0), "data.flow_bound is 0"),
        (Settings("dis", short_side=8), "flow.short_side is 8"),
        (Settings("dis", crf="good"), "flow.crf is 'good'"),
        (Settings("dis", keyframe_every=0), "flow.keyframe_every is 0"),
    ):
        with pytest.raises(UserError, match=message):
            compute(found, None, tmp_path / "o", settings)
    with pytest.raises(UserError, match=r"data.flow_direction is 'back'"):
        compute(found, None, tmp_path / "o", Settings("dis"), "back")
    with pytest.raises(UserError, match=r"data.flow_root=.* must not lie within one another"):
        compute(found, None, videos / "flow", Settings("dis"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    with pytest.raises(UserError, match="has other things in it"):
        compute(found, None, tmp_path / "mine", Settings("dis"))
    assert not (tmp_path / "o").exists()


# --- samples ---


class Rows:
    """Rows of files below a root, as a split of a manifest gives them."""

    def __init__(self, root: Path, *paths: str, **columns) -> None:
        row = {"labels": (1,), "start": None, "end": None, "split": "train", "group": None}
        self.root, self.rows = root, [Row(path, **{**row, **columns}) for path in paths]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        return self.rows[index]

    def location(self, row: Row) -> str:
        return str(self.root / row.path)


def after(samples: list, train: bool = True, **settings) -> dict:
    """What the model gets: collated, through the device transform; pixels in 0 to 255."""
    transform = DeviceTransform(CLIP.mean, CLIP.std, num_classes=2, **settings).train(train)
    return transform(collate(samples))


def numbered(root: Path, count: int = 21, size: tuple[int, int] = (96, 72)) -> Path:
    """A video whose frames bear their numbers, and flow whose fields do: k, and -k backward.

    All of field k is k - 10 across and 5 - k / 2 down, in pixels.
    """
    (root / "videos").mkdir(parents=True)
    write_video(root / "videos" / "n.mp4", count, size=size, pattern="flat")
    k = np.arange(count - 1, dtype=np.float32)
    pixels = np.stack([k - 10, 5 - k / 2], -1)[:, None, None]
    for backward in (False, True):
        target = root / "flow" / file_of("n.mp4", backward)
        target.parent.mkdir(parents=True)
        fields = np.broadcast_to(-pixels if backward else pixels, (count - 1, 72, 96, 2))
        with pytest.MonkeyPatch.context() as patch, open_video(root / "videos" / "n.mp4") as reader:
            patch.setattr(flow_store, "compute_fields", lambda *_, f=fields: iter([f]))
            job = Job("x", "", str(target), "", Settings("dis", crf=0), backward, None)
            flow_store.write(reader, job)
    return root


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_each_frame_comes_with_its_own_field(tmp_path, direction):
    root = numbered(tmp_path / "set")
    flow = Flow("stored", direction=direction, root=root / "flow")
    rows = Rows(root / "videos", "n.mp4")
    inputs = ("video", "flow")
    expected = {
        "forward": lambda numbers: [min(n, 19) - 10 for n in numbers],
        "both": lambda numbers: (
            [10 - max(n - 1, 0) for n in numbers[:2]] + [min(n, 19) - 10 for n in numbers[2:]]
        ),
    }[direction]
    training = VideoDataset(rows, CLIP, augment=Augment(), flow=flow, inputs=inputs)
    testing = VideoDataset(rows, CLIP, clips=5, flow=flow, inputs=inputs)
    samples = [training[0, seed] for seed in range(6)] + [testing[0, 0]]
    for sample in samples:
        batch = after([sample])
        for video, field in zip(batch["video"][0], batch["flow"][0], strict=True):
            numbers = read_numbers(video.transpose(0, 1).round().byte(), "flat")
            assert field.shape == (2, 4, 48, 48)
            # seen at 48 of 72 pixels
            across = field[0].mean((1, 2)) * BOUND * 72 / 48
            assert across.tolist() == pytest.approx(expected(numbers), abs=0.09)
            torch.testing.assert_close(field[1], -field[0] / 2, atol=0.006, rtol=0)
    tested = samples[-1]
    assert tested["view_fields"].unique().tolist() == [*range(len(tested["fields"]))]
    if direction == "forward":  # each once
        assert len(tested["fields"][:, 0, 0, 0].unique()) == len(tested["fields"])


@pytest.mark.parametrize("source", ["stored", "dis", "farneback"])
@pytest.mark.parametrize("how", ["plain", "flip", "area", "repeats", "region", "cached"])
def test_flow_of_a_training_clip_leads_to_the_next_frame(videos, store, tmp_path, source, how):
    """Whatever becomes of the frames becomes of their flow."""
    augment = {
        "flip": Augment(hflip=1.0),
        "area": Augment(area=[0.3, 0.8], hflip=0.5),
        "repeats": Augment(scale=[1, 1.4], hflip=0.5, repeats=3),
    }.get(how, Augment())
    sources = Sources()
    if how == "cached":  # frames of another size than the fields
        sources = Sources(cache=FrameCache(tmp_path / "cache", 50_000_000, 54))
    dataset = VideoDataset(
        Rows(videos, "a/right.mp4", "b/up.mp4"),
        Clip(num_frames=6, stride=1, size=48, mean=[0] * 3, std=[1 / 255] * 3),
        augment=augment,
        region=[0.1, 0.2, 0.7, 0.75] if how == "region" else None,
        flow=Flow(source, root=store),
        inputs=("video", "flow"),
        sources=sources,
    )
    batch = after([dataset[row, seed] for row in (0, 1) for seed in (1, 2)])
    for video, flow in zip(batch["video"].flatten(0, 1), batch["flow"].flatten(0, 1), strict=True):
        frames, pixels = video.transpose(0, 1), flow.transpose(0, 1) * BOUND
        assert gain(frames[:-1], frames[1:], pixels[:-1]) > (2.5 if source == "farneback" else 3.5)
    if how == "flip":
        assert (batch["flow"][0, 0, 0].mean() < 0) and (batch["flow"][2, 0, 1].mean() < 0)


@pytest.mark.parametrize("source", ["stored", "dis"])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_test_views_are_the_same_however_they_come(
    videos, store, tmp_path, source, direction, monkeypatch
):
    settings = {
        "clips": 4,
        "crops": 3,
        "short_side": 60,
        "size": 48,
        "flow": Flow(source, root=store, direction=direction),
        "inputs": ("video", "flow"),
    }
    rows = Rows(videos, "a/right.mp4")
    whole = VideoDataset(rows, CLIP, **settings)[0, 0]
    assert whole["view_fields"].shape == whole["view_frames"].shape == (12, 4)
    assert whole["flow_steps"].shape == (12, 4, 2) and whole["fields"].dtype == torch.uint8
    assert whole["fields"].shape[1:] == (2, 60, 80)
    # alone; and a few pixels at a time, in files
    alone = VideoDataset(rows, CLIP, **{**settings, "inputs": ("flow",)})[0, 0]
    assert "frames" not in alone and torch.equal(alone["fields"], whole["fields"])
    plain = VideoDataset(rows, CLIP, **{**settings, "inputs": ("video",)})[0, 0]
    assert torch.equal(plain["frames"], whole["frames"])
    monkeypatch.setattr("vidtrain.data.readers.pieces.PIECE", 5 * 96 * 72 * 3)
    monkeypatch.setattr("vidtrain.data.readers.flow.PIECE", 5 * 96 * 72 * 2)
    parts = VideoDataset(rows, CLIP, **settings, spill=tmp_path / "spill", spill_above=1)[0, 0]
    assert isinstance(parts["fields"], Spill) and isinstance(parts["frames"], Spill)
    expected = after([whole], train=False)
    views = after([parts], train=False, lazily_above=10)
    assert isinstance(views["flow"], Views) and isinstance(views["video"], Views)
    assert views["flow"].shape == expected["flow"].shape == (1, 12, 2, 4, 48, 48)
    torch.testing.assert_close(torch.cat([*views["flow"].pieces(5)]), expected["flow"][0])
    torch.testing.assert_close(torch.cat([*views["video"].pieces(5)]), expected["video"][0])
    torch.testing.assert_close(after([alone], train=False)["flow"], expected["flow"])


@pytest.mark.parametrize("source", ["stored", "dis"])
def test_flow_of_a_test_view_leads_to_the_next_frame(videos, store, source):
    clip = Clip(num_frames=6, stride=1, size=48, mean=[0] * 3, std=[1 / 255] * 3)
    dataset = VideoDataset(
        Rows(videos, "a/right.mp4", "b/up.mp4"), clip, clips=2, crops=3, short_side=54,
        flow=Flow(source, root=store), inputs=("video", "flow"),
    )  # fmt: skip
    for row in (0, 1):
        batch = after([dataset[row, 0]], train=False)
        for video, flow in zip(batch["video"][0], batch["flow"][0], strict=True):
            frames, pixels = video.transpose(0, 1), flow.transpose(0, 1) * BOUND
            assert gain(frames[:-1], frames[1:], pixels[:-1]) > 4


def test_frames_that_nobody_takes_are_not_decoded(videos, store, monkeypatch):
    from vidtrain.data.readers.pyav import PyAVReader

    rows = Rows(videos, "a/right.mp4")
    flow = Flow("stored", root=store)
    seen = [
        VideoDataset(rows, CLIP, augment=Augment(area=[0.3, 1]), flow=flow, inputs=inputs)[0, 3]
        for inputs in (("flow",), ("video", "flow"))
    ]
    assert "video" not in seen[0]
    assert torch.equal(seen[0]["flow"], seen[1]["flow"])  # the same boxes
    kept = IndexStore(videos.parent / "kept.frames", 2)
    with open_video(videos / "a/right.mp4") as reader:
        reader.frames([0])
        facts = os.stat(reader.path).st_size, os.stat(reader.path).st_mtime_ns
        kept.put(reader.path, *facts, reader.index)
    monkeypatch.setattr(PyAVReader, "_collect", None)
    for settings in ({"augment": Augment()}, {"clips": 2}):
        sources = Sources(indices=kept)
        dataset = VideoDataset(rows, CLIP, flow=flow, inputs=("flow",), sources=sources, **settings)
        assert len(dataset[0, 0]["flow_steps"])


def test_kept_frame_indices_of_flow_are_used_again(videos, store, tmp_path):
    flow = Flow("stored", root=store, indices=IndexStore(tmp_path / "m.flow", 2))
    dataset = VideoDataset(
        Rows(videos, "a/right.mp4"), CLIP, augment=Augment(), flow=flow, inputs=("flow",)
    )
    first = dataset[0, 0]
    file = store / file_of("a/right.mp4")
    stat = file.stat()
    assert flow.indices.get(file, stat.st_size, stat.st_mtime_ns) is not None
    assert torch.equal(dataset[0, 0]["flow"], first["flow"])


def test_a_single_frame_stands_still(tmp_path):
    write_video(tmp_path / "one.mp4", 1)
    for source in ("dis", "farneback"):
        for settings in ({"augment": Augment()}, {}):
            dataset = VideoDataset(
                Rows(tmp_path, "one.mp4"), CLIP, flow=Flow(source), inputs=("flow",), **settings
            )
            flow = after([dataset[0, 0]])["flow"]
            assert flow.shape == (1, 1, 2, 4, 48, 48) and (flow == 0).all()


def test_flow_that_is_not_there_or_of_another_video(videos, store, tmp_path):
    with pytest.raises(UserError, match=r"data.flow is stored, but there is no flow in"):
        Flow("stored", root=tmp_path)
    (tmp_path / "half" / "forward" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds forward flow only; .*flow_direction=both"):
        Flow("stored", root=tmp_path / "half", direction="both")
    with pytest.raises(UserError, match=r"data.flow is 'tv'; it is one of null, stored, tvl1"):
        Flow("tv")
    with pytest.raises(UserError, match=r"data.flow_bound is 0"):
        Flow("dis", bound=0)
    rows = Rows(videos, "a/right.mp4")
    dataset = VideoDataset(
        rows, CLIP, flow=Flow("stored", root=tmp_path / "half"), inputs=("flow",)
    )
    (failure,) = dataset[0, 0]["failures"]
    assert "no flow of it in" in failure.reason and "action=flow" in failure.reason
    twisted = tmp_path / "twisted"
    for side, settings in ((False, Settings("dis")), (True, Settings("dis", short_side=20))):
        target = twisted / file_of("a/right.mp4", side)
        source = str(videos / "a/right.mp4")
        make(Job("x", source, str(tmp_path / "part"), str(target), settings, side, None))
    both = Flow("stored", root=twisted, direction="both")
    (failure,) = VideoDataset(rows, CLIP, flow=both, inputs=("flow",))[0, 0]["failures"]
    assert "have different sizes" in failure.reason
    write_video(tmp_path / "half" / file_of("a/right.mp4"), 20)
    (failure,) = dataset[0, 0]["failures"]
    assert "not a file of flow" in failure.reason
    other = Flow("stored", root=store, method="tvl1")
    with pytest.raises(UserError, match=r"computed by dis, not by tvl1; set data.flow_method=dis"):
        VideoDataset(rows, CLIP, flow=other, inputs=("flow",))[0, 0]
    (tmp_path / "v" / "a").mkdir(parents=True)
    write_video(tmp_path / "v" / "a" / "right.mp4", 30)
    mixed = VideoDataset(
        Rows(tmp_path / "v", "a/right.mp4"), CLIP, flow=Flow("stored", root=store), inputs=("flow",)
    )
    (failure,) = mixed[0, 0]["failures"]
    assert "has 30 frames, and its flow" in failure.reason and "20 fields" in failure.reason
    with pytest.raises(UserError, match="takes optical flow"):
        VideoDataset(rows, CLIP, inputs=("flow",))
    with pytest.raises(DecodeError):
        FlowReader(str(videos / "a/right.mp4"))


# --- on the device ---


def bytes_batch(codes: Tensor, steps: float = 1 / 127.5) -> dict:
    """A batch of `(B, V, T, 2, H, W)` codes."""
    return {
        "flow": codes,
        "flow_steps": torch.full((*codes.shape[:3], 2), steps),
        "label": torch.arange(len(codes)),
        "seed": 3,
    }


def test_no_motion_is_exactly_zero_and_nothing_is_beyond_one():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 1, 16, 16).expand(1, 1, 3, 2, 16, 16)
    for compiled in (False, None):
        transform = DeviceTransform([0] * 3, [1] * 3, compile=compiled).eval()
        flow = transform(bytes_batch(codes))["flow"]
        assert flow.shape == (1, 1, 2, 3, 16, 16) and flow.dtype == torch.float32
        assert (flow[..., 8, 0] == 0).all() and not torch.signbit(flow[..., 8, 0]).any()
        expected = (torch.arange(256.0) - 128) / 127.5
        torch.testing.assert_close(flow[0, 0, 0, 0].flatten(), expected.clamp(-1, 1))
        doubled = transform(bytes_batch(codes, 2 / 127.5))["flow"]
        assert (doubled.min(), doubled.max()) == (-1, 1)


def test_each_field_is_as_fine_as_its_largest_displacement():
    frames = moving(2, (0.4, 0.1))
    codes, steps = Flow("dis").between(frames, np.array([0, 0]), np.array([1, 0]))
    assert codes[0].max() == 255 and (codes[1] == 128).all()
    truth = estimator("dis")(rows_of(frames), [(0, 1)])[0].transpose(2, 0, 1)
    found = (codes[0].float() - 128) * steps[0, :, None, None] * BOUND
    assert np.abs(found.numpy() - truth).max() < 0.01  # with the bound's own step: 0.08


def test_the_mean_vector_of_each_field_is_taken_off():
    """models.md B4.3: each map's mean is 0, and what is added to a field makes no difference."""
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(60, 190, (2, 1, 3, 2, 24, 24), generator=rng, dtype=torch.uint8)
    transform = DeviceTransform([0] * 3, [1] * 3, flow_mean=True).eval()
    flow = transform(bytes_batch(codes))["flow"]
    assert flow.mean((-2, -1)).abs().max() < 1e-6
    torch.testing.assert_close(transform(bytes_batch(codes + 40))["flow"], flow)
    assert flow.std() > 0.1


def test_flow_is_mixed_as_frames_are():
    codes = torch.tensor([28, 228], dtype=torch.uint8).view(2, 1, 1, 1, 1, 1)
    for knob in ("mixup", "cutmix"):
        transform = DeviceTransform([0] * 3, [1 / 255] * 3, Augment(**{knob: 1.0}), 2).train()
        batch = bytes_batch(codes.expand(2, 1, 2, 2, 32, 32))
        batch["video"] = codes.expand(2, 1, 2, 3, 32, 32)
        out = transform(batch)
        torch.testing.assert_close(out["flow"], (out["video"][:, :, :2] - 128) / 127.5)
        assert 0 < out["label"][0, 0] < 1
        alone = transform(bytes_batch(codes.expand(2, 1, 2, 2, 32, 32)))
        torch.testing.assert_close(alone["flow"], out["flow"])
        torch.testing.assert_close(alone["label"], out["label"])


@pytest.mark.slow
def test_the_fused_transform_gives_the_same():
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 1, 3, 2, 24, 24), generator=rng, dtype=torch.uint8)
    for settings in ({}, {"flow_mean": True}, {"augment": Augment(mixup=1.0), "num_classes": 2}):
        plain = DeviceTransform([0] * 3, [1] * 3, **settings, compile=False).train()
        fused = DeviceTransform([0] * 3, [1] * 3, **settings, compile=True).train()
        expected = plain(bytes_batch(codes))["flow"]
        torch.testing.assert_close(fused(bytes_batch(codes))["flow"], expected)


def test_a_box_in_a_picture_of_another_size_stays_inside():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = rng.integers(1, 200, 2)
        top, left = rng.integers(0, height), rng.integers(0, width)
        box = Geometry(
            int(top), int(left), int(rng.integers(1, height - top + 1)),
            int(rng.integers(1, width - left + 1)), True,
        )  # fmt: skip
        h, w = (int(n) for n in rng.integers(1, 200, 2))
        scaled = box.scaled(h / height, w / width)
        assert 0 <= scaled.top < scaled.top + scaled.height <= h
        assert 0 <= scaled.left < scaled.left + scaled.width <= w
        assert abs(scaled.top - box.top * h / height) <= 1.5 and scaled.flip
        assert box.scaled(1, 1) == box
