"""Runs that end before their time: what is kept, what goes on, and what is said."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from vidtrain.callbacks import saving

HERE = Path(__file__).parent
RUN = [
    "train", "model=small_3d_cnn", "clip.num_frames=2", "clip.size=32", "data=folder",
    "data.batch_size=4", "data.workers=0", "trainer=cpu", "trainer.max_epochs=3", "logger=none",
    "callbacks.pictures=null",
]  # fmt: skip


class Fail(L.Callback):
    """Raise in a hook, at its n-th call."""

    def __init__(self, hook: str, at: int, error: str = "an error of a test", value: float = 0.0):
        def fail(trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
            self.calls += 1
            if self.calls == at:
                raise RuntimeError(error)

        self.calls = 0
        setattr(self, hook, fail)


class Spoil(L.Callback):
    """Make one weight's gradient, or the loss's, no number at step `at`."""

    def __init__(self, at: int, what: str):
        self.at, self.what = at, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step + 1 == self.at and self.what == "loss":
            batch["video"].fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step + 1 == self.at and self.what == "gradient":
            next(pl_module.parameters()).grad.fill_(float("inf"))


def add(name: str, **settings: object) -> list[str]:
    """Add a callback of this file."""
    words = {"_target_": f"test_survive.{name}", **settings}
    return [f"+callbacks.{name.lower()}.{key}={value}" for key, value in words.items()]


@pytest.fixture(autouse=True)
def importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def states(folder: Path, name: str = "last.ckpt") -> dict[str, dict]:
    paths = folder.glob(f"*/*/checkpoints/{name}")
    (state,) = [torch.load(path, weights_only=True) for path in paths]
    return state


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def assert_same_end(whole: Path, parts: Path) -> None:
    a, b = states(whole), states(parts)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(a[key], b[key])
    assert_equal(a.get("current_model_state"), b.get("current_model_state"))
    scores = [next(iter(state["callbacks"].values())) for state in (a, b)]
    assert scores[0].get("best_model_score") == scores[1].get("best_model_score")
    best = [
        [path.name for path in folder.glob("*/*/checkpoints/epoch_*")] for folder in (whole, parts)
    ]
    assert best[0] == best[1]


@pytest.mark.parametrize(
    "settings", [[], ["callbacks.ema.decay=0.8", "callbacks.precise_bn.batches=1"]]
)
@pytest.mark.parametrize(
    ("hook", "at", "step"),
    [
        ("on_before_backward", 3, 2),  # between the forward and the backward pass
        ("on_train_batch_end", 3, 3),  # after the update of the weights
        ("on_validation_batch_end", 2, 6),  # an average may be in the weights' place
        ("on_train_epoch_end", 2, 12),
        ("on_train_epoch_start", 2, 6),
    ],
)
def test_after_an_error_the_last_whole_step_goes_on(
    vidtrain, tiny_dataset, tmp_path, hook, at, step, settings
):
    line = [*RUN, f"data.root={tiny_dataset}", *settings]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    with pytest.raises(RuntimeError, match="an error of a test"):
        vidtrain(*line, "paths.runs=parts", *add("Fail", hook=hook, at=at))
    assert states(tmp_path / "parts")["global_step"] == step
    again = vidtrain(*line, "paths.runs=parts", "resume=auto")
    assert again.code == 0, again.err
    assert "going on with" in again.out
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_an_error_between_accumulated_batches_and_what_is_said(tiny_dataset, tmp_path):
    line = [*RUN, f"data.root={tiny_dataset}", "trainer.accumulate_grad_batches=4"]
    env = {**os.environ, "VIDTRAIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(HERE)}

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "vidtrain", *line, *words],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip

    assert run("paths.runs=whole").returncode == 0
    failed = run("paths.runs=parts", *add("Fail", hook="on_before_backward", at=9))
    assert failed.returncode == 1 and "RuntimeError: an error of a test" in failed.stderr
    assert "the state after step 2 is kept; go on with" in failed.stdout
    last = failed.stdout.strip().splitlines()[-1]
    assert last.startswith("vidtrain train ") and "resume=" in last
    assert run("paths.runs=parts", "resume=auto").returncode == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_an_error_before_the_first_step_leaves_no_state(vidtrain, tiny_dataset, tmp_path):
    line = [*RUN, f"data.root={tiny_dataset}"]
    with pytest.raises(RuntimeError):
        vidtrain(*line, *add("Fail", hook="on_before_backward", at=1))
    assert not list(tmp_path.rglob("*.ckpt*"))


@pytest.mark.parametrize("torn", [b"", b"not a checkpoint", None])
def test_a_torn_last_state_is_passed_over_for_the_one_before(
    vidtrain, tiny_dataset, tmp_path, torn
):
    line = [*RUN, f"data.root={tiny_dataset}"]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    with pytest.raises(RuntimeError):
        words = [
            "callbacks.checkpoint.every_n_steps=2",
            *add("Fail", hook="on_before_backward", at=6),
        ]
        vidtrain(*line, "paths.runs=parts", *words)
    (last,) = tmp_path.glob("parts/*/*/checkpoints/last.ckpt")
    assert states(tmp_path / "parts")["global_step"] == 5
    assert states(tmp_path / "parts", "previous.ckpt")["global_step"] == 4
    last.write_bytes(last.read_bytes()[:5000] if torn is None else torn)
    run = last.parent.parent
    named = "auto" if torn else run
    again = vidtrain(*line, "paths.runs=parts", f"resume={named}")
    assert again.code == 0, again.err
    assert f"{last} " in again.out and "taking previous.ckpt, the state after step 4" in again.out
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    for state in last.parent.glob("*.ckpt"):
        state.write_bytes(b"")
    none = vidtrain(*line, f"resume={run}")
    assert none.code == 2 and "cannot be gone on with" in none.err


def test_a_full_disk_stops_training_with_one_line(vidtrain, tiny_dataset, tmp_path, monkeypatch):
    import errno

    line = [*RUN, f"data.root={tiny_dataset}"]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) < 4:  # the best and the last of an epoch, and the best of the next
            return save(state, file)
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving.torch, "save", full)
    stopped = vidtrain(*line, "paths.runs=parts")
    monkeypatch.setattr(saving.torch, "save", save)
    assert stopped.code == 2, stopped.err
    assert "No space left on device" in stopped.err and "make room" in stopped.err
    assert len(stopped.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.part"))
    assert vidtrain(*line, "paths.runs=parts", "resume=auto").code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_what_torch_says_over_a_full_disk_is_understood(tmp_path):
    class Full:
        def write(self, data) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            pass

    with (
        pytest.raises(saving.CannotSave, match="No space left"),
        saving.explained(tmp_path / "c" / "last.ckpt", tmp_path / "last.ckpt.part"),
    ):
        torch.save({"a": torch.zeros(100_000)}, Full())


KILLED = """
import os, signal, sys, torch
from vidtrain.callbacks.saving import WholeFiles
files, path = WholeFiles(), sys.argv[1]
files.save_checkpoint({"step": 1, "a": torch.zeros(1000)}, path)
files.save_checkpoint({"step": 2, "a": torch.zeros(1000)}, path)
kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "fsync": os.fsync = kill
elif sys.argv[2] == "replace": os.replace = kill
else: os.link = lambda *args: kill()
files.save_checkpoint({"step": 3, "a": torch.zeros(1000)}, path)
"""


@pytest.mark.parametrize("where", ["fsync", "link", "replace"])
def test_a_kill_while_saving_leaves_a_whole_file(tmp_path, where):
    path = tmp_path / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", KILLED, path, where], check=False)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["step"] == 2
    assert torch.load(tmp_path / "previous.ckpt", weights_only=True)["step"] in (1, 2)
    saving.remove_parts(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_without_hard_links_the_one_before_is_kept_all_the_same(tmp_path, monkeypatch):
    def refuse(*args) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        saving.WholeFiles().save_checkpoint({"step": step}, tmp_path / "last.ckpt")
    steps = [torch.load(tmp_path / name)["step"] for name in ("last.ckpt", "previous.ckpt")]
    assert steps == [2, 1]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_names_its_videos(vidtrain, tiny_dataset, tmp_path, what):
    stopped = vidtrain(*RUN, f"data.root={tiny_dataset}", *add("Spoil", at=3, what=what))
    assert stopped.code == 2
    assert stopped.err.count(".mp4") == 4 and str(tiny_dataset / "train") in stopped.err
    if what == "loss":
        assert "the loss of step 3 is nan" in stopped.err
        assert "the state after step 2 is kept" in stopped.out
        state = states(tmp_path / "runs")
        assert state["global_step"] == 2
        assert all(value.isfinite().all() for value in state["state_dict"].values())
    else:  # seen in the next loss, when the weights are gone
        assert "the weights are not finite after step 3" in stopped.err
        assert not list(tmp_path.rglob("last.ckpt"))


def test_a_run_of_other_classes_is_not_gone_on_with(vidtrain, tiny_dataset, tmp_path):
    line = [*RUN, "trainer.limit_train_batches=1"]
    mine = tmp_path / "mine"
    shutil.copytree(tiny_dataset, mine)
    assert vidtrain(*line, f"data.root={mine}", "trainer.max_epochs=1").code == 0
    (run,) = tmp_path.glob("runs/*/*")
    for split in ("train", "val", "test"):
        (mine / split / "zebra").rename(mine / split / "quagga")
    other = vidtrain(*line, f"data.root={mine}", f"resume={run}")
    assert other.code == 2 and "has the class 'zebra' where the data have 'quagga'" in other.err
    for split in ("train", "val", "test"):
        shutil.rmtree(mine / split / "quagga")
    other = vidtrain(*line, f"data.root={mine}", f"resume={run}")
    assert other.code == 2 and "has 3 classes, the data 2" in other.err


def test_a_class_without_training_videos_is_noted(vidtrain, tiny_dataset, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(tiny_dataset, mine)
    shutil.rmtree(mine / "train" / "zebra")
    done = vidtrain(*RUN, f"data.root={mine}", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    assert "note: 1 of 3 classes has no training video: zebra" in " ".join(done.out.split())


def test_a_sweep_that_is_started_again_goes_on_with_its_jobs(vidtrain, tiny_dataset, tmp_path):
    line = ["train", "-m", *RUN[1:], f"data.root={tiny_dataset}", "optim.lr=0.01,0.02"]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    fail = add("Fail", hook="on_before_backward", at=4)
    assert vidtrain(*line, "paths.runs=parts", "trainer.max_epochs=3", *fail).code != 0
    again = vidtrain(*line, "paths.runs=parts", "resume=auto")
    assert again.code == 0, again.err
    assert again.out.count("going on with") == 2
    done = vidtrain(*line, "paths.runs=parts", "resume=auto")
    assert done.code == 0 and done.out.count("going on with") == 2 and "epoch" not in done.out
    ends = {}
    for name in ("whole", "parts"):
        paths = (tmp_path / name).glob("sweep/*/*/checkpoints/last.ckpt")
        found = [torch.load(path, weights_only=True) for path in paths]
        ends[name] = {state["vidtrain"]["config"]["optim"]["lr"]: state for state in found}
        assert len(found) == 2
    for rate, state in ends["whole"].items():
        assert_equal(state["state_dict"], ends["parts"][rate]["state_dict"])


@pytest.mark.slow
def test_slurm_queues_a_job_again_and_it_goes_on(tiny_dataset, tmp_path):
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    program.chmod(0o755)
    env = {
        **os.environ, "VIDTRAIN_CACHE": str(tmp_path / "cache"), "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
    }  # fmt: skip
    line = [sys.executable, "-m", "vidtrain", *RUN, f"data.root={tiny_dataset}"]

    def run(*words: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*line, *words], cwd=tmp_path, env=env | more, capture_output=True, text=True
        )

    assert run("paths.runs=whole").returncode == 0
    stopped = run("paths.runs=parts", *add("Announce", at=8))
    assert stopped.returncode == 128 + signal.SIGUSR1, stopped.stderr
    assert "stopped by SIGUSR1 after step 8; job 4711 is queued again" in stopped.stdout
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    again = run("paths.runs=parts", SLURM_RESTART_COUNT="1")
    assert again.returncode == 0 and "going on with" in again.stdout, again.stderr
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


class Announce(L.Callback):
    """Send what Slurm sends before a job's time is over."""

    def __init__(self, at: int):
        self.at = at

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if trainer.global_step + 1 == self.at:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "exception"])
def test_the_survival_matrix_with_two_ranks(how):
    script = HERE.parents[1] / "scripts" / "survival.py"
    done = subprocess.run(
        [sys.executable, script, "--hows", how, "--workers", "2", "--ranks", "2", "--accumulate", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


class Lacks(L.Callback):
    """Ask the device for what it does not have."""

    def __init__(self, what: str):
        self.what = what

    def on_before_backward(self, *args: object) -> None:
        if self.what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has")
        torch.zeros(2).put_(torch.tensor([1]), torch.ones(1))  # never deterministic, says torch


@pytest.mark.parametrize(
    ("what", "named"), [("memory", "data.batch_size"), ("order", "trainer.deterministic=warn")]
)
def test_what_a_device_cannot_do_is_said_in_a_line(vidtrain, tiny_dataset, what, named):
    run = vidtrain(
        *RUN, f"data.root={tiny_dataset}", "trainer.deterministic=true", *add("Lacks", what=what)
    )
    assert run.code == 2
    assert named in run.err and len(run.err.splitlines()) == 1, run.err


def test_the_same_seed_gives_the_same_losses(vidtrain, tiny_dataset, tmp_path):
    """With dropout, augmentation and workers; another seed gives others."""
    line = [*RUN, f"data.root={tiny_dataset}", "trainer.deterministic=true", "augment=strong"]
    line += ["data.workers=2", "logger=csv", "trainer.log_every_n_steps=1"]
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert vidtrain(*line, f"seed={seed}", f"paths.runs={name}").code == 0
        (path,) = (tmp_path / name).glob("*/*/metrics.csv")
        rows = list(csv.DictReader(path.read_text().splitlines()))
        losses.append([row["train/loss"] or row["val/loss"] for row in rows])
    assert len(losses[0]) > 18 and losses[0] == losses[1] != losses[2]
    assert_same_end(tmp_path / "a", tmp_path / "b")


def rates(folder: Path) -> list[float]:
    (path,) = folder.glob("*/*/metrics.csv")
    rows = csv.DictReader(path.read_text().splitlines())
    return [float(row["lr-AdamW/pg1"]) for row in rows if row.get("lr-AdamW/pg1")]


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_run_goes_on_with_the_settings_that_it_is_given(
    vidtrain, tiny_dataset, tmp_path, schedule
):
    """A lower rate counts from the next step on; what does not fit the old state is refused."""
    line = [*RUN, f"data.root={tiny_dataset}", "optim=adamw_cosine", f"optim.schedule={schedule}"]
    line += ["optim.warmup=0.3", "optim.warmup_from=0.1", "logger=csv", "paths.runs=parts"]
    line += ["trainer.log_every_n_steps=1", "optim.lr=0.01"]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    with pytest.raises(RuntimeError, match="an error of a test"):
        vidtrain(*line, *add("Fail", hook="on_before_backward", at=6))
    other_schedule = {"cosine": "one_cycle", "one_cycle": "cosine"}[schedule]
    (run,) = (tmp_path / "parts").glob("*/*")
    for word, named in (
        ("optim=sgd_cosine", "_target_"),
        ("optim.layer_decay=0.5", "optim.layer_decay"),
        (f"optim.schedule={other_schedule}", "optim.schedule"),
    ):
        other = vidtrain(*[w for w in line if w[:6] != word[:6]], word, f"resume={run}")
        assert other.code == 2 and named in other.err, other.err
    lower = vidtrain(*line, f"resume={run}", "optim.lr=0.001", "optim.weight_decay=0.2")
    assert lower.code == 0, lower.err
    before, after = rates(tmp_path / "whole"), rates(tmp_path / "parts")
    assert len(before) == 18 and len(after) == 13
    assert after == pytest.approx([rate / 10 for rate in before[5:]])
    groups = states(tmp_path / "parts")["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]
