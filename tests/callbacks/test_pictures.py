from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import av
import lightning.pytorch as L
import pytest
import torch
from offline_run import config, history, records
from torch import nn
from torch.utils.data import DataLoader

import vidtrain.callbacks.pictures as pictures_module
from vidtrain import loggers
from vidtrain.callbacks.pictures import Pictures
from vidtrain.callbacks.pictures import _Error as Wrong
from vidtrain.types import Clip

NAMES = ["left", "<b>right</b>", "up", "never seen"]

pytestmark = [  # what Lightning says of three loaders without workers, and of its own code
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Named(list):
    """A dataset that knows its rows; row 3 is a piece of a video."""

    @property
    def rows(self):
        return self

    def row(self, number: int):
        piece = (1.5, 2.0) if number == 3 else (None, None)
        return SimpleNamespace(path=f"{number}.mp4", start=piece[0], end=piece[1])


class Rows(L.LightningDataModule):
    """Nine clips of three classes, sorted by class, of a brightness that tells their row."""

    clip = Clip(4, 2, 15, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.5))
    label_names = NAMES

    def __init__(self, many: bool = False) -> None:
        super().__init__()
        self.many = many

    def rows(self):
        for row in range(9):
            grey = torch.full((3, 4, 15, 15), 20.0 * row) / 255
            mean, std = (torch.tensor(t).view(3, 1, 1, 1) for t in (self.clip.mean, self.clip.std))
            label = torch.tensor(row // 3)
            if self.many:
                label = torch.nn.functional.one_hot(label, 4)
                label[0] = 1
            video = ((grey - mean) / std)[None]  # (V, C, T, H, W)
            yield {"video": video, "label": label, "index": torch.tensor(row)}

    def train_dataloader(self):
        kind = list if self.many else Named
        return DataLoader(kind(self.rows()), batch_size=3)

    val_dataloader = test_dataloader = train_dataloader


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 4)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["video"].mean((1, 2, 3, 4, 5), keepdim=True).flatten(1)).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/top1", 1 / 3, batch_size=3)
        return self.test_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        scores = torch.zeros(len(batch["index"]), 4)
        scores[:, 1] = 0.7  # whatever it is, it goes right
        return {"scores": scores, "target": batch["label"]}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()


def fit(run_dir: Path, callback: Pictures, many: bool = False, module=Tiny, more=()) -> Path:
    said = {"model": {"_target_": "vidtrain.models.c3d.c3d"}, "clip": {"num_frames": 4}}
    with loggers.closing(loggers.build(run_dir, said, wandb="always")) as made:
        trainer = L.Trainer(
            default_root_dir=run_dir,
            logger=made,
            callbacks=[callback, *more],
            max_steps=2,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=1,
            val_check_interval=2,
        )
        trainer.fit(module(), datamodule=Rows(many))
        trainer.test(module(), datamodule=Rows(many), verbose=False)
    import wandb

    wandb.teardown()  # the file is whole when W&B's own process has ended
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return file


