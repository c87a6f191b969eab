"""Training whose batches change their shape, by the command line."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lightning.pytorch as L
import pytest
from test_survive import HERE, add, assert_same_end, states

from vidtrain.tasks.classification import Classification

RUN = [
    "train", "model=small_3d_cnn", "clip.num_frames=4", "clip.stride=1", "clip.size=32",
    "data=folder", "data.batch_size=2", "data.workers=0", "trainer=cpu", "trainer.max_epochs=6",
    "logger=none", "callbacks.pictures=null", "multigrid=both", "multigrid.stages=[0.6]",
    "multigrid.norm_clips=2",
]  # fmt: skip


class Shapes(L.Callback):
    """Write down the shape of each batch, but for how many videos it has."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        with Path(f"shapes-{trainer.global_rank}").open("a") as file:
            print(*batch["video"].shape[3:5], file=file)


@pytest.fixture(autouse=True)
def importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, int, int, float]]:
    """Note each training batch: videos, frames, size, and the rate of the step before it."""
    step, noted = Classification.training_step, []

    def note(self, batch, batch_idx):
        shape = batch["video"].shape
        (optimizer,) = self.trainer.optimizers
        rate = optimizer.param_groups[0]["lr"]
        noted.append((shape[0] * shape[1], shape[3], shape[-1], rate))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", note)
    return noted


@pytest.mark.parametrize("workers", [0, 2])
def test_shapes_and_rates_are_those_that_the_line_says(
    vidtrain, tiny_dataset, tmp_path, seen, workers
):
    words = [f"data.root={tiny_dataset}", f"data.workers={workers}", "optim=sgd_step"]
    done = vidtrain(*RUN, *words, "optim.milestones=[0.6]", "optim.lr=0.01")
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("multigrid, ")]
    said = {
        (int(frames), int(size)): int(steps)
        for frames, size, steps in re.findall(r"\d+ x (\d+) x (\d+)²: (\d+)", line)
    }
    counted = Counter((frames, size) for _, frames, size, _ in seen)
    assert said == counted and len(said) > 5
    assert f"multigrid, {len(seen)} steps in 6 epochs" in line
    assert states(tmp_path / "runs")["global_step"] == len(seen)
    assert done.out.count("val/top1") == 6  # once an epoch, however many steps it has
    factors = {(1, 16): 8, (1, 22): 8, (2, 16): None, (2, 22): None, (2, 32): 2}
    for videos, frames, size, rate in seen:
        factor = factors.get((frames, size), 1)
        assert rate == pytest.approx(0.01 * factor) if factor != 1 and factor else rate <= 0.041
        assert videos * frames * size**2 <= 2.2 * 4 * 32**2
    assert [rate for *_, rate in seen][-1] == pytest.approx(0.001)
    assert sum(videos for videos, *_ in seen) == 6 * 24


def test_the_short_cycle_alone_leaves_the_rate(vidtrain, tiny_dataset, seen):
    words = ["multigrid=short", "trainer.max_epochs=-1", "trainer.max_steps=5"]
    line = [word for word in RUN if not word.startswith(("multigrid", "trainer.max"))]
    done = vidtrain(*line, *words, f"data.root={tiny_dataset}", "optim=sgd_step", "optim.lr=0.01")
    assert done.code == 0, done.err
    assert "in turn: 8 x 4 x 16², 4 x 4 x 22², 2 x 4 x 32²" in done.out
    assert [size for _, _, size, _ in seen] == [16, 22, 32, 16, 22]
    assert [rate for *_, rate in seen] == pytest.approx([0.01] * 4 + [0.001])


def test_the_schedule_ends_with_the_last_of_unequal_epochs(vidtrain, tiny_dataset, seen):
    """One cycle cannot be stepped once too often; 24 videos make 6, 5 and 5 steps, by turns."""
    line = [word for word in RUN if not word.startswith("multigrid")]
    words = ["multigrid=short", "optim=sgd_one_cycle", "optim.lr=0.01", "trainer.max_epochs=3"]
    done = vidtrain(*line, *words, f"data.root={tiny_dataset}")
    assert done.code == 0, done.err
    assert len({size for *_, size, _ in seen}) == 3
    assert seen[-1][3] < 1e-3 < 5e-3 < max(rate for *_, rate in seen)


