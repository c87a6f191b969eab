"""What a whole run leaves in W&B, read back from the file of an offline one."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from offline_run import config, history, records
from tiny import TINY_RUN

WORDS = [
    *TINY_RUN, "logger=wandb", "test=true", "trainer.max_epochs=2", "trainer.log_every_n_steps=2",
    "views.clips=2", "views.crops=1",
]  # fmt: skip


@pytest.fixture
def offline(monkeypatch, tmp_path):
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    wandb.teardown()


def test_the_runs_of_a_sweep_are_a_group_and_tell_all(vidtrain, tiny_dataset, tmp_path, offline):
    import wandb

    git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    done = vidtrain("train", "-m", *WORDS, f"data.root={tiny_dataset}", "optim.lr=0.01,1e-6")
    assert done.code == 0, done.err
    wandb.teardown()  # the files are whole when W&B's own process has ended
    (sweep,) = tmp_path.glob("runs/sweep/*/")
    files = sorted(sweep.glob("*/wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    starts = [
        next(r.run for r in records(f) if r.WhichOneof("record_type") == "run") for f in files
    ]
    assert {run.run_group for run in starts} == {sweep.name}
    assert len({run.run_id for run in starts}) == 2

    errors = 0
    for file, rate in zip(files, (0.01, 1e-6), strict=True):
        run = file.parents[2]
        said = config(file)
        assert said["optim"]["lr"] == rate and "optim.lr" in said["command"]
        assert said["code"]["commit"] == head.stdout.strip() and said["code"]["dirty"] is False
        assert set(said["code"]) >= {"vidtrain", "python", "torch", "lightning", "cuda"}
        assert said["dataset"]["videos"] == {"train": 24, "val": 6, "test": 6}
        assert json.loads((run / "run.json").read_text()) == {
            key: said[key] for key in ("command", "code", "dataset")
        }
        report = json.loads((run / "report.json").read_text())
        assert report["code"] == said["code"]
        assert report["fingerprint"] == said["dataset"]["fingerprint"]
        page = (run / "report.html").read_text()
        assert head.stdout[:12] in page and report["fingerprint"] in page
        check_history(history(file), run)
        errors += check_errors(history(file), run)
    assert errors

    cpu = ["trainer=cpu", "data.workers=0", "views.clips=1", "views.crops=1"]
    done = vidtrain("test", f"ckpt={run}", f"output={tmp_path / 'again'}", "logger=wandb", *cpu)
    assert done.code == 0, done.err
    wandb.teardown()
    (file,) = tmp_path.glob("again/wandb/offline-run-*/run-*.wandb")
    tested = config(file)
    assert tested["model"] == said["model"] and tested["clip"] == said["clip"]
    assert tested["views"]["clips"] == 1 and tested["logger"]["wandb"] == "always"
    assert tested["code"] == said["code"] and tested["dataset"] == said["dataset"]


@pytest.mark.slow
def test_two_ranks_show_the_worst_errors_of_both(tiny_dataset, tmp_path, offline):
    ranks = [
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.precision=32-true",
        "optim.lr=1e-6",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vidtrain", "train", *WORDS, *ranks, f"data.root={tiny_dataset}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("runs/*/*/wandb/offline-run-*/run-*.wandb")
    assert check_errors(history(file), file.parents[2]) > 3  # more than one rank has videos


def check_history(rows: list[dict], run: Path) -> None:
    """Twelve steps, two epochs, a test."""
    assert all("trainer/global_step" in row for row in rows)  # one axis

    def steps(key: str) -> list[int]:
        return [row["trainer/global_step"] for row in rows if key in row]

    every_second = [1, 3, 5, 7, 9, 11]
    for key in ("train/loss", "train/clips_per_second", "train/data_wait", "lr-AdamW/pg1"):
        assert steps(key) == every_second, key
    for key in ("val/loss", "val/top1", "val/top5", "val/classes/path", "val/videos/count"):
        assert steps(key) == [5, 11], key
    assert steps("val/confusion_matrix_table/path") == [5, 11]
    for key in ("test/top1", "test/classes/path", "test/confusion_matrix_table/path"):
        assert steps(key) == [12], key


def check_errors(rows: list[dict], run: Path) -> int:
    """Compare the worst errors with the wrong answers of predictions.csv, by the score of the truth."""
    with (run / "predictions.csv").open(newline="") as file:
        wrong = {row["path"]: row for row in csv.DictReader(file) if row["top1"] != row["label"]}

    def truth(row: dict[str, str]) -> float:
        return next(
            float(row[f"top{k}_score"]) for k in (1, 2, 3) if row[f"top{k}"] == row["label"]
        )

    found = [caption for row in rows for caption in row.get("test/worst_errors/captions", [])]
    assert {caption.split(" | ")[0] for caption in found} == set(wrong)
    scores = [truth(wrong[caption.split(" | ")[0]]) for caption in found]
    assert scores == sorted(scores)
    return len(scores)
