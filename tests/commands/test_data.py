"""`vidtrain data` through the command line: what it counts, which files it names, what it draws."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from make_video import write_audio, write_video
from PIL import Image

SMALL = ["model=late_fusion_pool", "model.backbone=small", "clip.num_frames=2", "clip.stride=2"]
SMALL += ["clip.size=32", "data=folder", "data.workers=2"]


@pytest.fixture
def videos(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A copy of the tiny dataset that a test may damage."""
    return shutil.copytree(tiny_dataset, tmp_path / "videos")


def cells(out: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    for line in out.splitlines():
        row = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if row and row[0] == first:
            return row[1:]
    raise AssertionError(f"no row '{first}' in\n{out}")


def read_table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


def test_prepare_counts_what_there_is(vidtrain, tiny_dataset, tmp_path):
    result = vidtrain("data", "action=prepare", *SMALL, f"data.root={tiny_dataset}")
    assert result.code == 0, result.err
    assert "folder: 36 rows, 3 classes" in result.out
    assert cells(result.out, "train") == ["24"]
    assert cells(result.out, "val") == ["6"]
    assert cells(result.out, "test") == ["6"]
    (manifest,) = (tmp_path / "cache").glob("folder-*.arrow")
    assert f"manifest {manifest}" in result.out


def test_check_passes_a_sound_dataset(vidtrain, tiny_dataset, tmp_path):
    # The flat videos of a class and length are the same in every split: only one split has no leaks.
    result = vidtrain("data", "action=check", *SMALL, f"data.root={tiny_dataset}", "split=test")
    assert result.code == 0, result.err
    assert "6 of 6 files are sound, 0 unusable, 0 leaks" in result.out
    with (tmp_path / "folder-check.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert all(row["ok"] == "True" and row["width"] == "64" for row in rows)
    assert sorted(row["frames"] for row in rows) == ["10"] * 3 + ["11"] * 3


def test_check_names_every_bad_file_and_every_leak(vidtrain, tmp_path):
    root = tmp_path / "videos"
    for split, start in (("train", 0), ("test", 100)):
        for label in ("a", "[bold]b"):
            (root / split / label).mkdir(parents=True)
            frames = range(start, start + 60)
            write_video(root / split / label / f"good-{split}.mp4", 60, b_frames=0, numbers=frames)
            start += 60
    a, b = root / "train" / "a", root / "train" / "[bold]b"
    whole = (a / "good-train.mp4").read_bytes()
    half = len(whole) // 2
    (a / "empty.mp4").write_bytes(b"")
    (a / "text.mp4").write_text("this is text\n" * 99)
    (b / "cut.mp4").write_bytes(whole[:half])
    (b / "zeroed.mp4").write_bytes(whole[:half] + bytes(200) + whole[half + 200 :])
    write_audio(b / "sound.mp4")
    shutil.copy(a / "good-train.mp4", root / "test" / "a" / "copy.mp4")
    result = vidtrain(
        "data", "action=check", *SMALL, f"data.root={root}", "output=table.csv", "data.val_fraction=0"
    )  # fmt: skip
    assert result.code == 1, result.err
    reasons = {
        "a/empty.mp4": "empty file",
        "a/text.mp4": "not a video but text",
        "[bold]b/cut.mp4": "cut off",
        "[bold]b/zeroed.mp4": "frames do not decode",
        "[bold]b/sound.mp4": "sound only",
    }
    named = [line for line in result.out.splitlines() if line.startswith("unusable: ")]
    assert len(named) == len(reasons)
    for path, reason in reasons.items():
        (line,) = (line for line in named if f"{root / 'train' / path}: " in line)
        assert reason in line
    assert "5 of 10 files are sound, 5 unusable, 1 leaks; table in table.csv" in result.out
    (leak,) = (line for line in result.out.splitlines() if line.startswith("the same file is in"))
    assert "test and train" in leak and "copy.mp4" in leak and "good-train.mp4" in leak
    table = read_table(tmp_path / "table.csv")
    assert len(table) == 8  # two names are there twice, once a class
    assert {name for name, row in table.items() if row["ok"] == "False"} == {
        Path(path).name for path in reasons
    }
    assert all(row["error"] for row in table.values() if row["ok"] == "False")


def test_check_decodes_a_video_of_several_rows_once(vidtrain, videos, tmp_path):
    table = tmp_path / "rows.csv"
    lines = [f"train/apple/0.mp4,[/b]|zebra,train,0,0.{end}" for end in range(1, 4)]
    lines += ["train/zebra/1.mp4,zebra,test,0,0.2"]
    table.write_text("\n".join(["path,label,split,start,end", *lines]))
    options = [f"data.root={videos}", f"data.annotations={table}", "data.multi_label=true"]
    result = vidtrain("data", "action=check", *SMALL, *options, "data.val_fraction=0")
    assert result.code == 0, result.err
    assert "2 of 2 files are sound" in result.out
    result = vidtrain("data", "action=stats", *SMALL, *options, "data.val_fraction=0")
    assert result.code == 0, result.err
    assert "4 videos, 2 classes" in result.out
    assert cells(result.out, "[/b]") == ["3", "0"]
    assert cells(result.out, "zebra") == ["3", "1"]


def test_stats_counts_classes_and_measures_files(vidtrain, videos):
    (videos / "train" / "apple").rename(videos / "train" / "[bold]x")
    (videos / "train" / "zebra").rename(videos / "train" / ":car: [a]")
    (videos / "train" / "[bold]x" / "0.mp4").write_bytes(b"")
    options = [f"data.root={videos}", "data.name='[red]mine'"]
    result = vidtrain("data", "action=stats", *SMALL, *options)
    assert result.code == 0, result.err
    assert "[red]mine: 36 videos, 5 classes" in result.out
    splits = cells(result.out, "class")
    assert sorted(splits) == ["test", "train", "val"]
    by_split = dict(zip(splits, cells(result.out, "[bold]x"), strict=True))
    assert by_split == {"train": "8", "val": "0", "test": "0"}
    assert cells(result.out, ":car: [a]") == cells(result.out, "[bold]x")
    assert cells(result.out, "frames per second") == ["24.0 (100%)"]
    assert cells(result.out, "width x height") == ["64x48 (100%)"]
    assert cells(result.out, "cannot be opened") == ["1"]
    assert "0.42 to 0.71" in result.out  # 10 to 17 frames
    one = vidtrain("data", "action=stats", *SMALL, *options, "split=test")
    assert cells(one.out, "class") == ["test"] and cells(one.out, "apple") == ["2"]


def test_stats_of_videos_without_labels(vidtrain, videos, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text(
        "path,label,split\ntrain/apple/0.mp4,apple,train\ntrain/zebra/0.mp4,zebra,train\n"
        "test/apple/0.mp4,,test\n"
    )
    result = vidtrain(
        "data", "action=stats", *SMALL, f"data.root={videos}", f"data.annotations={table}"
    )
    assert result.code == 0, result.err
    assert "3 videos, 2 classes" in result.out
    assert "of 3 videos" in result.out


def test_show_draws_what_the_model_gets(vidtrain, videos, tmp_path):
    (videos / "test" / "apple" / "0.mp4").write_bytes(b"")
    line = ["data", "action=show", *SMALL, f"data.root={videos}", "data.workers=0"]
    result = vidtrain(*line, "split=test", "clips=6", "output=sheet.png")
    assert result.code == 0, result.err
    assert "skipped " in result.out and "empty" in result.out
    assert "5 clips of 2 frames, 32 x 32, in sheet.png" in result.out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert 100 < sheet.width <= 1600 and sheet.height > 5 * 32
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3).astype(int)
    for color in ((252, 0, 0), (0, 252, 0), (0, 0, 252)):  # apples, pears, zebras
        assert (abs(pixels - color).max(axis=1) < 20).sum() >= 2 * 32 * 32
    training = vidtrain(*line, "clips=2")
    assert training.code == 0, training.err
    assert (tmp_path / "folder-train.png").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["action=stats", "split=tset"], "has no 'tset' split; it has"),
        (["action=chek"], "did you mean 'check'"),
        (["action=show", "clips=0"], "clips is 0; it must be a whole number, at least 1"),
        (["action=check", "time_limit=0"], "time_limit is 0"),
        (["action=check", "time_limit=soon"], "time_limit is 'soon'"),
        (["action=check", "output=nowhere/table.csv"], "there is no folder nowhere"),
        (["action=show", "output=."], "is a folder"),
        (["action=resize"], "output is not set; add output=FOLDER"),
        (["action=resize", "output=a", "resize.short_side=0"], "resize.short_side is 0"),
        (["action=resize", "output=a", "resize.time_limit=0"], "resize.time_limit is 0"),
    ],
)
def test_a_mistake_is_one_line(vidtrain, tiny_dataset, words, message):
    result = vidtrain("data", *words, *SMALL, f"data.root={tiny_dataset}")
    assert result.code == 2
    assert message in result.err and len(result.err.splitlines()) == 1


