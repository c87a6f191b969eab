"""`data.batch_size=auto`: the search by itself, and runs of a network for which memory ends early."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import open_dict
from tiny import TINY_RUN

from vidtrain import build, resume
from vidtrain.callbacks import largest_batch
from vidtrain.callbacks.largest_batch import blank_batch, fitting_batch, largest
from vidtrain.models.small_3d_cnn import Small3DCNN
from vidtrain.types import UserError

WORDS = [word for word in TINY_RUN if not word.startswith(("model", "clip.num", "trainer"))]
WORDS += ["model=small_3d_cnn", "clip.num_frames=4", "trainer=cpu", "augment=resized"]
AUTO = [*WORDS, "data.batch_size=auto"]
forward = Small3DCNN.forward


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


def holds(most, error=NO_MEMORY):
    """A forward pass that has memory for so many clips."""

    def limited(self, x):
        if self.training and len(x) > most:
            raise error
        return forward(self, x)

    return limited


@pytest.fixture
def any_device(monkeypatch):
    """No GPU is asked for."""
    monkeypatch.setattr(largest_batch, "check_accelerator", lambda accelerator: None)


def test_the_search_finds_the_edge_and_asks_nothing_twice():
    for limit in (1, 2, 7, 8, 9, 24, 64, 1000):
        for edge in {0, 1, 2, 5, 7, 8, 9, 31, limit - 1, limit, limit + 5}:
            asked = []

            def fits(size, asked=asked, edge=edge):
                asked.append(size)
                return size <= edge

            assert largest(fits, limit) == min(limit, edge)
            assert len(asked) == len(set(asked)) <= 22 and set(asked) <= set(range(1, limit + 1))


def only_run(folder: Path) -> Path:
    (run,) = folder.glob("*/*")
    return run


def state(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:.*TypedStorage:UserWarning")
def test_a_run_takes_what_fits_and_goes_on_with_it(
    vidtrain, tiny_dataset, tmp_path, monkeypatch, any_device
):
    """10 clips fit, two of each video. The measuring leaves no trace in the weights."""
    from vidtrain.callbacks import checkpoint

    line = [f"data.root={tiny_dataset}", "augment.repeats=2", "trainer.max_epochs=2"]
    line += ["optim.reference_batch=40", "callbacks.ema.decay=0.9", "logger=none"]
    line += ["trainer.accumulate_grad_batches=2"]
    explicit = vidtrain("train", *WORDS, *line, "data.batch_size=5", "paths.runs=explicit")
    assert explicit.code == 0, explicit.err
    monkeypatch.setattr(Small3DCNN, "forward", holds(10))
    whole = vidtrain("train", *AUTO, *line, "paths.runs=whole")
    assert whole.code == 0, whole.err
    assert "data.batch_size=auto: 5 videos a step and device; no more fit cpu" in whole.out
    assert (
        "20 clips a step (5 videos x 2 clips x 2 accumulated); rate 0.005: optim.lr=0.01 is for 40"
        in whole.out
    )
    run = only_run(tmp_path / "whole")
    saved = state(run)
    configs = [saved["vidtrain"]["config"], saved["vidtrain"]["template"]]
    configs.append(yaml.safe_load((run / "config.yaml").read_text()))
    asked = yaml.safe_load((only_run(tmp_path / "explicit") / "config.yaml").read_text())
    assert resume.differences(configs[0], asked) == ["data"]  # not of those that asked for auto
    assert all(one["data"]["batch_size"] == 5 for one in configs)
    assert all(one["measured"] == ["data.batch_size"] for one in configs)
    for one in (saved["state_dict"], saved["current_model_state"]):
        theirs = state(only_run(tmp_path / "explicit"))
        theirs = theirs["state_dict" if one is saved["state_dict"] else "current_model_state"]
        assert all(torch.equal(one[key], theirs[key]) for key in theirs)

    check = checkpoint.Checkpoint._stop_if_asked

    def stop(self, trainer):
        if trainer.global_step == 2 and trainer.training:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        check(self, trainer)

    monkeypatch.setattr(checkpoint.Checkpoint, "_stop_if_asked", stop)
    assert vidtrain("train", *AUTO, *line, "paths.runs=parts").code == 130
    monkeypatch.setattr(checkpoint.Checkpoint, "_stop_if_asked", check)
    monkeypatch.setattr(Small3DCNN, "forward", holds(100))  # it would find more, and does not look
    again = vidtrain("train", *AUTO, *line, "paths.runs=parts", "resume=auto")
    assert again.code == 0, again.err
    assert "going on with" in again.out and "data.batch_size=auto:" not in again.out
    assert "5 videos x 2 clips x 2 accumulated" in again.out
    parts = next(r for r in (tmp_path / "parts").glob("*/*") if str(r) in again.out)
    ours, theirs = saved["state_dict"], state(parts)["state_dict"]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    monkeypatch.setattr(Small3DCNN, "forward", holds(10))
    tested = vidtrain("test", f"ckpt={run}", "trainer=cpu", "output=o", "views.clips=1")
    assert tested.code == 0, tested.err
    tested = vidtrain("test", f"ckpt={run}", "trainer=cpu", "output=a", "data.batch_size=auto")
    assert tested.code == 0, tested.err


def parts_of(compose, tiny_dataset, tmp_path, *words):
    cfg = compose("train", *AUTO, f"data.root={tiny_dataset}", *words)
    with open_dict(cfg):
        cfg.data.num_classes, cfg.data.cache_dir = 3, str(tmp_path)
    data = build.data(cfg)
    task = build.task(cfg, build.model(cfg))
    data.feed(task.model.inputs)
    return build.trainer(cfg, tmp_path, [], []), task, data


@pytest.mark.parametrize("words", [[], ["trainer.precision=bf16-true"], ["augment=strong"]])
def test_nothing_is_changed_by_measuring(compose, tiny_dataset, tmp_path, monkeypatch, words):
    trainer, task, data = parts_of(compose, tiny_dataset, tmp_path, *words)
    monkeypatch.setattr(Small3DCNN, "forward", holds(13 * data.augment.repeats))
    before = {key: value.clone() for key, value in task.state_dict().items()}
    torch.rand(3), np.random.rand(3), random.random()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    found = fitting_batch(trainer, task, data)
    assert found.size == 13 and "of its free memory to spare" in found.why
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]
    after = task.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(after[key].dtype == before[key].dtype for key in before)
    assert all(parameter.grad is None for parameter in task.parameters())


def test_what_keeps_a_batch_from_being_larger(compose, tiny_dataset, tmp_path, monkeypatch):
    trainer, task, data = parts_of(compose, tiny_dataset, tmp_path)
    assert fitting_batch(trainer, task, data) == (
        24,
        "all training videos, so that an epoch is one step",
    )
    clip = sum(v.nbytes for v in blank_batch(data, 1, torch.device("cpu")).values()
               if isinstance(v, torch.Tensor))  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(largest_batch, "available_memory", lambda: 2 * 2 * 9 * clip)
        found = fitting_batch(trainer, task, data)  # without workers two batches are there at once
    assert found.size == 9 and "data.workers" in found.why
    monkeypatch.setattr(Small3DCNN, "forward", holds(3, RuntimeError("too many for 32 bits")))
    with pytest.raises(RuntimeError, match="32 bits"):  # not for want of memory, and nothing went
        fitting_batch(trainer, task, data)
    monkeypatch.setattr(Small3DCNN, "forward", holds(9, RuntimeError("too many for 32 bits")))
    assert fitting_batch(trainer, task, data).size == 9


def test_batches_are_as_the_loader_makes_them(compose, tiny_dataset, tmp_path):
    """Shapes, types and order in memory of all that goes to the device."""
    for words in (["augment.repeats=2"], ["model=two_stream", "data.flow=farneback"],
                  ["data.multi_label=true", "task.multi_label=true"]):  # fmt: skip
        words = [*words, "model.backbone=small"] if "model=two_stream" in words else words
        _, _, data = parts_of(compose, tiny_dataset, tmp_path, *words)
        data.batch_size = 3
        real = next(iter(data.train_dataloader()))
        made = blank_batch(data, len(real["index"]), torch.device("cpu"))
        assert set(made) == set(real)
        for key, value in real.items():
            if isinstance(value, torch.Tensor):
                assert (made[key].shape, made[key].dtype, made[key].stride()) == (
                    value.shape, value.dtype, value.stride()
                ), key  # fmt: skip


def test_mistakes(vidtrain, tiny_dataset, monkeypatch):
    line = [*AUTO, f"data.root={tiny_dataset}"]
    with monkeypatch.context() as patch:
        patch.setattr(largest_batch, "check_accelerator", lambda accelerator: None)
        patch.setattr(Small3DCNN, "forward", holds(0))
        none = vidtrain("train", *line)
        assert none.code == 2 and "not even one video fits" in none.err
        many = vidtrain("train", *line, "multigrid=short")
        assert many.code == 2 and "several sizes; set data.batch_size=N" in many.err
    for verb in ("train", "bench"):
        cpu = vidtrain(verb, *line)
        assert cpu.code == 2 and "measures the memory of a CUDA GPU" in cpu.err
        assert "set data.batch_size=N" in cpu.err
    other = vidtrain("train", *line[:-2], "data.batch_size=many", line[-1])
    assert "data.batch_size is 'many'" in other.err


RANKS = """
import os, sys
import torch
from vidtrain import cli
from vidtrain.callbacks import largest_batch
from vidtrain.models.small_3d_cnn import Small3DCNN