def test_a_run_offline_holds_curves_config_tables_and_videos(tmp_path, offline, capfd):
    run_dir = tmp_path / "c3d-demo" / "2026-01-01"
    run_dir.mkdir(parents=True)
    file = fit(run_dir, Pictures(num_videos=3))
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "W&B" in line or "wandb" in line.lower()] == [
        f"W&B is offline (as asked); later: wandb sync {file.parent}"
    ]

    rows = history(file)
    assert all("trainer/global_step" in row for row in rows)
    with (run_dir / "metrics.csv").open() as file_:
        written = {
            int(row["step"]): float(row["train/loss"])
            for row in csv.DictReader(file_)
            if row["train/loss"]
        }
    assert list(written) == [0, 1]
    assert written == {
        row["trainer/global_step"]: pytest.approx(row["train/loss"])
        for row in rows
        if "train/loss" in row
    }
    assert [row["val/top1"] for row in rows if "val/top1" in row] == [pytest.approx(1 / 3)]

    assert config(file)["model"] == {"_target_": "vidtrain.models.c3d.c3d"}
    run = next(r.run for r in records(file) if r.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group) == ("vidtrain", "c3d-demo")
    assert run.display_name == "c3d-demo/2026-01-01"
    metrics = [r.metric for r in records(file) if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "trainer/global_step" for m in metrics)

    files = file.parent / "files"
    for stage in ("val", "test"):
        (row,) = [row for row in rows if f"{stage}/videos/count" in row]
        assert row["trainer/global_step"] == {"val": 1, "test": 2}[stage]
        table = json.loads((files / row[f"{stage}/classes/path"]).read_text())
        assert table["data"] == [
            ["left", 0.0, 3, "<b>right</b>"],
            ["<b>right</b>", 1.0, 3, ""],
            ["up", 0.0, 3, "<b>right</b>"],
        ]
        matrix = json.loads((files / row[f"{stage}/confusion_matrix_table/path"]).read_text())
        cells = {(true, said): count for true, said, count in matrix["data"] if count}
        assert cells == {("left", NAMES[1]): 3, (NAMES[1], NAMES[1]): 3, ("up", NAMES[1]): 3}

        # One of each batch, so of each class, though the rows are sorted by class.
        assert [caption.split(" | ")[:2] for caption in row[f"{stage}/videos/captions"]] == [
            ["0.mp4", "is left 0.00"],
            ["3.mp4 (1.5-2 s)", "is <b>right</b> 0.70"],
            ["6.mp4", "is up 0.00"],
        ]
        assert "said <b>right</b> 0.70" in row[f"{stage}/videos/captions"][0]
        for video, row_number in zip(row[f"{stage}/videos/videos"], (0, 3, 6), strict=True):
            with av.open(str(files / video["path"])) as mp4:
                frames = [frame.to_ndarray(format="rgb24") for frame in mp4.decode(video=0)]
                assert float(mp4.streams.video[0].average_rate) == 15.0  # 30 seen every 2nd
            assert len(frames) == 4 and frames[0].shape == (16, 16, 3)
            assert abs(int(frames[0].mean()) - 20 * row_number) <= 3  # seen as it was decoded


def test_many_labels_make_a_table_of_average_precision(tmp_path, offline):
    rows = history(fit(tmp_path, Pictures(num_videos=1), many=True))
    (row,) = [row for row in rows if "val/classes/path" in row]
    (file,) = tmp_path.glob("wandb/offline-run-*/files/" + row["val/classes/path"])
    table = json.loads(file.read_text())
    # The scores are equal throughout, so the precision is the share of videos with the label.
    assert [(name, videos) for name, _, videos in table["data"]] == [
        ("left", 9),
        ("<b>right</b>", 3),
        ("up", 3),
    ]
    assert [value for _, value, _ in table["data"]] == pytest.approx([1, 1 / 3, 1 / 3])
    assert not any("confus" in key for key in row)
    assert row["val/videos/captions"][0].startswith("row 0 | is left 0.00 | said")


# What the true class gets; the best answer is always NAMES[1], which 3, 4 and 5 are.
TRUE = (0.2, 0.05, 0.3, 0.7, 0.7, 0.7, 0.25, 0.01, 0.1)


