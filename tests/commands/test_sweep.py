"""Sweeps: a job that fails costs only itself, and the table says which was best."""

import contextlib
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import TINY_RUN

from vidtrain import loggers, sweep
from vidtrain.config import conf_dir

TINY = [*TINY_RUN, "trainer.max_epochs=2"]
# A callback of the user's own that refuses, raises or does nothing, as `at` says.
BOOM = """
import lightning.pytorch as L
from vidtrain.types import UserError

class Boom(L.Callback):
    def __init__(self, at):
        if at < 0:
            raise UserError("boom.at is below 0")
        self.at = at

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step >= self.at:
            raise RuntimeError("boom")
"""
JOBS = ["+callbacks.boom._target_=boom_of_a_user.Boom", "+callbacks.boom.at=-1,1,99"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "boom_of_a_user.py").write_text(BOOM)
    return tmp_path


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("runs/sweep/*/sweep.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_failed_job_does_not_end_a_sweep(vidtrain, folder, tiny_dataset):
    done = vidtrain("train", "-m", *TINY, f"data.root={tiny_dataset}", *JOBS, "test=true")
    assert done.code == 1, done.err
    assert "job 0 failed: boom.at is below 0" in done.err
    assert "RuntimeError: boom" in done.err and done.err.count("Traceback") == 1  # the bug's
    first, *failed = rows(folder)
    assert first["callbacks.boom.at"] == "99" and first["status"] == "done"
    assert 0 < float(first["val/top1"]) <= 1 and 0 < float(first["test/top1"]) <= 1
    assert [row["status"] for row in failed] == ["failed", "failed"]
    assert [row["error"] for row in failed] == ["boom.at is below 0", "RuntimeError: boom"]
    assert [row["val/top1"] for row in failed] == ["", ""]
    assert (Path(first["folder"]) / "checkpoints" / "last.ckpt").is_file()
    (whole,) = folder.glob("runs/sweep/*/sweep.json")
    assert [job["job"] for job in json.loads(whole.read_text())] == [2, 0, 1]
    assert "2 of 3 jobs failed" in done.out and "callbacks.boom.at" in done.out
    assert "optim.lr" not in done.out  # all jobs had the same

    done = vidtrain("report", whole.parent)
    assert done.code == 0, done.err
    page = (whole.parent / "report.html").read_text()
    assert "2-late_fusion_pool-folder" in page and "Job 1 of" in page


def test_a_sweep_without_failures_ends_with_0(vidtrain, tiny_dataset, folder):
    words = ["optim.lr=0.01,0.001", "trainer.max_epochs=1", "hydra.sweep.dir=mine"]
    done = vidtrain("train", "-m", *TINY, f"data.root={tiny_dataset}", *words)
    assert done.code == 0, done.err
    assert (folder / "mine" / "sweep.csv").is_file() and "failed" not in done.out


def test_a_sweeper_gets_the_worst_score_for_a_failed_job():
    assert sweep.worst(OmegaConf.create({"direction": "maximize"})) == -math.inf
    assert sweep.worst(OmegaConf.create({"direction": "minimize"})) == math.inf
    assert sweep.worst(OmegaConf.create({})) == -math.inf


def test_the_lowest_loss_is_the_best(tmp_path):
    for number, score in enumerate((0.5, None, 0.25)):
        (tmp_path / str(number)).mkdir()
        job = {"job": number, "overrides": [f"seed={number}"], "status": "done", "error": ""}
        job |= {"metric": "val/loss", "score": score, "minutes": 1.0}
        (tmp_path / str(number) / "job.json").write_text(json.dumps(job))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "job.json").write_text('{"job": 3, "over')
    jobs = sweep.read(tmp_path)
    assert [job["job"] for job in jobs] == [2, 0, 1]
    heads, cells = sweep.table(jobs)
    assert heads == ["job", "seed", "val/loss", "minutes", "status", "folder"]
    assert cells[0][:3] == [2, "2", 0.25]


