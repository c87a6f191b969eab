"""The SVM of two streams: what is fitted, to what, with which weights, and where it is kept."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC

from vidtrain import checkpoint
from vidtrain.callbacks import fit_fusion
from vidtrain.callbacks.fit_fusion import FitFusion, fit_svm
from vidtrain.tasks.classification import Classification
from vidtrain.types import UserError

WORDS = [
    "model=two_stream",
    "model.backbone=small",
    "clip.num_frames=2",
    "clip.size=48",
    "data=folder",
    "data.flow=farneback",
    "data.batch_size=8",
    "data.workers=0",
    "trainer=cpu",
    "logger=none",
    "views.clips=2",
    "views.crops=1",
]


def blobs(classes: int, each: int = 12, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre for each class."""
    torch.manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    points = torch.randn(classes, dim)[labels] + 0.3 * torch.randn(len(labels), dim)
    return points.double(), labels


def test_it_is_scikit_learns_linear_svm():
    points, labels = blobs(4)
    weight, bias = fit_svm(points, labels, 4, cost=0.7)
    reference = LinearSVC(C=0.7, dual="auto", random_state=0, max_iter=10_000)
    reference.fit(points.numpy(), labels.numpy())
    ours = points @ weight.T + bias
    np.testing.assert_allclose(ours.numpy(), reference.decision_function(points.numpy()))
    assert torch.equal(ours.argmax(1), labels)


def test_two_classes_have_a_plane_each():
    points, labels = blobs(2)
    weight, bias = fit_svm(points, labels, 2, cost=1.0)
    assert weight.shape == (2, 8) and torch.equal(weight[0], -weight[1])
    assert torch.equal((points @ weight.T + bias).argmax(1), labels)


def test_a_class_without_a_video_is_never_the_best():
    points, labels = blobs(3)
    labels[labels == 2] = 4  # of 6 classes, 2, 3 and 5 have none
    weight, bias = fit_svm(points, labels, 6, cost=1.0)
    assert torch.equal((points @ weight.T + bias).argmax(1), labels)
    assert bias[[2, 3, 5]].max() < -1000


def test_one_class_is_an_error():
    with pytest.raises(UserError, match="all of one class"):
        fit_svm(torch.randn(4, 6), torch.ones(4, dtype=torch.int64), 3, cost=1.0)
    with pytest.raises(UserError, match=r"callbacks\.fusion\.cost is 0"):
        FitFusion(0)


def by_hand(path: Path, root: Path, cache: Path):
    """Fit scikit-learn's SVM to a checkpoint's scores of the training videos, without the callback."""
    from vidtrain import build
    from vidtrain.data.collate import collate

    saved = checkpoint.load(path)
    task = checkpoint.build_task(saved, path, ()).eval()
    cfg = checkpoint.plain(checkpoint.config_of(saved), path)
    data = build.data(cfg)
    data.feed(task.model.inputs)
    dataset = data.dataset("train", test_views=True)
    features, labels = [], []
    for row in range(len(dataset)):
        batch = data.transform.eval()(collate([dataset[row, row]]))
        with torch.no_grad():
            logits = task.model(batch["video"][0], batch["flow"][0])  # (V, 2, K)
        scores = logits.softmax(-1).mean(0).double()
        features.append((scores / scores.norm(dim=-1, keepdim=True)).flatten().numpy())
        labels.append(int(batch["label"]))
    svm = LinearSVC(C=100, dual="auto", random_state=0, max_iter=10_000)
    return svm.fit(np.stack(features), labels), task.model.svm


def test_from_training_to_a_test_of_the_checkpoint(vidtrain, tiny_dataset, tmp_path, monkeypatch):
    def rate(task):
        task.val_metrics.reset()
        task.log("val/top1", float(task.current_epoch == 1))

    monkeypatch.setattr(Classification, "on_validation_epoch_end", rate)  # the second is the best
    words = [*WORDS, f"data.root={tiny_dataset}", "model.fusion=svm", "trainer.max_epochs=3"]
    words += ["optim=adamw_cosine", "optim.lr=3e-3", "data.batch_size=4"]
    words += ["callbacks.fusion.cost=100"]
    done = vidtrain("train", *words, "test=true")
    assert done.code == 0, done.err
    assert "SVM fitted to 24 training videos" in done.err
    (run,) = tmp_path.glob("runs/*/*")
    report = json.loads((run / "report.json").read_text())

    best = checkpoint.find(run)
    assert checkpoint.load(best)["epoch"] == 1
    reference, ours = by_hand(best, tiny_dataset, tmp_path / "cache")
    assert np.ptp(reference.coef_) > 0.5  # the scores tell the videos apart
    assert ours.fitted and not ours.pending
    np.testing.assert_allclose(ours.weight.numpy(), reference.coef_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours.bias.numpy(), reference.intercept_, rtol=1e-3, atol=1e-3)

    tested = vidtrain("test", f"ckpt={run}", "output=again")
    assert tested.code == 0, tested.err
    again = json.loads(Path("again/report.json").read_text())
    assert again["metrics"] == report["metrics"]
    predicted = vidtrain("predict", f"ckpt={run}", f"input={tiny_dataset}/test/zebra")
    assert predicted.code == 0, predicted.err
    with Path("again/predictions.csv").open(newline="") as file:
        scores = {
            row["path"]: (row["top1"], float(row["top1_score"])) for row in csv.DictReader(file)
        }
    for line in Path("predictions.jsonl").read_text().splitlines():
        found = json.loads(line)
        first = found["predictions"][0]
        label, score = scores[str(Path(found["path"]).relative_to(tiny_dataset))]
        assert first["label"] == label and first["score"] == pytest.approx(score, abs=1e-4)

    early = vidtrain("test", f"ckpt={run}/checkpoints/last.ckpt")
    assert early.code == 2 and "the SVM is fitted when training ends" in early.err
    assert early.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.multi_label=true"], "is for one label a video"),
        (["data.flow=null"], "the model takes optical flow; add data.flow=stored"),
    ],
)
def test_what_cannot_be_is_said_before_training(vidtrain, tiny_dataset, words, message):
    words = [*WORDS, f"data.root={tiny_dataset}", "model.fusion=svm", *words]
    done = vidtrain("train", *words, "trainer.max_epochs=1")
    assert done.code == 2 and message in done.err
    assert "epoch 1/" not in done.out