class Unsure(Tiny):
    def test_step(self, batch, batch_idx):
        made = super().test_step(batch, batch_idx)
        for i, row in enumerate(batch["index"].tolist()):
            made["scores"][i, row // 3] = TRUE[row]
        return made


def test_the_worst_errors_are_shown_and_no_more_are_kept(tmp_path, offline):
    kept, callback = [], Pictures(num_videos=0, num_errors=3)

    class Watch(L.Callback):
        def on_validation_batch_end(self, *args):
            kept.append([(e.row, e.frames.dtype) for e in callback.errors])

    file = fit(tmp_path, callback, module=Unsure, more=[Watch()])
    kept = kept[2:]  # Lightning's two batches before training are not counted
    assert [[row for row, _ in errors] for errors in kept] == [[1, 0, 2], [1, 0, 2], [7, 1, 8]]
    assert all(dtype == torch.uint8 for errors in kept for _, dtype in errors)
    (row,) = [row for row in history(file) if "val/worst_errors/count" in row]
    assert "val/videos/count" not in row
    captions = [caption.split(" | ") for caption in row["val/worst_errors/captions"]]
    assert [words[:2] for words in captions] == [
        ["7.mp4", "is up 0.01"],
        ["1.mp4", "is left 0.05"],
        ["8.mp4", "is up 0.10"],
    ]
    assert all(words[2].startswith("said <b>right</b> 0.70") for words in captions)
    for video, number in zip(row["val/worst_errors/videos"], (7, 1, 8), strict=True):
        with av.open(str(file.parent / "files" / video["path"])) as mp4:
            frames = [frame.to_ndarray(format="rgb24") for frame in mp4.decode(video=0)]
        assert len(frames) == 4 and abs(int(frames[0].mean()) - 20 * number) <= 3


def test_the_worst_of_all_ranks_are_chosen(monkeypatch):
    frames = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    callback = Pictures(num_errors=2)
    callback.errors = [Wrong(0.1, 0, frames, "c"), Wrong(0.4, 2, frames, "d")]
    # A sampler that fills up the last batch gives a video to both ranks.
    other = [(0.05, 1, b"mp4", "b"), (0.1, 0, b"mp4", "c")]

    def gather(parts, own):
        parts[:] = [other, own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    (first, caption), (second, again) = callback._worst(2, 10.0)
    assert (first, caption, again) == (b"mp4", "b", "c")
    assert second[4:8] == b"ftyp"  # an mp4 file's first words
    monkeypatch.delattr(torch.distributed, "all_gather_object")  # one rank asks nobody
    assert [caption for _, caption in callback._worst(1, 10.0)] == ["c", "d"]


def test_several_labels_are_wrong_where_the_best_answer_is_none_of_them():
    callback = Pictures(num_errors=3)
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.1, 0.3], [0.9, 0.2, 0.3], [0.9, 0.0, 0.0]])
    target = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]])
    batch = {"video": torch.zeros(4, 1, 3, 2, 4, 4), "index": torch.tensor([5, 6, 7, 8])}
    data = SimpleNamespace(clip=Rows.clip, label_names=["a", "b", "c"])
    trainer = SimpleNamespace(datamodule=data, testing=False, val_dataloaders=None)
    callback._take_errors(trainer, batch, scores, target)
    assert [(e.row, round(e.score, 2)) for e in callback.errors] == [(6, 0.1), (7, 0.3)]
    assert callback.errors[1].caption.startswith("row 7 | is b 0.20, c 0.30 | said a 0.90")
    unlabelled = torch.full((4,), -1)
    callback.errors = []
    callback._take_errors(trainer, batch, scores, unlabelled)
    assert callback.errors == []


def test_without_wandb_nothing_is_kept(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("made a picture that nobody asked for")

    monkeypatch.setattr(Pictures, "_video", never)
    monkeypatch.setattr(pictures_module, "MulticlassConfusionMatrix", never)
    callback = Pictures()
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        logger=loggers.build(tmp_path, wandb="never"),
        callbacks=[callback],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(Tiny(), datamodule=Rows(), verbose=False)
    assert not (tmp_path / "wandb").exists()


def test_many_classes_get_a_table_of_pairs_instead_of_a_matrix():
    counts = torch.zeros(60, 60, dtype=torch.long)
    counts[3, 7], counts[3, 3], counts[5, 1] = 4, 4, 1
    made = pictures_module._confusion(counts, [f"class {k}" for k in range(60)])
    assert set(made) == {"classes", "confused_pairs"}
    assert made["confused_pairs"].data == [
        ["class 3", "class 7", 4, 0.5],
        ["class 5", "class 1", 1, 1.0],
    ]