def test_a_job_leaves_no_ranks_behind(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    for word in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(word, raising=False)
    before = sys.modules["__main__"].__spec__
    with sweep.alone():
        os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
        assert before is None or sys.modules["__main__"].__spec__.name == "vidtrain.__main__"
    assert "LOCAL_RANK" not in os.environ and "WORLD_SIZE" not in os.environ
    assert os.environ["MASTER_PORT"] == "1" and sys.modules["__main__"].__spec__ is before


def test_the_runs_of_a_sweep_are_one_group_in_wandb(monkeypatch, tmp_path):
    for word in ("WANDB_RUN_GROUP", "WANDB_SWEEP_ID"):
        monkeypatch.delenv(word, raising=False)
    run = tmp_path / "c3d-demo" / "now"
    assert loggers._group(run) == "c3d-demo"
    monkeypatch.setattr(sweep, "folder", lambda: tmp_path / "2026-11-20_10-00-00")
    assert loggers._group(run) == "2026-11-20_10-00-00"
    monkeypatch.setenv("WANDB_SWEEP_ID", "k2j4")
    assert loggers._group(run) == "k2j4"
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert loggers._group(run) == "mine"


@pytest.mark.parametrize("name", ["bayes", "grid"])
def test_what_a_wandb_agent_would_run_composes(vidtrain, name):
    plan = OmegaConf.to_container(OmegaConf.load(conf_dir() / "sweep" / f"{name}.yaml"))
    assert plan["metric"] == {"name": "val/top1", "goal": "maximize"} and plan["method"] == name
    *words, last = plan["command"]
    assert words[0] == "vidtrain" and last == "${args_no_hyphens}"
    given = []
    for key, value in plan["parameters"].items():
        assert None not in value.get("values", ())
        given.append(f"{key}={value['values'][-1] if 'values' in value else value['max']}")
    done = vidtrain(*words[1:], *given, "--cfg", "job")
    assert done.code == 0, done.err


def test_a_launcher_that_is_not_installed_says_what_is(vidtrain):
    with contextlib.suppress(ModuleNotFoundError):
        import hydra_plugins.hydra_submitit_launcher  # noqa: F401

        pytest.skip("it is installed")
    done = vidtrain("train", "-m", "seed=1,2", "hydra/launcher=submitit_slurm")
    assert done.code == 2 and "pip install 'vidtrain[slurm]'" in done.err


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vidtrain", "train", "-m", *TINY, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
def test_jobs_of_two_ranks_follow_one_another(folder, tiny_dataset):
    two = ["trainer.devices=2", "trainer.strategy=ddp"]
    done = start(folder, f"data.root={tiny_dataset}", *JOBS, *two)
    assert done.returncode == 1, done.stderr
    assert [row["status"] for row in rows(folder)] == ["done", "failed", "failed"]
    assert [path.name for path in (folder / "runs").iterdir()] == ["sweep"]  # nothing beside it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugin", "word"),
    [
        ("hydra_joblib_launcher", "hydra/launcher=joblib"),
        ("hydra_submitit_launcher", "hydra/launcher=submitit_local"),
    ],
)
def test_jobs_in_processes_of_their_own(folder, tiny_dataset, plugin, word):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    two = ["trainer.devices=2", "trainer.strategy=ddp"]
    done = start(folder, f"data.root={tiny_dataset}", *JOBS, *two, word)
    assert done.returncode == 1, done.stderr
    assert [row["status"] for row in rows(folder)] == ["done", "failed", "failed"]


@pytest.mark.slow
def test_optuna_goes_on_after_a_failed_job(folder, tiny_dataset):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    job = ["+callbacks.boom._target_=boom_of_a_user.Boom", "+callbacks.boom.at=choice(-1,99)"]
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1"]
    search += ["hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=1"]
    done = start(folder, f"data.root={tiny_dataset}", *job, *search)
    assert len(rows(folder)) == 6, done.stderr
    assert {row["status"] for row in rows(folder)} == {"done", "failed"}
