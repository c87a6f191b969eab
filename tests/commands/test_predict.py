"""`vidtrain predict`: which files it takes, what it refuses, what it prints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from make_video import write_video

from vidtrain.commands.predict import find_device, find_files
from vidtrain.types import UserError

TINY = ["model=late_fusion_pool", "model.backbone=small", "clip.num_frames=2", "clip.stride=2"]
TINY += ["clip.size=32", "data=folder", "data.batch_size=2", "data.workers=0", "logger=none"]
TINY += ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1"]
TINY += ["trainer.limit_val_batches=0"]


def touch(*paths: Path) -> list[Path]:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return list(paths)


def test_a_file_is_taken_whatever_its_ending(tmp_path):
    for path in touch(tmp_path / "a.mp4", tmp_path / "b.dat", tmp_path / "no ending"):
        assert find_files(path) == [path]


def test_a_folder_gives_its_videos_all_the_way_down(tmp_path):
    wanted = touch(tmp_path / "b.MP4", tmp_path / "x" / "y" / "a.webm", tmp_path / "x" / "z.avi")
    touch(tmp_path / "notes.txt", tmp_path / "x" / "labels.csv")
    (tmp_path / "folder.mp4").mkdir()
    assert find_files(tmp_path) == sorted(wanted)


def test_a_list_gives_its_lines(tmp_path):
    names = tmp_path / "lists" / "mine.txt"
    names.parent.mkdir()
    names.write_text("\ufeff../a b.mp4\n\n  gone.mp4  \n/abs/c.mp4\n", encoding="utf-8")
    folder = names.parent
    assert find_files(names) == [folder / "../a b.mp4", folder / "gone.mp4", Path("/abs/c.mp4")]


def test_nothing_to_predict_is_said(tmp_path):
    (empty,) = touch(tmp_path / "empty.txt")
    with pytest.raises(UserError, match=r"empty\.txt: the list is empty"):
        find_files(empty)
    with pytest.raises(UserError, match=r"nowhere: there is no such file or folder"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no videos in it .*\.mp4"):
        find_files(tmp_path)


def test_a_list_with_a_missing_file_is_predicted_to_its_end(vidtrain, tiny_dataset, tmp_path):
    root = shutil.copytree(tiny_dataset, tmp_path / "videos")
    names = {"apple": "[bold]x", "it's (a) pear": "b [b]", "zebra": ":car:"}
    for split in ("train", "val", "test"):
        for old, new in names.items():
            (root / split / old).rename(root / split / new)
    trained = vidtrain("train", *TINY, f"data.root={root}")
    assert trained.code == 0, trained.err
    (ckpt,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")

    folder = tmp_path / "mine"
    folder.mkdir()
    write_video(folder / "[red]a.mp4", 12, size=(64, 48))
    write_video(folder / os.fsdecode(b"caf\xe9.mp4"), 12, size=(64, 48))
    (folder / "list.txt").write_bytes(b"[red]a.mp4\n[b]gone.mp4\ncaf\xe9.mp4\n")
    result = vidtrain(
        "predict", f"ckpt={ckpt}", "input=mine/list.txt", "workers=0", "device=cpu", "top=9",
        "batch_size=2", "views.clips=2", "views.crops=1",
    )  # fmt: skip
    assert result.code == 1, result.err
    lines = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    names_found = [Path(line["path"]).name for line in lines]
    assert names_found == ["[red]a.mp4", "[b]gone.mp4", os.fsdecode(b"caf\xe9.mp4")]
    assert "not found" in lines[1]["error"] and "predictions" not in lines[1]
    for line in (lines[0], lines[2]):
        assert {p["label"] for p in line["predictions"]} == set(names.values())
        scores = [p["score"] for p in line["predictions"]]
        assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=1e-5)
    for text in ("[red]a.mp4", "[b]gone.mp4", "caf\\udce9.mp4", *names.values()):
        assert text in result.out, text
    assert "2 of 3 videos, in predictions.jsonl" in result.out

    wrong = vidtrain("predict", f"ckpt={ckpt}", "input=mine", "views.clip=2")
    assert wrong.code == 2 and "did you mean 'views.clips'" in wrong.err
    wrong = vidtrain("predict", f"ckpt={ckpt}", "input=mine", "views.short_side=tall")
    assert wrong.code == 2 and "views.short_side is 'tall'" in wrong.err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("device=nonsense", "device=nonsense: "),
        ("device=null", "device=None: "),
        ("device=meta", "device=meta: "),
        ("device=cuda:999", "device=cuda:999: "),
        ("batch_size=0", "predict: batch_size is 0; it must be a whole number, at least 1"),
        ("top=0", "predict: top is 0; "),
        ("top=many", "predict: top is 'many'; "),
        ("workers=-1", "predict: workers is -1; it must be a whole number, at least 0"),
        ("workers=some", "predict: workers is 'some'; "),
        ("output=nowhere/p.jsonl", "there is no folder nowhere"),
        ("output=.", "is a folder"),
        ("trainer=cpu", "trainer"),
    ],
)
def test_a_mistake_is_one_line(vidtrain, word, message):
    result = vidtrain("predict", "ckpt=x.ckpt", "input=x.mp4", word)
    assert result.code == 2
    assert message in result.err and len(result.err.splitlines()) == 1


def test_the_device_that_torch_has(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto") == torch.device("cuda")
