from __future__ import annotations

import math
from functools import partial

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader

from vidtrain.callbacks import throughput
from vidtrain.callbacks.mfu import MultiplyAdds, peak
from vidtrain.callbacks.progress import measured

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]


class Network(nn.Module):
    inputs = ("video",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, video):
        return self.head(self.conv(video).mean((2, 3, 4)))


def macs(frames: int, size: int) -> int:
    return 8 * 3 * 27 * frames * size * size + 8 * 5


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Network()

    def training_step(self, batch, batch_idx):
        return self.model(batch["video"].flatten(0, 1)).square().mean()

    def validation_step(self, batch, batch_idx): ...

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class Slow(list):
    """Clips that take a second each."""

    def __init__(self, clock: Clock, clips) -> None:
        super().__init__(clips)
        self.clock = clock

    def __getitem__(self, index):
        self.clock.pass_by(1)
        return super().__getitem__(index)


def clips(count: int, frames: int = 2, kind=list) -> DataLoader:
    video = torch.zeros(2, 3, frames, 8, 8)  # two views
    return DataLoader(kind({"video": video} for _ in range(count)), batch_size=2)


class Log(Logger):
    """Keeps what it is told."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, dict]] = []

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, dict(metrics)))

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, values[name]) for step, values in self.calls if name in values]


def fit(tmp_path, data, *, every=4, epochs=2, val=None, accelerator="cpu", **options):
    log, callback = Log(), throughput.Throughput()
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator=accelerator, devices=1, max_epochs=epochs,
        logger=log, callbacks=[callback], log_every_n_steps=every, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(Task(), data, val)
    return log, callback, trainer


def test_every_few_steps_all_is_logged_in_one_call(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "peak_here", lambda device, precision: 1e12)
    log, callback, trainer = fit(tmp_path, clips(20))  # 10 steps an epoch
    # Lightning logs steps 3, 7, 11, 15, 19; step 11 is only the second one of its epoch.
    assert [step for step, _ in log.of("train/clips_per_second")] == [3, 7, 15, 19]
    for step, values in log.calls:
        if "train/clips_per_second" in values:
            assert set(values) == {
                "train/clips_per_second",
                "train/data_wait",
                "train/mfu",
                "epoch",
            }
            assert values["epoch"] == step // 10
            work = values["train/clips_per_second"] * macs(2, 8) * 6
            assert values["train/mfu"] == pytest.approx(work / 1e12)
    shown = measured(trainer)
    assert shown["clips/s"] == f"{callback.clips_per_second:.1f}" and "%" in shown["MFU"]
    assert "GPU" not in shown


def test_a_short_epoch_is_logged_at_its_end(tmp_path):
    log, _, trainer = fit(tmp_path, clips(6), every=50)  # 3 steps an epoch
    assert [step for step, _ in log.of("train/data_wait")] == [2, 5]
    assert not log.of("train/mfu") and not log.of("train/gpu_memory")  # of a CPU nothing is known
    assert "MFU" not in measured(trainer)


@pytest.mark.parametrize("validated", [False, True])
def test_the_clock_runs_for_batches_and_not_for_validation(tmp_path, monkeypatch, validated):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(Task, "validation_step", lambda *_: clock.pass_by(100))
    monkeypatch.setattr(Task, "on_train_batch_start", lambda *_: clock.pass_by(3))
    options = {"val": clips(2), "val_check_interval": 2} if validated else {}
    data = clips(20, kind=partial(Slow, clock))
    log, callback, _ = fit(tmp_path, data, epochs=1, **options)
    # A batch of 2 x 2 clips takes 2 s to come and 3 s to be learned; for the first one nobody waits.
    rates, shares = log.of("train/clips_per_second"), log.of("train/data_wait")
    assert rates == [(3, pytest.approx(16 / 18)), (7, pytest.approx(16 / 20))]
    assert shares == [(3, pytest.approx(6 / 18)), (7, pytest.approx(8 / 20))]
    assert callback.clips_per_second == pytest.approx(40 / 48)
    assert callback.data_wait == pytest.approx(18 / 48)


def test_clips_of_several_sizes_count_by_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "peak_here", lambda device, precision: 1e12)
    data = [batch for frames in (2, 4) for batch in clips(4, frames)]
    log, _, _ = fit(tmp_path, DataLoader(data, batch_size=None), epochs=1)
    ((_, rate),), ((_, share),) = log.of("train/clips_per_second"), log.of("train/mfu")
    mean = (macs(2, 8) + macs(4, 8)) / 2
    assert share == pytest.approx(rate * mean * 6 / 1e12)


def test_the_network_itself_is_left_alone():
    network = Network()
    network._compiled_call_impl = lambda *_: pytest.fail("ran what is compiled")
    weight = network.conv.weight.clone()
    count = MultiplyAdds(network)
    assert count(torch.Size([3, 4, 16, 16])) == macs(4, 16)
    assert count(torch.Size([3, 4, 8, 8])) == macs(4, 8)
    assert network.training and network.conv.weight.device.type == "cpu"
    assert torch.equal(network.conv.weight, weight)


def test_a_network_that_cannot_be_counted_has_no_mfu(tmp_path, monkeypatch):
    class Asking(Network):
        def forward(self, video):
            return super().forward(video) if video.sum() >= 0 else video

    assert math.isnan(MultiplyAdds(Asking())(torch.Size([3, 2, 8, 8])))
    locked = Network()
    locked.handle = (frame for frame in ())  # cannot be copied
    assert math.isnan(MultiplyAdds(locked)(torch.Size([3, 2, 8, 8])))
    monkeypatch.setattr(throughput, "peak_here", lambda device, precision: 1e12)
    monkeypatch.setattr(throughput, "MultiplyAdds", lambda _: MultiplyAdds(locked))
    log, _, _ = fit(tmp_path, clips(8), epochs=1)
    assert log.of("train/clips_per_second") and not log.of("train/mfu")


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", True, 989.4e12),
        ("NVIDIA H100 80GB HBM3", "32-true", True, 494.7e12),
        ("NVIDIA H100 80GB HBM3", "32-true", False, 66.9e12),
        ("NVIDIA H100 PCIe", "16-mixed", True, 756e12),
        ("NVIDIA A100-SXM4-40GB", "bf16-true", True, 312e12),
        ("NVIDIA A100 80GB PCIe", "32-true", True, 156e12),
        ("Tesla V100-SXM2-16GB", "16-mixed", True, 125e12),
        ("Tesla V100-PCIE-32GB", "32-true", True, 14e12),  # it has no TF32
        ("Tesla V100-PCIE-32GB", "bf16-mixed", True, None),  # nor bfloat16
        ("Tesla T4", "16-true", True, 65e12),
        ("NVIDIA L4", "bf16-mixed", True, 121e12),
        ("NVIDIA L40S", "bf16-mixed", True, 362e12),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", True, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", True, None),
        ("NVIDIA GeForce RTX 4090 D", "bf16-mixed", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16-mixed", True, None),
        ("NVIDIA H200", "64-true", True, None),
        ("AMD Instinct MI300X", "bf16-mixed", True, None),
    ],
)
def test_the_peak_is_of_the_device_and_the_precision(name, precision, tf32, expected):
    assert peak(name, precision, tf32) == (expected and pytest.approx(expected))


@pytest.mark.gpu
def test_memory_and_mfu_of_a_gpu(tmp_path):
    log, _, trainer = fit(tmp_path, clips(20), accelerator="gpu", precision="bf16-mixed")
    used = [value for _, value in log.of("train/gpu_memory")]
    assert len(used) == 4 and all(1e-6 < value < 1 for value in used)  # a small network, in GB
    name = torch.cuda.get_device_name()
    if peak(name, "bf16-mixed", True):
        assert len(log.of("train/mfu")) == 4 and all(0 < v < 1 for _, v in log.of("train/mfu"))
    assert measured(trainer)["GPU"].endswith(" GB")
