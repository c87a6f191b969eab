"""Masked pretraining from the shell: what it learns from, what it leaves, and what follows from it."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_video import write_video
from omegaconf import OmegaConf
from test_survive import HERE, add, assert_equal, assert_same_end, states

from vidtrain.sweep import Table

ENCODER = ["+model.patch=8", "+model.dim=24", "+model.depth=1", "+model.heads=2"]
SHAPE = ["clip.size=32", "clip.num_frames=4", "clip.stride=2"]
RUN = ["data=folder", "data.batch_size=4", "data.workers=0", "trainer=cpu", "trainer.max_epochs=1"]
RUN += ["logger=none", "views.clips=2", "views.crops=1", *SHAPE, *ENCODER]
DECODER = ["+model.decoder_dim=12", "+model.decoder_depth=1", "+model.decoder_heads=2"]
PRETRAIN = ["train", "model=videomae_small_pretrain", *RUN, *DECODER]
FINETUNE = ["train", "model=videomae_small", *RUN]
UNLABELLED = "data.label=null"


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Eight videos in one folder. Do not write into it."""
    root = tmp_path_factory.mktemp("flat")
    for number in range(8):
        write_video(root / f"{number}.mp4", 12, size=(48, 40), numbers=range(9 * number, 300))
    return root


def move(videos: Path, root: Path, names: list[str]) -> Path:
    """Copy the videos to these places below a folder."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / f"{number}.mp4", root / name)
    return root


def only(pattern: str, folder: Path) -> Path:
    (found,) = folder.glob(pattern)
    return found


def losses(run: Path) -> dict[str, float]:
    """Read a test's losses, in the order of the file."""
    with (run / "losses.csv").open() as file:
        return {row["path"]: float(row["loss"]) for row in csv.DictReader(file)}


def refused(vidtrain, *words: str) -> str:
    """Give the one line that a mistake is answered with; it leaves no run."""
    result = vidtrain(*words)
    assert result.code == 2, result.out
    assert not list(Path("runs").glob("*/*")), "a run was left behind"
    (line,) = result.err.strip().splitlines()
    return line


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pretrained")


@pytest.fixture
def pretrained(vidtrain, shelf, videos) -> Path:
    """A finished run without a test, the same one for all. Do not write into it."""
    run = shelf / "run"
    if not run.exists():
        words = [*PRETRAIN, UNLABELLED, f"data.root={videos}", f"hydra.run.dir={run}"]
        result = vidtrain(*words, "logger=csv", "trainer.log_every_n_steps=1")
        assert result.code == 0, result.err
        assert "no labels; 5 train, 1 val, 2 test" in result.out
    return run


# what it learns from


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ([f"a{n % 3}/b{n % 2}/{n}.mp4" for n in range(8)], "5 train, 1 val, 2 test"),
        ([f"{'train' if n < 4 else 'val' if n < 7 else 'test'}/{n}.mp4" for n in range(8)],
         "4 train, 3 val, 1 test"),
    ],
)  # fmt: skip
def test_videos_may_lie_in_any_folders(vidtrain, videos, tmp_path, names, splits):
    root = move(videos, tmp_path / "data", names)
    result = vidtrain(*PRETRAIN, f"data.root={root}", UNLABELLED, "test=true")
    assert result.code == 0, result.err
    assert f"folder: no labels; {splits}" in result.out
    run = only("runs/*/*", tmp_path)
    found = losses(run)
    assert len(found) == json.loads((run / "report.json").read_text())["videos"]["scored"]
    values = list(found.values())
    assert values == sorted(values, reverse=True) and all(0 < loss < 5 for loss in values)
    # The video's own name says where it lies, and its picture is on the page.
    assert set(found) <= set(names)
    assert "data:image/png" in (run / "report.html").read_text()


def test_a_table_needs_no_column_of_labels(vidtrain, videos, tmp_path):
    root = move(videos, tmp_path / "data", [f"{n}.mp4" for n in range(8)])
    (root / "videos.csv").write_text("path,split\n" + "".join(f"{n}.mp4,train\n" for n in range(8)))
    words = [*PRETRAIN, f"data.root={root}"]
    assert "no column 'label'" in refused(vidtrain, *words)
    result = vidtrain(*words, UNLABELLED)
    assert result.code == 0 and "no labels; 7 train, 1 val" in result.out, result.err


def test_without_being_told_that_there_are_no_labels_it_says_how(vidtrain, videos, tmp_path):
    assert "data.label=null" in refused(vidtrain, *PRETRAIN, f"data.root={videos}")
    root = move(
        videos, tmp_path / "data", [f"{'train' if n < 6 else 'val'}/{n}.mp4" for n in range(8)]
    )
    told = vidtrain(*PRETRAIN, f"data.root={root}", "debug=fast")
    assert "train, val are taken for classes" in told.out and "data.label=null" in told.out