def test_without_scikit_learn(vidtrain, tiny_dataset, monkeypatch):
    monkeypatch.setattr(fit_fusion, "find_spec", lambda name: None)
    done = vidtrain("train", *WORDS, f"data.root={tiny_dataset}", "model.fusion=svm")
    assert done.code == 2 and "pip install 'vidtrain[svm]'" in done.err


@pytest.mark.parametrize("streams", ["spatial", "temporal"])
def test_a_stream_alone_needs_no_fusion(vidtrain, tiny_dataset, streams, tmp_path):
    words = [*WORDS, f"data.root={tiny_dataset}", f"model.streams={streams}", "test=true"]
    if streams == "spatial":
        words.append("data.flow=null")
    done = vidtrain("train", *words, "trainer.max_epochs=1")
    assert done.code == 0, done.err
    assert "SVM" not in done.err and "clips/s" in done.out
    (path,) = tmp_path.glob("runs/*/*/report.json")
    assert 0 <= json.loads(path.read_text())["metrics"]["test/top1"] <= 1


def test_streams_that_were_trained_alone_are_fused_without_more_training(
    vidtrain, tiny_dataset, tmp_path
):
    words = [*WORDS, f"data.root={tiny_dataset}"]
    parts = {}
    for streams in ("spatial", "temporal"):
        name = [f"model.streams={streams}", f"paths.runs={streams}", "trainer.max_epochs=1"]
        done = vidtrain("train", *words, *name)
        assert done.code == 0, done.err
        (run,) = tmp_path.glob(f"{streams}/*/*")
        parts[streams] = checkpoint.find(run)
    weights = ", ".join(f"{name}: {path}" for name, path in parts.items())
    words += ["model.fusion=svm", f"model.weights={{{weights}}}", "trainer.max_epochs=0"]
    done = vidtrain("train", *words, "callbacks.fusion.cost=100", "paths.runs=both", "test=true")
    assert done.code == 0, done.err
    (run,) = tmp_path.glob("both/*/*")
    saved = checkpoint.load(checkpoint.find(run))["state_dict"]
    for path in parts.values():
        for key, tensor in checkpoint.load(path)["state_dict"].items():
            assert torch.equal(saved[key], tensor), key
    reference, ours = by_hand(checkpoint.find(run), tiny_dataset, tmp_path / "cache")
    np.testing.assert_allclose(ours.weight.numpy(), reference.coef_, rtol=1e-3, atol=1e-3)
    assert np.ptp(reference.coef_) > 0.5
    tested = vidtrain("test", f"ckpt={run}", "output=again")
    assert tested.code == 0, tested.err


def test_ctrl_c_while_it_is_fitted(vidtrain, tiny_dataset, tmp_path, monkeypatch):
    words = [*WORDS, f"data.root={tiny_dataset}", "model.fusion=svm", "trainer.max_epochs=1"]
    score = FitFusion._score

    def interrupted(self, *args):
        yield next(score(self, *args))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(FitFusion, "_score", interrupted)
    stopped = vidtrain("train", *words)
    assert stopped.code == 130 and "stopped by SIGINT while the SVM was fitted" in stopped.out
    (run,) = tmp_path.glob("runs/*/*")
    assert vidtrain("test", f"ckpt={run}").code == 2  # it has none yet
    monkeypatch.setattr(FitFusion, "_score", score)
    again = vidtrain("train", *words, f"resume={run}")
    assert again.code == 0 and "SVM fitted to 24 training videos" in again.err
    assert vidtrain("test", f"ckpt={run}").code == 0


@pytest.mark.slow
def test_two_ranks_score_a_share_each_and_fit_the_same(tiny_dataset, tmp_path):
    words = [*WORDS, f"data.root={tiny_dataset}", "model.fusion=svm", "trainer.max_epochs=1"]
    words += ["trainer.devices=2", "trainer.strategy=ddp", f"paths.cache={tmp_path}/cache"]
    words += ["callbacks.fusion.cost=100", "data.batch_size=4", "test=true"]
    done = subprocess.run(
        [sys.executable, "-m", "vidtrain", "train", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SVM fitted to 24 training videos") == 1
    (run,) = tmp_path.glob("runs/*/*")
    reference, ours = by_hand(checkpoint.find(run), tiny_dataset, tmp_path / "cache")
    np.testing.assert_allclose(ours.weight.numpy(), reference.coef_, rtol=1e-3, atol=1e-3)


def test_where_epochs_are_shortened_videos_of_all_classes_are_taken(
    vidtrain, tiny_dataset, monkeypatch
):
    fitted = []
    monkeypatch.setattr(
        fit_fusion,
        "fit_svm",
        lambda features, labels, classes, cost: (
            fitted.append(labels.tolist()) or (torch.zeros(3, 6), torch.zeros(3))
        ),
    )
    words = [*WORDS, f"data.root={tiny_dataset}", "model.fusion=svm", "debug=fast"]
    done = vidtrain("train", *words, "data.batch_size=3")
    assert done.code == 0, done.err
    assert fitted == [[0, 0, 1, 1, 2, 2]]  # two batches of three, of 24 videos sorted by class
