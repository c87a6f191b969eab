from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import av
import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import vidtrain.callbacks.pictures as pictures_module
from vidtrain import loggers
from vidtrain.callbacks.pictures import Pictures
from vidtrain.types import Clip

NAMES = ["left", "<b>right</b>", "up", "never seen"]
BLOCK, HEADER = 32768, 7

pytestmark = [  # what Lightning says of three loaders without workers, and of its own code
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


def records(path: Path):
    """Read a .wandb file: LevelDB's log framing around protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # the rest of a block too short for a header is padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # full, or last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(path: Path) -> list[dict]:
    """One dictionary per logged row; what is nested in a value has keys such as classes/path."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


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
        return DataLoader(list(self.rows()), batch_size=3)

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


def fit(run_dir: Path, callback: Pictures, many: bool = False, **options) -> Path:
    config = {"model": {"_target_": "vidtrain.models.c3d.c3d"}, "clip": {"num_frames": 4}}
    with loggers.closing(loggers.build(run_dir, config, wandb="always")) as made:
        trainer = L.Trainer(
            default_root_dir=run_dir,
            logger=made,
            callbacks=[callback],
            max_steps=2,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=1,
            val_check_interval=2,
            **options,
        )
        trainer.fit(Tiny(), datamodule=Rows(many))
        trainer.test(Tiny(), datamodule=Rows(many), verbose=False)
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

    config = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records(file)
        for item in record.run.config.update
        if record.WhichOneof("record_type") == "run"
    }
    assert config["model"] == {"_target_": "vidtrain.models.c3d.c3d"}
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
            ["row 0", "is left"],
            ["row 3", "is <b>right</b>"],
            ["row 6", "is up"],
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
    assert row["val/videos/captions"][0].startswith("row 0 | is left | said")


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
