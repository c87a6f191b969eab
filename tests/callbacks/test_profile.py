"""`profile=true`: runs that wait for data, for the network or for a callback, and what is said of each."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from tiny import TINY_RUN

from vidtrain.callbacks import profile
from vidtrain.callbacks.profile import BACKWARD, CALLBACKS, DATA, FORWARD, LOGGING, Plan, section_of
from vidtrain.data.dataset import VideoDataset
from vidtrain.models.fusion import LateFusionPool

NAP = 0.01  # seconds


class Slow(L.Callback):
    """Takes its time after every batch."""

    def on_train_batch_end(self, *args):
        time.sleep(5 * NAP)


def slow(function, seconds=NAP):
    def slowly(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    return slowly


def run(vidtrain, root, *words):
    """Profile a tiny run: what was printed, and the report and the trace as they were saved."""
    result = vidtrain("train", *TINY_RUN, f"data.root={root}", "profile=true", *words)
    assert result.code == 0, result.err
    (folder,) = Path().glob("runs/*/*")
    found = json.loads((folder / "profile.json").read_text())
    assert sum(found["ms"].values()) == pytest.approx(found["step_ms"], rel=1e-3)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert found["verdict"] in result.out
    assert not (folder / "checkpoints").exists() and "nothing was validated" in result.out
    return result.out, found, json.loads((folder / "trace.json").read_text())


def test_slow_decoding(vidtrain, tiny_dataset, monkeypatch):
    monkeypatch.setattr(VideoDataset, "load", slow(VideoDataset.load))
    out, found, trace = run(vidtrain, tiny_dataset, "test=true")
    assert found["bottleneck"] == "data" and found["shares"][DATA] > 0.5
    assert found["ms"][DATA] > 4 * NAP * 1e3  # four videos a batch
    assert "data: the network waits" in out and "more data.workers (there are 0)" in out
    assert (found["steps"], found["warm_up"], found["videos"]) == (20, 5, 4)
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    assert "aten::convolution_backward" in names
    assert names.count("aten::convolution_backward") % profile.TRACED == 0
    assert len(found["operations"]) == profile.OPERATIONS
    shares = [one["share"] for one in found["operations"]]
    assert shares == sorted(shares, reverse=True) and 0.2 < sum(shares) <= 1.001
    assert all(one["name"] in names for one in found["operations"])


def test_slow_network(vidtrain, tiny_dataset, monkeypatch):
    monkeypatch.setattr(LateFusionPool, "forward", slow(LateFusionPool.forward, 5 * NAP))
    out, found, _ = run(vidtrain, tiny_dataset, "trainer.accumulate_grad_batches=3")
    assert (
        found["bottleneck"] == "device" and found["ms"][FORWARD] > 5e3 * NAP > found["ms"][BACKWARD]
    )
    assert found["verdict"].startswith("device: CPU works") and " on forward; a GPU" in out
    assert (found["steps"], found["warm_up"]) == (21, 6)  # whole steps of the optimizer


def test_slow_callback(vidtrain, tiny_dataset):
    words = ["+callbacks.slow._target_=test_profile.Slow", "trainer.log_every_n_steps=1"]
    out, found, _ = run(vidtrain, tiny_dataset, *words, "data.workers=2")
    assert found["bottleneck"] == "logging and callbacks" and found["ms"][CALLBACKS] > 5e3 * NAP
    assert next(iter(found["callbacks_ms"])) == "Slow.on_train_batch_end"
    assert found["ms"][LOGGING] > 0 and "CSVLogger.log_metrics" in found["callbacks_ms"]
    assert "Slow.on_train_batch_end 5" in out and found["warm_up"] == 5 + 2 * 2


def test_mistakes(vidtrain, tiny_dataset):
    line = [*TINY_RUN, f"data.root={tiny_dataset}"]
    both = vidtrain("train", *line, "profile=true", "resume=auto")
    assert both.code == 2 and "leave resume out" in both.err
    words = ["+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping"]
    waits = vidtrain("train", *line, "profile=true", *words, "+callbacks.stop.monitor=val/loss")
    assert waits.code == 0, waits.err
    other = vidtrain("train", *line, "profile=trace")
    assert other.code == 2 and "profile is 'trace'; it is true or false" in other.err


def test_actions_of_lightning_are_told_apart():
    assert section_of("[_TrainingEpochLoop].train_dataloader_next") == DATA
    assert section_of("[Callback]Early{'monitor': 'val.loss'}.on_train_batch_end") == CALLBACKS
    assert section_of("[Strategy]DDPStrategy.backward") == BACKWARD
    assert section_of("run_training_batch") is None
    assert profile.plain_name("[Callback]Early{'a': 'b.c'}.on_end") == "Early.on_end"


def test_batches_made_ahead_are_used_up_and_every_worker_is_seen():
    assert Plan.of(workers=0, prefetch=2, accumulated=1) == (5, 20, 3)
    assert Plan.of(workers=14, prefetch=2, accumulated=1) == (33, 28, 3)
    assert Plan.of(workers=14, prefetch=2, accumulated=8) == (40, 32, 8)


def test_verdicts_by_numbers():
    found = {
        "device": "NVIDIA H200", "precision": "32-true", "workers": 8, "callbacks_ms": {"A.b": 2.0},
        "shares": dict.fromkeys(profile.SECTIONS, 0.0) | {FORWARD: 0.3, BACKWARD: 0.4, DATA: 0.3},
    }  # fmt: skip

    def said(**more):
        one = {**found, **more}
        return profile.verdict({**one, "bottleneck": profile.bottleneck(one)})

    assert said() == (
        "device: NVIDIA H200 works 70% of each step, 40% on backward; trainer=gpu (bf16), compile=true;"
        " 30% it waits for data, with data.workers=8"
    )
    assert "compile=true, a smaller model" in said(precision="bf16-mixed")
    shares = dict.fromkeys(profile.SECTIONS, 0.0)
    assert said(shares=shares | {profile.LOOP: 1.0}).startswith("loop: what lies between")
    assert "A.b 2 ms of it" in said(shares=shares | {LOGGING: 0.6, DATA: 0.4})
    assert "augment=basic" in said(shares=shares | {profile.MOVE: 0.6, DATA: 0.4})


@pytest.mark.gpu
def test_a_gpu_is_waited_for_where_its_work_belongs(vidtrain, tiny_dataset, tmp_path):
    words = [
        word for word in TINY_RUN if word != "trainer=cpu" and not word.startswith("clip.size")
    ]
    words += [f"data.root={tiny_dataset}", "profile=true", "trainer=gpu", "data.compile=false"]
    result = vidtrain("train", *words, "clip.size=224")
    assert result.code == 0, result.err
    (file,) = tmp_path.glob("runs/*/*/profile.json")
    found = json.loads(file.read_text())
    assert found["ms"][BACKWARD] > 0 and found["memory_gb"] > 0
    assert found["operations"][0]["ms"] > 0
    trace = json.loads((file.parent / "trace.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in trace)


def test_time_counts_once_and_where_it_was_spent(monkeypatch):
    """A clock of our own: an action's time is without those inside it, and only measured steps count."""
    clock = [0.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: clock[0])
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), loggers=[], profiler=None,
        precision="32-true",
    )  # fmt: skip
    data = SimpleNamespace(train_dataloader=None, batch_size=2)
    sections = profile.Sections(trainer, data, None)
    sections.plan = Plan(1, 2, 1)
    assert trainer.profiler is sections

    def spend(action, seconds, *inside):
        with sections.profile(action):
            for one in inside:
                spend(*one)
            clock[0] += seconds

    for _ in range(4):
        spend("[Loop].train_dataloader_next", 1)
        spend("[LightningModule]T.optimizer_step", 2, ("[Strategy]S.training_step", 3),
              ("[Strategy]S.backward", 4, ("[Callback]C.on_before", 5)))  # fmt: skip
        clock[0] += 6
    sections.start("[Callback]C.on_train_epoch_end")
    found = sections.report()
    assert found["steps"] == 2 and found["step_ms"] == 21_000
    assert list(found["ms"].values()) == [1000, 0, 3000, 4000, 2000, 5000, 0, 6000]