def test_a_packed_set_trains_tests_and_is_checked_from_a_url(vidtrain, tiny_dataset, tmp_path):
    import fsspec

    source = ("data=folder", f"data.root={tiny_dataset}")
    packed = vidtrain("data", "action=pack", *source, f"output={tmp_path / 'packed'}")
    assert packed.code == 0, packed.err
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path / 'packed'}/", "memory://clips/", recursive=True)
    try:
        data = ("data=packed", "data.root=memory://clips")
        small = ("model=toy_3d_cnn", "clip.size=16", "clip.num_frames=4", "data.workers=1")
        out = vidtrain(
            "train", *data, *small, "trainer=cpu", "trainer.max_epochs=1", "logger=none",
            "views.clips=2", "views.crops=1", "test=true", "paths.runs=runs",
        )  # fmt: skip
        assert out.code == 0, out.err
        assert "on 6 of 6 videos" in out.out
        (page,) = (tmp_path / "runs").glob("*/*/report.html")
        with page.with_name("predictions.csv").open(newline="") as file:
            wrong = sum(row["label"] != row["top1"] for row in csv.DictReader(file))
        assert wrong and page.read_text().count("<img ") == wrong  # three classes, one epoch
        checked = vidtrain("data", "action=check", *data)
        assert checked.code == 0 and "36 of 36 files are sound" in checked.out, checked.out
        assert "64x48 (100%)" in vidtrain("data", "action=stats", *data).out
        shown = vidtrain("data", "action=show", *data, *small, "clips=2")
        assert shown.code == 0, shown.err
    finally:
        store.rm("/clips", recursive=True)


