"""Averages of weights, by hand; what is validated, saved and tested; precise batch norm."""

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from vidtrain import checkpoint
from vidtrain.callbacks.averaging import EMA, SWA, ema, swa
from vidtrain.callbacks.precise_bn import PreciseBN, precise_bn
from vidtrain.types import UserError

RUN = [
    "train", "model=toy_3d_cnn", "clip.size=16", "clip.num_frames=4", "data=folder",
    "data.workers=0", "data.batch_size=6", "trainer=cpu", "trainer.max_epochs=4", "logger=none",
    "optim=sgd_cosine", "optim.lr=0.3",
]  # fmt: skip


class Tape(L.Callback):
    """Notes the weight of every step's end, and of every validation."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.steps.append(pl_module.weight.item())

    def on_validation_batch_start(self, trainer, pl_module, *args) -> None:
        self.validated.append(pl_module.weight.item())


class Line(L.LightningModule):
    """One weight that moves by -1 a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))

    def training_step(self, batch, batch_idx):
        return self.weight

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(average: L.Callback, epochs: int = 3) -> tuple[Line, Tape]:
    data = torch.utils.data.DataLoader([0.0, 0.0])
    line, tape = Line(), Tape()
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[average, tape],
    )  # fmt: skip
    trainer.fit(line, data, data)
    assert tape.steps == [9, 8, 7, 6, 5, 4]
    return line, tape


def test_a_moving_average_by_hand():
    line, tape = fit(EMA(0.5))
    average, expected = 9.0, []  # the first weights are the average
    for update, weight in enumerate([8, 7, 6, 5, 4], start=1):
        decay = min(0.5, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * weight
        expected.append(average)
    assert tape.validated[::2] == pytest.approx([expected[0], expected[2], expected[4]])
    assert line.weight.item() == pytest.approx(expected[-1])


def test_updates_may_be_rare():
    _, tape = fit(EMA(0.9, every_n_steps=4))
    assert tape.validated[::2] == [8, 6, 6]  # the weights themselves, until the fourth step's


def test_a_mean_of_epochs_by_hand():
    line, tape = fit(SWA(0.3))  # from the second of three epochs on
    assert tape.validated[::2] == [8, 6, 5]
    assert line.weight.item() == 5


def test_settings():
    assert ema(None) is None and swa(None) is None and precise_bn(None) is None
    for make, message in (
        (lambda: ema(1.0), "callbacks.ema.decay is 1.0"),
        (lambda: ema(0.9, 0), "callbacks.ema.every_n_steps is 0"),
        (lambda: swa(1), "callbacks.swa.start is 1"),
        (lambda: precise_bn(0), "callbacks.precise_bn.batches is 0"),
    ):
        with pytest.raises(UserError, match=message):
            make()


@pytest.mark.parametrize("words", [["callbacks.ema.decay=0.9"], ["callbacks.swa.start=0.5"]])
def test_a_stopped_run_with_an_average_goes_on_to_the_same_end(
    vidtrain, tiny_dataset, tmp_path, monkeypatch, words
):
    from vidtrain.callbacks.checkpoint import Checkpoint, Stopped

    line = [*RUN, f"data.root={tiny_dataset}", *words]
    assert vidtrain(*line, "paths.runs=whole").code == 0
    ask = Checkpoint._stop_if_asked

    def stop(self, trainer):
        if trainer.global_step == 10 and trainer.training:
            self.save_now(trainer)
            raise Stopped("stopped", 130)
        ask(self, trainer)

    monkeypatch.setattr(Checkpoint, "_stop_if_asked", stop)
    assert vidtrain(*line, "paths.runs=parts").code == 130
    monkeypatch.setattr(Checkpoint, "_stop_if_asked", ask)
    done = vidtrain(*line, "paths.runs=parts", "resume=auto")
    assert done.code == 0 and "going on with" in done.out, done.err

    def last(runs: str) -> dict:
        (run,) = Path(runs).glob("*/*")
        return checkpoint.load(run / "checkpoints" / "last.ckpt")

    whole, parts = last("whole"), last("parts")
    for part in ("state_dict", "current_model_state"):
        for key, tensor in whole[part].items():
            assert torch.equal(tensor, parts[part][key]), (part, key)
    key = next(k for k in whole["state_dict"] if k.endswith("weight"))
    assert not torch.equal(whole["state_dict"][key], whole["current_model_state"][key])


class Norm(L.LightningModule):
    """A batch norm whose running mean lags."""

    frozen = ()

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.BatchNorm1d(1, momentum=0.01), nn.Dropout(0.5))
        self.seen: list[tuple[float, float]] = []

    def logits(self, batch):
        return self.model(batch["x"])

    def training_step(self, batch, batch_idx):
        return self.model(torch.randn(4, 1)).sum()

    def validation_step(self, batch, batch_idx) -> None:
        norm = self.model[0]
        self.seen.append((norm.running_mean.item(), norm.running_var.item()))
        assert not norm.training and not self.model[1].training and norm.momentum == 0.01

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_precise_statistics_are_the_mean_over_the_batches():
    class Data(L.LightningDataModule):
        class Transform(nn.Module):
            def forward(self, batch):
                assert self.training
                return batch

        transform = Transform()

        def train_dataloader(self):
            return torch.utils.data.DataLoader([0.0] * 3)

        val_dataloader = train_dataloader

        def extra_batches(self, count, epoch):
            torch.randn(1)  # draws that training must not feel
            return [{"x": torch.tensor([[1.0], [3.0]])}, {"x": torch.tensor([[5.0], [11.0]])}]

    ends = []
    for callbacks in ([PreciseBN(2)], []):
        torch.manual_seed(0)
        net = Norm()
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(net, datamodule=Data())
        ends.append((*net.seen[0], torch.rand(1).item()))
    assert ends[0][:2] == pytest.approx((5.0, 10.0))  # of 2 and 8; of 2 and 18
    assert abs(ends[1][0]) < 1 and ends[0][2] == ends[1][2]  # the same draws come after it


def test_precise_batch_norm_in_a_run(vidtrain, tiny_dataset):
    words = [
        *RUN,
        f"data.root={tiny_dataset}",
        "model=r3d_18",
        "model.width=2",
        "clip.num_frames=8",
    ]
    words += ["trainer.max_epochs=1", "callbacks.precise_bn.batches=2", "clip.size=32"]
    done = vidtrain(*words)
    assert done.code == 0, done.err
