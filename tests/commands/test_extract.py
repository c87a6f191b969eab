"""`vidtrain extract`: which windows, which numbers, going on, failures, and training on the result."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from make_video import write_video

from vidtrain import build
from vidtrain.commands import extract
from vidtrain.commands.extract import in_order, to_array
from vidtrain.data.decode import open_video
from vidtrain.models.cnn_lstm import cnn_lstm
from vidtrain.types import UserError

# A network on frames of 32 pixels that is built at once.
SMALL = ["model=late_fusion_pool", "model.backbone=small", "clip.size=32"]
SMALL += ["clip.num_frames=4", "clip.stride=2", "data.workers=0", "device=cpu", "dtype=float32"]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "features.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def network(compose, *overrides: str) -> torch.nn.Module:
    """Build what `extract` builds with the same words."""
    cfg = compose("extract", "output=x", *SMALL, *overrides, "data.num_classes=1")
    torch.manual_seed(0)
    net = build.model(cfg).eval()
    net.reset_classifier(0)
    return net


def clip_of(path: Path, frames: list[int], size: int, cfg) -> torch.Tensor:
    """Decode frames, crop the middle, normalise: (1, 3, T, size, size)."""
    with open_video(path) as reader:
        pixels = reader.frames(frames).float() / 255
    height, width = pixels.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    pixels = pixels[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(list(v)).view(3, 1, 1) for v in (cfg.clip.mean, cfg.clip.std))
    return ((pixels - mean) / std).transpose(0, 1)[None]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three videos of 32 x 32 pixels, in two folders."""
    root = tmp_path / "videos"
    for name, frames in (("a.mp4", 20), ("sub/b.mp4", 9), ("sub/c.mp4", 3)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, frames, size=(32, 32), gop=4)
    return root


def test_windows_cover_a_video_and_are_what_the_network_makes_of_them(
    vidtrain, compose, folder, tmp_path
):
    net = network(compose)
    cfg = compose("extract", "output=x", *SMALL)
    result = vidtrain("extract", *SMALL, f"input={folder}", "output=out")
    assert result.code == 0, result.err
    assert "neither ckpt= nor model.weights=" in result.err and "3 of 3 videos in out" in result.out
    rows = table(tmp_path / "out")
    assert [row["path"] for row in rows] == ["a.mp4.npy", "sub/b.mp4.npy", "sub/c.mp4.npy"]
    assert [row["video"] for row in rows] == [str(folder / p["path"][:-4]) for p in rows]
    # a window spans 0, 2, 4, 6: 20 frames have three of them, the last one up to the last frame
    assert [row["features"] for row in rows] == ["3", "2", "1"]
    assert [row["frames"] for row in rows] == ["20", "9", "3"]
    assert {(row["label"], row["split"], row["group"]) for row in rows} == {("", "", "")}
    assert {(float(row["fps"]), float(row["rate"])) for row in rows} == {(24.0, 3.0)}

    windows = {
        "a.mp4": [[0, 2, 4, 6], [8, 10, 12, 14], [13, 15, 17, 19]],
        "sub/b.mp4": [[0, 2, 4, 6], [2, 4, 6, 8]],
        "sub/c.mp4": [[0, 2, 2, 2]],
    }
    for name, frames in windows.items():
        found = np.load(tmp_path / "out" / f"{name}.npy")
        clips = torch.cat([clip_of(folder / name, window, 32, cfg) for window in frames])
        with torch.no_grad():
            expected = net.forward_features(clips).mean((2, 3, 4)).numpy()
        assert found.dtype == np.float32 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        if len(found) > 1:
            assert np.abs(found[0] - found[1]).max() > 1e-4


def test_every_sets_how_far_windows_are_apart(vidtrain, folder, tmp_path):
    result = vidtrain("extract", *SMALL, f"input={folder}/a.mp4", "output=out", "every=1")
    assert result.code == 0, result.err
    (row,) = table(tmp_path / "out")
    assert row["path"] == "a.mp4.npy" and row["features"] == "14" and row["rate"] == "24.0"
    dense = np.load(tmp_path / "out" / "a.mp4.npy")
    result = vidtrain("extract", *SMALL, f"input={folder}/a.mp4", "output=apart", "batch_size=1")
    tiled = np.load(tmp_path / "apart" / "a.mp4.npy")
    np.testing.assert_allclose(tiled, dense[[0, 8, 13]], rtol=1e-4, atol=1e-5)


