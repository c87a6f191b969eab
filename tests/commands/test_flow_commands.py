"""Optical flow through the command line: computed, looked at, trained on, tested and predicted with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from vidtrain import build
from vidtrain.config import conf_dir
from vidtrain.data import flow_store
from vidtrain.visualize.clips import write_mp4

CLIP = ["clip.num_frames=4", "clip.stride=1", "clip.size=32", "data.workers=0"]
NET = ["model=two_stream", "model.backbone=resnet18", *CLIP]
FAST = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "logger=none"]
FAST += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=2", "data.batch_size=2"]
FAST += ["data.hflip=false", "views.clips=2", "views.crops=1"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Noise that moves left or right: a folder per split and class."""
    root = tmp_path_factory.mktemp("moving") / "videos"
    noise = torch.rand(1, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    noise = torch.nn.functional.interpolate(noise, (48, 80), mode="bicubic").clamp(0, 1)[0]
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        for way, step in (("left", -2), ("right", 2)):
            folder = root / split / way
            folder.mkdir(parents=True)
            for number in range(count):
                frames = [noise.roll(5 * number + step * t, 2) for t in range(9)]
                frames = (torch.stack(frames) * 255).byte().expand(-1, 3, -1, -1)
                write_mp4(frames[..., 8:-8], 25, folder / f"{number}.mp4")
    return root


@pytest.fixture(scope="module")
def in_this_process():
    """Do without worker processes, which take seconds to import what they need."""

    def run(function, jobs, workers, time_limit, progress, culprit):
        for job in jobs:
            progress(function(job))
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vidtrain.data.crew.run", run)
        yield


def test_flow_is_computed_in_processes_and_kept_beside_the_videos(vidtrain, videos):
    words = ["data", "action=flow", "data=folder", f"data.root={videos}", "data.workers=1"]
    result = vidtrain(*words, "data.flow_method=farneback", "split=train")
    assert result.code == 0, result.err
    store = videos.parent / "videos-flow"
    assert len([*store.glob("forward/train/*/*.mp4")]) == 4 and not (store / "backward").exists()
    facts = json.loads((store / flow_store.FACTS).read_text())
    assert f"32 fields in 4 files, {facts['bytes'] / 1e6:.1f} MB" in result.out
    assert f"by {facts['mean_abs_error']:.3f} pixels on average" in result.out
    assert "4 files made, 0 there before, 0 unusable" in result.out
    assert "data.flow=stored data.flow_method=farneback" in result.out


def test_bad_settings_are_one_line(vidtrain, videos, tmp_path):
    words = ["data", "data=folder", f"data.root={videos}", "data.workers=1"]
    for wrong, message in (
        (["action=flow", "data.flow_method=lk"], "data.flow_method is 'lk'"),
        (["action=flow", "flow.crf=99"], "flow.crf is 99"),
        (["action=flow", "output=there"], "set that in place of output"),
        (["action=flow", "flow.time_limit=0"], "flow.time_limit is 0"),
        (["action=flow", f"data.flow_root={videos}/flow"], "within one another"),
        (["action=show", "data.flow=stored", "data.flow_root=gone"], "there is no flow in gone"),
        (["action=show", "data.flow=maybe"], "data.flow is 'maybe'; it is one of null, stored"),
        (["action=show", "data.flow=dis", "data.flow_bound=-1"], "data.flow_bound is -1"),
    ):
        result = vidtrain(*words, "model=c3d", *wrong)
        assert result.code == 2 and message in result.err, (wrong, result.err)
        assert len(result.err.strip().splitlines()) == 1


def test_training_without_its_flow_leaves_no_run_behind(vidtrain, videos, tmp_path):
    words = ["data=folder", f"data.root={videos}", *NET, *FAST]
    for wrong, message in (
        (["data.flow=stored", "data.flow_root=gone"], "there is no flow in gone"),
        (["data.flow=raft", "data.flow_weights=gone.pth"], "data.flow_weights=gone.pth"),
    ):
        result = vidtrain("train", *words, *wrong)
        assert result.code == 2 and message in result.err, result.err
        assert not (tmp_path / "runs").exists()


def test_flow_is_shown_below_its_clip(vidtrain, videos, tmp_path, in_this_process):
    words = ["data=folder", f"data.root={videos}", f"data.flow_root={tmp_path}/f", "augment=none"]
    result = vidtrain("data", "action=flow", *words, "data.workers=1")
    assert result.code == 0 and f"data.flow_root={tmp_path}/f" in result.out, result.err
    sheets = []
    for source in ("null", "stored", "dis"):
        output = tmp_path / f"{source}.png"
        result = vidtrain(
            "data", "action=show", *words, f"data.flow={source}", f"output={output}", "clips=2",
            "split=test", "model=c3d", *CLIP,
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "2 clips of 4 frames, 32 x 32" in result.out
        sheets.append(np.asarray(Image.open(output).convert("RGB")).astype(int))
    assert sheets[1].shape[0] > 1.5 * sheets[0].shape[0]
    for sheet in sheets[1:]:  # what moves right is red, what moves left is cyan
        red = (sheet[..., 0] > 200) & (sheet[..., 1] < 120) & (sheet[..., 2] < 120)
        cyan = (sheet[..., 0] < 120) & (sheet[..., 1] > 150) & (sheet[..., 2] > 200)
        assert min(red.sum(), cyan.sum()) > 3000


def test_train_test_and_predict_with_flow(vidtrain, videos, tmp_path, in_this_process):
    data = ["data=folder", f"data.root={videos}", f"data.flow_root={tmp_path}/f"]
    result = vidtrain("train", *NET, *FAST, *data)
    assert result.code == 2 and "takes optical flow; add data.flow=stored" in result.err
    assert vidtrain("data", "action=flow", *data, "data.workers=1").code == 0
    run = tmp_path / "run"
    result = vidtrain(
        "train", *NET, *FAST, *data, "data.flow=stored", "test=true", f"hydra.run.dir={run}"
    )
    assert result.code == 0, result.err
    assert json.loads((run / "report.json").read_text())["videos"]["scored"] == 2
    result = vidtrain("test", f"ckpt={run}", "data.flow=dis", f"output={tmp_path}/dis", *FAST)
    assert result.code == 0, result.err
    files = videos / "test"  # have no flow of their own: it is computed as what was stored
    for stored in (files, files / "left" / "0.mp4"):
        result = vidtrain("predict", f"ckpt={run}", f"input={stored}", "workers=0")
        assert result.code == 0, result.err
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 1 and len(json.loads(lines[0])["predictions"]) == 2


@pytest.mark.parametrize("source", ["stored", "dis"])
def test_batches_are_the_same_from_workers_a_cache_and_shards(
    vidtrain, videos, tmp_path, in_this_process, source
):
    words = ["data=folder", f"data.root={videos}", f"data.flow_root={tmp_path}/f"]
    assert vidtrain("data", "action=flow", *words, "data.workers=1").code == 0
    assert (
        vidtrain("data", "action=pack", *words, f"output={tmp_path}/p", "data.workers=1").code == 0
    )
    packed = ["data=packed", f"data.root={tmp_path}/p", f"data.flow_root={tmp_path}/f"]
    more = [f"data.flow={source}", "data.shuffle=false", "data.batch_size=4", "augment=none"]
    more += [f"paths.cache={tmp_path}/cache"]

    def first(*options: str, inputs=("video", "flow")) -> dict:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            data = build.data(compose("train", ["model=c3d", *CLIP, *more, *options]))
        data.feed(inputs)
        try:
            return data.transform.eval()(next(iter(data.train_dataloader())))
        finally:
            data.teardown("fit")

    plain = first(*words)
    assert plain["flow"].shape == (4, 1, 2, 4, 32, 32) and plain["video"].shape[2] == 3
    assert plain["flow"].abs().max() > 0.02
    batch = first(*words, "data.workers=2")
    assert torch.equal(batch["index"], plain["index"])
    torch.testing.assert_close(batch["flow"], plain["flow"])
    torch.testing.assert_close(batch["video"], plain["video"])
    cached = first(*words, "data.cache=ram", "data.cache_gb=0.01")
    loose = {"atol": 0.002, "rtol": 0} if source == "stored" else {"atol": 0.03, "rtol": 0}
    torch.testing.assert_close(cached["flow"], plain["flow"], **loose)
    alone = first(*words, "data.workers=2", inputs=("flow",))
    assert "video" not in alone
    torch.testing.assert_close(alone["flow"], plain["flow"])
    assert "flow" not in first(*words, inputs=("video",))
    shards = first(*packed)
    assert shards["flow"].abs().max() > 0.02 and shards["flow"].shape == plain["flow"].shape
    order = [sorted(b["flow"].flatten(1).sum(1).tolist()) for b in (shards, plain)]
    assert order[0] == pytest.approx(order[1], rel=1e-4)
    result = vidtrain("data", "action=flow", *packed)
    assert result.code == 2 and "compute the flow of its videos before packing" in result.err
    if source == "stored":
        result = vidtrain("data", "action=show", *packed[:2], "data.flow=stored", "model=c3d")
        assert result.code == 2 and "data.flow_root says where it lies" in result.err