largest_batch.check_accelerator = lambda accelerator: None
forward = Small3DCNN.forward

def limited(self, x):
    if len(x) > (4 if os.environ.get("LOCAL_RANK", "0") == "1" else 7):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, x)

Small3DCNN.forward = limited
cli.main()
"""


@pytest.mark.slow
def test_all_ranks_take_the_least(tiny_dataset, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    words = [*AUTO, f"data.root={tiny_dataset}", "trainer.devices=2", "trainer.strategy=ddp"]
    done = subprocess.run(
        [sys.executable, "ranks.py", "train", *words, "trainer.max_epochs=1", "paths.cache=cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "4 videos a step and device; another rank has no room for more" in done.stdout
    assert "8 clips a step (4 videos x 2 ranks)" in done.stdout
    run = only_run(tmp_path / "runs")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["batch_size"] == 4


@pytest.mark.gpu
def test_a_gpu_s_memory_is_filled_and_not_beyond(vidtrain, tiny_dataset, tmp_path):
    """0.8 GB of a GPU: the run trains with what was found, and twice as much is too much."""
    words = [word for word in AUTO if word != "trainer=cpu" and not word.startswith("clip.size")]
    words += ["clip.size=224", "clip.num_frames=16", "trainer=gpu", "data.compile=false"]
    words += ["trainer.precision=32-true"]  # 45 MB of activations a clip
    words += [f"data.root={tiny_dataset}", "trainer.max_epochs=1", "callbacks.ema.decay=0.9"]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.8e9 / total)
    try:
        found = vidtrain("train", *words)
        assert found.code == 0, found.err
        (config,) = tmp_path.glob("runs/*/*/config.yaml")
        size = yaml.safe_load(config.read_text())["data"]["batch_size"]
        assert 1 <= size < 24 and f"data.batch_size=auto: {size} videos" in found.out
        larger = vidtrain("train", *words, f"data.batch_size={2 * size}", "data.drop_last=true")
        assert larger.code == 2 and "memory is full" in larger.err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_split_network_is_refused(compose, tiny_dataset, tmp_path, monkeypatch):
    trainer, task, data = parts_of(compose, tiny_dataset, tmp_path)
    monkeypatch.setattr(largest_batch, "can_be_saved_alone", lambda trainer: False)
    with pytest.raises(UserError, match="trainer=fsdp"):
        fitting_batch(trainer, task, data)