def test_steps_of_a_network_on_frames_are_one_a_frame(vidtrain, compose, folder, tmp_path):
    """B5.4: what a frozen backbone makes of a clip lies in the file."""
    words = [*SMALL[2:], "model=cnn_lstm", "model.backbone=squeezenet1_1", "clip.stride=1"]
    cfg = compose("extract", "output=x", *words, "data.num_classes=1")
    torch.manual_seed(0)
    net = build.model(cfg).eval()
    result = vidtrain("extract", *words, f"input={folder}", "output=out", "pool=step")
    assert result.code == 0, result.err
    rows = table(tmp_path / "out")
    assert [row["features"] for row in rows] == [row["frames"] for row in rows] == ["20", "9", "3"]
    assert {row["rate"] for row in rows} == {"24.0"}

    head = cnn_lstm(5, features=512).eval()
    net.reset_classifier(5)
    head.load_state_dict(
        {key: value for key, value in net.state_dict().items() if not key.startswith("backbone.")}
    )
    cached = torch.from_numpy(np.load(tmp_path / "out" / "a.mp4.npy"))[3:19].T[None]
    with torch.no_grad():
        logits = net(clip_of(folder / "a.mp4", list(range(3, 19)), 32, cfg))
        torch.testing.assert_close(head(cached), logits, rtol=0, atol=1e-5)
        assert logits[0].std(0).max() > 1e-6  # the steps differ


def test_maps_keep_time_and_space(vidtrain, folder, tmp_path):
    words = ["model=small_3d_cnn", "clip.size=32", "clip.num_frames=8", "clip.stride=1"]
    words += ["data.workers=0", "device=cpu"]
    result = vidtrain("extract", *words, f"input={folder}/a.mp4", "output=out", "pool=none")
    assert result.code == 0, result.err
    maps = np.load(tmp_path / "out" / "a.mp4.npy")
    assert maps.dtype == np.float16 and maps.shape[0] == 3 and maps.ndim == 5
    result = vidtrain("extract", *words, f"input={folder}/a.mp4", "output=steps", "pool=step")
    steps = np.load(tmp_path / "steps" / "a.mp4.npy")
    # windows begin at 0, 8 and 12; a step of the map spans four frames, and none comes twice
    assert maps.shape[2] == 2 and len(steps) == 5
    expected = np.concatenate([maps[0], maps[1], maps[2][:, 1:]], 1).astype("f4").mean((2, 3)).T
    np.testing.assert_allclose(steps, expected, atol=2e-3)


def test_a_run_that_was_stopped_goes_on(vidtrain, folder, tmp_path):
    out = tmp_path / "out"
    words = ["extract", *SMALL, f"input={folder}", "output=out"]
    assert vidtrain(*words).code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    was = table(out)
    (out / "sub/b.mp4.npy").unlink()
    result = vidtrain(*words)
    assert result.code == 0 and "3 of 3 videos in out, 2 of which were there" in result.out
    made = [p for p in out.rglob("*.npy") if p.stat().st_mtime_ns != before[p]]
    assert [path.name for path in made] == ["b.mp4.npy"] and table(out) == was

    # another video under the same name, and a line that was cut off
    write_video(folder / "a.mp4", 30, size=(32, 32), gop=4)
    with (out / ".vidtrain-extract").open("a") as file:
        file.write('{"path": "sub/c.m')
    result = vidtrain(*words)
    assert result.code == 0 and "2 of which were there" in result.out
    assert table(out)[0]["frames"] == "30"
    assert not list(out.glob(".vidtrain-parts/*"))