def test_labels_change_nothing(vidtrain, tiny_dataset, tmp_path):
    line = [*PRETRAIN, f"data.root={tiny_dataset}"]
    assert vidtrain(*line, "paths.runs=with").code == 0
    assert vidtrain(*line, "paths.runs=without", UNLABELLED).code == 0
    one, other = states(tmp_path / "with"), states(tmp_path / "without")
    assert_equal(one["state_dict"], other["state_dict"])
    assert one["vidtrain"]["label_names"] and not other["vidtrain"]["label_names"]


def test_damaged_videos_are_counted_in_training_and_named_in_the_test(vidtrain, videos, tmp_path):
    names = [f"{'train' if n < 5 else 'val' if n < 6 else 'test'}/{n}.mp4" for n in range(8)]
    root = move(videos, tmp_path / "data", names)
    (root / "train/empty.mp4").write_bytes(b"")
    (root / "test/torn.mp4").write_bytes((videos / "0.mp4").read_bytes()[:600])
    words = [*PRETRAIN, f"data.root={root}", UNLABELLED, "data.max_failures=0.5", "test=true"]
    result = vidtrain(*words)
    assert result.code == 0, result.err
    assert (
        "skipped" in result.out + result.err and "empty.mp4: empty file" in result.out + result.err
    )
    assert "on 2 of 3 videos" in result.out and "test/torn.mp4" in result.out
    report = json.loads((only("runs/*/*", tmp_path) / "report.json").read_text())
    assert [Path(f["path"]).name for f in report["videos"]["failed"]] == ["torn.mp4"]


def test_clips_may_be_mixed_without_labels(vidtrain, videos):
    """Who has no class has no share of one; it failed in the one-hot of -1."""
    words = [*PRETRAIN, f"data.root={videos}", UNLABELLED, "augment=strong"]
    for more in ([], ["data.num_classes=5", "callbacks.ema.decay=0.5"]):
        result = vidtrain(*words, *more)
        assert result.code == 0, result.err
        assert "4 videos x 2 clips" in result.out


# mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.mask_ratio=0"], "model.mask_ratio is 0; it must be between 0 and 1"),
        (["model.mask_ratio=0.01"], "hides 0 of 16 patches"),
        (["model=mae_st_base_pretrain", "model.mask_ratio=0.999"], "hides 32 of 32 patches"),
        (["views.size=36"], "views.size"),
        (["views.num_frames=5", "test=true"], "views.num_frames"),
        (["model=videomae_v2_base_pretrain", "clip.size=40"], "5 x 5 of them"),
        (["model=videomae_v2_base_pretrain", "model.decoder_mask_ratio=0.3"], "0.25, 0.5 or 0.75"),
        (["data.balance=1.0"], "these videos have no labels"),
        (["task.mean=[1,2]"], "task.mean is [1, 2]; it takes three numbers"),
        (["clip.std=0.5"], "clip.std is 0.5; it takes three numbers"),
        (["data.batch_size=auto"], "this run is not on one"),
        (["callbacks.reconstructions.num_videos=x"], "num_videos is 'x'"),
        (["multigrid=both", "trainer.max_epochs=4"], "does not take clips of 1 x 16²"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_there_is_a_run(vidtrain, videos, words, said):
    assert said in refused(vidtrain, *PRETRAIN, f"data.root={videos}", UNLABELLED, *words)


def test_a_classifier_needs_labels_and_its_own_task(vidtrain, videos, tiny_dataset):
    line = refused(vidtrain, *FINETUNE, f"data.root={videos}", UNLABELLED)
    assert "no classes to tell apart" in line and "_pretrain" in line
    line = refused(vidtrain, *FINETUNE, f"data.root={tiny_dataset}", "task=masked_pretraining")
    assert "VideoMAE is none" in line
    line = refused(vidtrain, *PRETRAIN, f"data.root={tiny_dataset}", "task=classification")
    assert "whose name does not end in _pretrain" in line


# what a run leaves, and going on with it


@pytest.mark.parametrize(
    "model",
    ["videomae_v2_base_pretrain", pytest.param("mae_st_base_pretrain", marks=pytest.mark.slow)],
)
def test_a_run_that_was_stopped_ends_where_a_whole_one_does(
    vidtrain, videos, tmp_path, monkeypatch, model
):
    """Masks are drawn from the batch's seed, so that they are those of the whole run."""
    monkeypatch.syspath_prepend(str(HERE))
    line = [*PRETRAIN, f"model={model}", f"data.root={videos}", UNLABELLED, "trainer.max_epochs=3"]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    with pytest.raises(RuntimeError, match="an error of a test"):
        vidtrain(*line, "paths.runs=parts", *add("Fail", hook="on_before_backward", at=4))
    assert states(tmp_path / "parts")["global_step"] == 3
    again = vidtrain(*line, "paths.runs=parts", "resume=auto")
    assert again.code == 0 and "going on with" in again.out, again.err
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_test_of_its_own_scores_as_the_one_after_training(vidtrain, videos, tmp_path):
    words = [*PRETRAIN, f"data.root={videos}", UNLABELLED, "test=true"]
    assert vidtrain(*words).code == 0
    run = only("runs/*/*", tmp_path)
    again = vidtrain("test", f"ckpt={run}", f"output={tmp_path / 'again'}", "logger=none")
    assert again.code == 0, again.err
    assert (tmp_path / "again/losses.csv").read_text() == (run / "losses.csv").read_text()
    assert (tmp_path / "again/reconstructions_test.png").is_file()
    # Masks are drawn by the video's number, not by what else is in its batch.
    many = vidtrain(
        "test",
        f"ckpt={run}",
        f"output={tmp_path / 'many'}",
        "data.eval_batch_size=2",
        "logger=none",
    )
    assert many.code == 0, many.err
    one, other = (losses(tmp_path / name) for name in ("again", "many"))
    assert one == pytest.approx(other, abs=1e-5)


def test_other_videos_may_be_tested_whatever_their_labels(vidtrain, pretrained, tiny_dataset):
    words = [
        "test",
        f"ckpt={pretrained}",
        "data=folder",
        f"data.root={tiny_dataset}",
        "logger=none",
    ]
    result = vidtrain(*words, "output=here", "data.multi_label=true")
    assert result.code == 0 and "on 6 of 6 videos" in result.out, result.err
    assert "Per class" not in Path("here/report.html").read_text()
    result = vidtrain(*words, "output=there", "views.size=36")
    assert result.code == 2 and "views.size" in result.err
    assert not Path("there").exists()


def test_the_page_of_a_run_has_its_reconstructions_without_a_test(vidtrain, pretrained, tmp_path):
    result = vidtrain("report", pretrained, f"output={tmp_path / 'page.html'}")
    assert result.code == 0, result.err
    page = (tmp_path / "page.html").read_text()
    assert "Not tested" in page and "Reconstructions" in page and "data:image/png" in page
    assert "val/loss" in page and "top1" not in page


def test_a_sweep_puts_the_lowest_loss_first(vidtrain, videos, tmp_path):
    words = [f"data.root={videos}", UNLABELLED, "test=true", "hydra.sweep.dir=sweep"]
    result = vidtrain("train", "-m", *PRETRAIN[1:], *words, "optim.lr=1e-6,0.02")
    assert result.code == 0, result.err
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())
    scores = [job["score"] for job in jobs]
    assert {job["metric"] for job in jobs} == {"val/loss"}
    assert [job["job"] for job in jobs] == [1, 0] and scores == sorted(scores)
    assert "test/loss" in result.out and "%" not in result.out.split("┏")[-1]


@pytest.mark.parametrize(
    ("task", "direction", "said"),
    [
        ("MaskedPretraining", "maximize", "maximises val/loss"),
        ("MaskedPretraining", "minimize", ""),
        ("Classification", "minimize", "minimises val/top1"),
        ("Classification", "maximize", ""),
    ],
)
def test_a_search_that_goes_the_wrong_way_is_noted(tmp_path, capsys, task, direction, said):
    hydra = {"sweep": {"dir": str(tmp_path)}, "sweeper": {"direction": direction}}
    Table().on_multirun_start(OmegaConf.create({"hydra": hydra, "task": {"_target_": task}}))
    noted = capsys.readouterr().err
    assert said in noted and bool(noted) == bool(said)


def test_verbs_for_classes_say_what_to_do(vidtrain, pretrained, videos, tiny_dataset):
    line = refused(vidtrain, "predict", f"ckpt={pretrained}", f"input={videos}")
    assert "knows no classes" in line and f"ckpt={pretrained}" in line
    line = refused(vidtrain, "extract", f"ckpt={pretrained}", f"input={videos}", "output=features")
    assert "predicts pixels" in line and "model.weights=" in line
    line = refused(vidtrain, "verify", f"ckpt={pretrained}")
    assert "experiment=" in line


# what follows from it