def test_a_resized_set_trains(vidtrain, videos, tmp_path):
    (videos / "train" / "zebra" / "0.mp4").write_bytes(b"")
    words = ["data", "action=resize", "data=folder", f"data.root={videos}", "data.workers=2"]
    words += ["output=small", "resize.short_side=32"]
    result = vidtrain(*words)
    assert result.code == 1, result.err
    assert "unusable: train/zebra/0.mp4: empty file (0 bytes)" in result.out
    assert "35 videos made, 0 there before, 1 unusable" in result.out
    assert "to use them: data=folder data.root=small" in result.out
    assert "measured on 16 of 35 files" in result.out
    assert cells(result.out, "files") == ["35", "35", ""]
    before, after, share = cells(result.out, "MB")
    assert float(share.split()[0]) == pytest.approx(float(after) / float(before), rel=0.5)
    assert cells(result.out, "clips/s")[2].endswith("x")
    write_video(videos / "train" / "zebra" / "0.mp4", 12, size=(64, 48))
    result = vidtrain(*words)
    assert result.code == 0, result.err
    assert "1 videos made, 35 there before, 0 unusable" in result.out
    small = ("data=folder", "data.root=small", "data.workers=1")
    assert "64x48" not in vidtrain("data", "action=stats", *small).out
    trained = vidtrain(
        "train", "model=toy_3d_cnn", "clip.size=16", "clip.num_frames=4", *small, "trainer=cpu",
        "trainer.max_epochs=1", "logger=none", "views.clips=2", "views.crops=1", "test=true",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    assert "on 6 of 6 videos" in trained.out


def test_a_resized_set_is_read_by_its_own_annotations(vidtrain, tmp_path):
    root = tmp_path / "ucf"
    lists = {"trainlist01.txt": "Run/v_Run_g02_c01.avi 1\nSit/v_Sit_g02_c01.avi 2\n"}
    lists |= {"testlist01.txt": "Run/v_Run_g01_c01.avi\n", "classInd.txt": "1 Run\n2 Sit\n"}
    (root / "ucfTrainTestlist").mkdir(parents=True)
    for name, text in lists.items():
        (root / "ucfTrainTestlist" / name).write_text(text)
    for name in ("Run/v_Run_g01_c01", "Run/v_Run_g02_c01", "Sit/v_Sit_g02_c01"):
        (root / "UCF-101" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / "UCF-101" / f"{name}.avi", 20, codec="mpeg4", fps=25)
    ucf = ("data=ucf101", "data.num_classes=2", "data.workers=2")
    result = vidtrain("data", "action=resize", *ucf, f"data.root={root}", "output=small")
    assert result.code == 0, result.err
    assert "or this dataset's own config with data.root=small" in result.out
    found = vidtrain("data", "action=prepare", *ucf, "data.root=small")
    assert "ucf101: 3 rows, 2 classes" in found.out, found.err
    assert cells(found.out, "train")[0] == "2" and cells(found.out, "test")[0] == "1"
    found = vidtrain("data", "action=prepare", "data=folder", "data.root=small")
    assert "folder: 3 rows, 2 classes" in found.out, found.err