def test_a_run_goes_on_with_the_shapes_that_it_began_with(vidtrain, tiny_dataset, tmp_path):
    line = [word for word in RUN if not word.startswith("multigrid")]
    line += [f"data.root={tiny_dataset}"]
    with pytest.raises(RuntimeError, match="an error of a test"):
        vidtrain(*line, *add("Fail", hook="on_before_backward", at=4))
    (run,) = (tmp_path / "runs").glob("*/*")
    other = vidtrain(*line, "multigrid=both", f"resume={run}")
    assert other.code == 2 and "another multigrid" in other.err
    larger = vidtrain(*line, "data.batch_size=4", f"resume={run}", "trainer.max_epochs=1")
    assert larger.code == 0 and "seen twice, or not at all" in larger.out


@pytest.mark.parametrize(
    ("hook", "at", "settings"),
    [
        ("on_before_backward", 8, ["data.workers=2"]),
        ("on_train_batch_end", 9, ["trainer.accumulate_grad_batches=2"]),
        ("on_validation_batch_end", 5, []),  # two an epoch
        pytest.param("on_train_epoch_end", 2, [], marks=pytest.mark.slow),
        pytest.param("on_train_epoch_start", 4, [], marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stopped_ends_as_one_that_did_not(
    vidtrain, tiny_dataset, tmp_path, hook, at, settings
):
    more = ["callbacks.ema.decay=0.8", "callbacks.precise_bn.batches=1", "optim.lr=0.001",
            "callbacks.checkpoint.monitor=val/loss"]  # fmt: skip
    line = [*RUN, f"data.root={tiny_dataset}", *more, *settings]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    with pytest.raises(RuntimeError, match="an error of a test"):
        vidtrain(*line, "paths.runs=parts", *add("Fail", hook=hook, at=at))
    again = vidtrain(*line, "paths.runs=parts", "resume=auto")
    assert again.code == 0, again.err
    assert "going on with" in again.out
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_it_goes_with_what_else_a_run_may_have(vidtrain, tiny_dataset, seen):
    done = vidtrain(
        *RUN, f"data.root={tiny_dataset}", "model=r3d_18", "clip.num_frames=4", "clip.stride=1",
        "clip.size=32", "trainer.max_epochs=2", "multigrid.stages=[0.7]", "augment.repeats=2",
        "trainer.precision=bf16-mixed", "data.cache=ram", "data.drop_last=true", "test=true",
        "views.clips=1", "views.crops=1", "optim.lr=0.0001", "multigrid.norm_clips=8",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "top1" in done.out
    assert {(frames, size) for _, frames, size, _ in seen} >= {(1, 16), (4, 22)}
    assert all(videos % 2 == 0 for videos, *_ in seen)


@pytest.mark.slow
def test_two_ranks_agree_on_every_shape(tiny_dataset, tmp_path):
    env = {**os.environ, "VIDTRAIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(HERE)}
    words = ["trainer.devices=2", "trainer.strategy=ddp", f"data.root={tiny_dataset}"]
    done = subprocess.run(
        [sys.executable, "-m", "vidtrain", *RUN, *words, "+callbacks.shapes._target_=test_train_multigrid.Shapes"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (one, two) = [(tmp_path / f"shapes-{rank}").read_text() for rank in (0, 1)]
    assert one == two and len(set(one.splitlines())) > 4
    assert states(tmp_path / "runs")["global_step"] == len(one.splitlines())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=toy_early_fusion"], "does not take clips of"),
        (["trainer.max_steps=10"], "set trainer.max_epochs, and not max_steps"),
        (["optim=sgd_one_cycle"], "does not go with multigrid's long cycle"),
        (["trainer.sync_batchnorm=true"], "set multigrid.norm_clips=null"),
        (["multigrid.short=[2]"], "above 0, at most 1"),
        (["multigrid.long=5"], "multigrid.long is 5"),
        (["multigrid.norm_clips=0"], "multigrid.norm_clips is 0"),
        (["+multigrid.bogus=1"], "multigrid.bogus"),
        (["trainer.val_check_interval=2"], "set a share of an epoch"),
        (["profile=true"], "add multigrid=none"),
    ],
)
def test_what_does_not_go_together_is_refused(vidtrain, tiny_dataset, tmp_path, words, says):
    refused = vidtrain(*RUN, f"data.root={tiny_dataset}", *words)
    assert refused.code == 2 and says in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/*"))