@pytest.mark.parametrize(
    "words",
    [
        ["optim.layer_decay=0.75", "model.drop_path=0.1", "augment=strong"],
        ["clip.num_frames=8", "clip.size=48"],  # positions are no parameters here
        ["freeze=backbone", "model.probe=linear"],
        ["freeze=backbone", "model.probe=attentive"],
    ],
)
def test_a_classifier_begins_with_the_encoder(vidtrain, pretrained, tiny_dataset, tmp_path, words):
    result = vidtrain(*FINETUNE, f"data.root={tiny_dataset}", f"ckpt={pretrained}", *words)
    assert result.code == 0, result.err
    assert "15 tensors" in result.out and "not used: its decoder (19)" in result.out
    if words[0] != "freeze=backbone":
        return
    before = torch.load(only("checkpoints/last.ckpt", pretrained), weights_only=True)["state_dict"]
    after = states(tmp_path / "runs")["state_dict"]
    key = "blocks.0.attn.qkv.weight"
    assert torch.equal(after[f"model.{key}"], before[f"model.encoder.{key}"])
    assert "frozen: patch_embed, blocks" in result.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+model.dim=32"], "is 24 x 3 x 2 x 8 x 8 there and 32 x 3 x 2 x 8 x 8 here"),
        (["+model.depth=2"], "it has nothing for 'blocks.1.norm1.weight'"),
        (["model=mae_st_base"], "does not fit MAEST"),
    ],
)
def test_another_encoder_is_refused(vidtrain, pretrained, tiny_dataset, words, said):
    names = [word.partition("=")[0] for word in words]
    line = [word for word in FINETUNE if word.partition("=")[0] not in names]
    result = vidtrain(*line, f"data.root={tiny_dataset}", f"ckpt={pretrained}", *words)
    assert result.code == 2 and said in result.err
    assert not list(Path("runs").glob("*/*"))


def test_learned_positions_say_how_they_are_kept_for_other_clips(
    vidtrain, videos, tiny_dataset, tmp_path
):
    line = [*PRETRAIN, "model=mae_st_base_pretrain", f"data.root={videos}", UNLABELLED]
    assert vidtrain(*line, "hydra.run.dir=first").code == 0
    line = [*FINETUNE, "model=mae_st_base", f"data.root={tiny_dataset}", "ckpt=first"]
    other = [*line, "clip.num_frames=8", "clip.size=48"]
    assert "set model.num_frames and model.size" in refused(vidtrain, *other)
    result = vidtrain(*other, "model.num_frames=4", "model.size=32", "optim.layer_decay=0.75")
    assert result.code == 0, result.err


def test_a_mistake_in_predict_keeps_what_was_predicted(vidtrain, pretrained, tiny_dataset):
    assert vidtrain(*FINETUNE, f"data.root={tiny_dataset}", "hydra.run.dir=run").code == 0
    Path("kept.jsonl").write_text("kept")
    words = ["predict", "ckpt=run", f"input={tiny_dataset}/test", "output=kept.jsonl"]
    assert "views.num_frames" in refused(vidtrain, *words, "views.num_frames=7")
    assert Path("kept.jsonl").read_text() == "kept"
    assert vidtrain(*words, "views.num_frames=8").code == 0  # positions are spread


# longer


@pytest.mark.slow
def test_wandb_has_the_pictures_of_each_validation(vidtrain, videos, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [*PRETRAIN, f"data.root={videos}", UNLABELLED, "test=true", "trainer.max_epochs=2"]
    assert vidtrain(*words, "logger=wandb").code == 0
    wandb.teardown()
    folder = only("runs/*/*/wandb/offline-run-*/files/media/images", tmp_path)
    assert len(list(folder.glob("val/reconstructions_*.png"))) == 2
    assert len(list(folder.glob("test/reconstructions_*.png"))) == 1


@pytest.mark.slow
def test_two_ranks_pretrain_and_score_every_video_once(videos, tiny_dataset, tmp_path):
    words = [*PRETRAIN, UNLABELLED, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    words += ["trainer.benchmark=false", "trainer.precision=32-true", "test=true"]

    def run(root: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "vidtrain", *words, f"data.root={root}"],
            cwd=tmp_path, env={**os.environ, "VIDTRAIN_CACHE": str(tmp_path / "cache")},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    done = run(tiny_dataset)
    assert done.returncode == 0, done.stderr
    report = json.loads(only("runs/*/*/report.json", tmp_path).read_text())
    assert report["videos"] == {"asked": 6, "scored": 6, "failed": []}
    few = run(videos)  # one for validation
    assert few.returncode == 2 and "has 1 videos for 2 devices" in few.stderr
    assert "Traceback" not in few.stderr

    # A rank that can read none of its validation videos is not missed by the other.
    names = [f"{'train' if n < 6 else 'val'}/{n}.mp4" for n in range(8)]
    root = move(videos, tmp_path / "torn", names)
    (root / "val/7.mp4").write_bytes((videos / "7.mp4").read_bytes()[:600])
    words[:] = [*(word for word in words if word != "test=true"), "data.max_failures=1.0"]
    torn = run(root)
    assert torn.returncode == 0 and "val/loss" in torn.stdout, torn.stderr