def test_ctrl_c_says_that_what_is_done_stays(vidtrain, folder, tmp_path, monkeypatch):
    find = extract.extracted

    def interrupted(*args):
        yield next(find(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(extract, "extracted", interrupted)
    words = ["extract", *SMALL, f"input={folder}", "output=out"]
    stopped = vidtrain(*words)
    assert stopped.code == 130 and "what is done stays" in stopped.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again = vidtrain(*words)
    assert again.code == 0 and "3 of 3 videos in out, 1 of which were there" in again.out


def test_features_of_other_settings_are_not_mixed(vidtrain, folder, tmp_path):
    words = ["extract", *SMALL, f"input={folder}", "output=out"]
    assert vidtrain(*words).code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.npy")}
    for word, other in (
        ("seed=1", "network or weights"),
        ("every=3", "every, pool, dtype or precision"),
    ):
        result = vidtrain(*words, word)
        assert result.code == 2 and f"another {other}; name another folder" in result.err, word
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.npy")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_that_cannot_be_read_is_named(vidtrain, folder, tmp_path, workers):
    whole = (folder / "sub/b.mp4").read_bytes()
    (folder / "sub/b.mp4").write_bytes(b"no video" * 40)
    words = ["extract", *SMALL, f"data.workers={workers}", f"input={folder}", "output=out"]
    result = vidtrain(*words)
    assert result.code == 1
    assert f"{folder}/sub/b.mp4: " in result.err and "2 of 3 videos in out" in result.out
    assert [row["path"] for row in table(tmp_path / "out")] == ["a.mp4.npy", "sub/c.mp4.npy"]
    (folder / "sub/b.mp4").write_bytes(whole)
    result = vidtrain(*words)
    assert result.code == 0 and len(table(tmp_path / "out")) == 3


def test_a_dataset_with_its_labels_and_splits_then_training_on_it(vidtrain, tiny_dataset, tmp_path):
    data = ["data=folder", f"data.root={tiny_dataset}"]
    train = vidtrain("extract", *SMALL, *data, "output=out", "split=train", "dtype=float16")
    assert train.code == 0, train.err
    assert {row["split"] for row in table(tmp_path / "out")} == {"train"}
    result = vidtrain("extract", *SMALL, *data, "output=out", "dtype=float16")
    assert result.code == 0 and "36 of 36 videos in out, 24 of which were there" in result.out
    rows = table(tmp_path / "out")
    assert json.loads((tmp_path / "out/classes.json").read_text()) == [
        "apple",
        "it's (a) pear",
        "zebra",
    ]
    for row in rows:
        split, label, name = row["video"].split("/")
        assert (row["split"], row["label"]) == (split, label)
        assert row["path"] == f"{split}/{label}/{name}.npy"
        assert len(np.load(tmp_path / "out" / row["path"])) == int(row["features"])
    width = np.load(tmp_path / "out" / rows[0]["path"]).shape[1]

    learn = ["train", "model=cnn_lstm", "data=features", "data.root=out", "clip.num_frames=2"]
    learn += ["optim=adamw_cosine", "optim.lr=0.03", "model.dropout_features=0", "data.workers=0"]
    learn += ["trainer=cpu", "trainer.max_epochs=15", "logger=none", "test=true"]
    wrong = vidtrain(*learn, "model.features=7")
    assert wrong.code == 2 and f"set model.features={width}" in wrong.err
    result = vidtrain(*learn, f"model.features={width}")
    assert result.code == 0, result.err
    report = json.loads(next(tmp_path.glob("runs/*/*/report.json")).read_text())
    assert report["metrics"]["test/top1"] == 1.0  # told apart by their colour
    assert "2 features x 1, 10 clips\n" in result.out
    page = next(tmp_path.glob("runs/*/*/report.html")).read_text()
    assert "A clip is 2 features, consecutive" in page and "pixels" not in page.split("Protocol")[1]

    # the features of a trained network, out of its checkpoint
    (ckpt,) = {path.parent for path in tmp_path.glob("runs/*/*/checkpoints/last.ckpt")}
    again = vidtrain("extract", f"ckpt={ckpt}", "output=deep")
    assert again.code == 2 and "the network takes features itself" in again.err


def test_a_checkpoint_says_which_network_clip_and_data(vidtrain, tiny_dataset, tmp_path):
    words = [*SMALL[:-2], "data=folder", f"data.root={tiny_dataset}", "trainer=cpu", "logger=none"]
    words += [
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=0",
    ]
    assert vidtrain("train", *words).code == 0
    (run,) = tmp_path.glob("runs/*/*")
    result = vidtrain("extract", f"ckpt={run}", "output=out", "split=test", "device=cpu")
    assert result.code == 0, result.err
    assert "neither ckpt=" not in result.err
    rows = table(tmp_path / "out")
    assert len(rows) == 6 and {row["split"] for row in rows} == {"test"}
    assert [row["features"] for row in rows][:2] == ["2", "2"]  # 10 and 11 frames, 8 a window
    saved = torch.load(next(run.glob("checkpoints/*.ckpt")), weights_only=True)
    assert saved["vidtrain"]["config"]["clip"]["num_frames"] == 4

    # of other files, with another stride
    more = ["input=" + str(tiny_dataset / "test" / "apple"), "clip.stride=1", "device=cpu"]
    result = vidtrain("extract", f"ckpt={run}", "output=files", *more)
    assert result.code == 0, result.err
    assert [row["features"] for row in table(tmp_path / "files")] == ["3", "3"]
    wrong = vidtrain("extract", f"ckpt={run}", "output=out2", "model=c3d")
    assert wrong.code == 2 and "model= cannot be changed here" in wrong.err


def test_pieces_of_a_video_have_files_of_their_own(vidtrain, tmp_path):
    root = tmp_path / "pieces"
    root.mkdir()
    write_video(root / "v.mp4", 60, size=(32, 32))
    (root / "videos.csv").write_text(
        "path,label,start,end\nv.mp4,a,0,1\nv.mp4,b,1,2\nv.mp4,a,0,1\n"
    )
    data = ["data=folder", f"data.root={root}", "data.test_fraction=0", "data.val_fraction=0"]
    result = vidtrain("extract", *SMALL, *data, "output=out")
    assert result.code == 0, result.err
    rows = table(tmp_path / "out")
    assert [row["path"] for row in rows] == ["v.mp4@0-1.npy", "v.mp4@1-2.npy", "v.mp4@0-1.npy"]
    assert [(row["label"], row["frames"]) for row in rows] == [
        ("a", "24"),
        ("b", "24"),
        ("a", "24"),
    ]
    first, second = (np.load(tmp_path / "out" / row["path"]) for row in rows[:2])
    assert first.shape == second.shape and np.abs(first - second).max() > 1e-4


@pytest.mark.slow
def test_names_that_are_no_text(vidtrain, tmp_path):
    root = tmp_path / "odd"
    root.mkdir()
    write_video(root / 'a, "b".mp4', 9, size=(32, 32))
    shutil.copy(root / 'a, "b".mp4', root / os.fsdecode(b"caf\xe9.mp4"))
    result = vidtrain("extract", *SMALL, f"input={root}", "output=out")
    assert result.code == 0, result.err
    assert table(tmp_path / "out")[0]["path"] == 'a, "b".mp4.npy'
    assert vidtrain("extract", *SMALL, f"input={root}", "output=out").out.count("2 of which") == 1


@pytest.mark.slow
def test_half_precision_is_near(vidtrain, folder, tmp_path):
    words = ["extract", *SMALL, f"input={folder}/a.mp4"]
    vidtrain(*words, "output=full")
    assert vidtrain(*words, "output=half", "precision=bf16", "dtype=float16").code == 0
    full, half = (np.load(tmp_path / name / "a.mp4.npy") for name in ("full", "half"))
    assert half.dtype == np.float16
    assert 0 < np.abs(full - half).max() < 0.05 * np.abs(full).max()


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match=r"a\.npy: features of 7e\+04; set dtype=float32"):
        to_array(torch.tensor([[7e4]]), "float16", "a.npy")
    with pytest.raises(UserError, match=r"the network's features are not finite"):
        to_array(torch.tensor([[torch.nan]]), "float32", "a.npy")


def test_steps_of_windows_in_order():
    steps = torch.arange(12.0).view(3, 4, 1)
    side_by_side = in_order(steps, np.array([0, 8, 16]), 2.0, 24)
    assert side_by_side.flatten().tolist() == list(range(12))
    overlapping = in_order(steps, np.array([0, 8, 12]), 2.0, 20)
    assert overlapping.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    longer_than_the_video = in_order(steps[:1], np.array([0]), 2.0, 3)
    assert longer_than_the_video.flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=c3d"], "output is not set; add output=..."),
        (["output=o"], "whose features? add ckpt=..., or model=..."),
        (["output=o", "model=c3d", "pool=mean"], "pool is 'mean'; it is one of window, step, none"),
        (["output=o", "model=c3d", "every=0"], "every is 0; it must be a whole number"),
        (["output=o", "model=c3d", "data=demo", "input=a.mp4"], "give one or the other"),
        (["output=o", "ckpt=none.ckpt"], "no checkpoint none.ckpt"),
        (["output=o", "model=c3d", "outptu=o"], "no setting 'outptu'; did you mean 'output'?"),
    ],
)
def test_a_mistake_is_one_line(vidtrain, words, message):
    result = vidtrain("extract", *words)
    assert result.code == 2 and message in result.err, result.err
    assert len(result.err.strip().splitlines()) == 1


def test_a_folder_that_is_in_use_is_refused(vidtrain, folder, tmp_path):
    for output, message in ((folder, "other things in it"), (folder / "a.mp4", "is a file")):
        result = vidtrain("extract", *SMALL, f"input={folder}", f"output={output}")
        assert result.code == 2 and message in result.err
    assert not list(folder.rglob("*.npy"))
