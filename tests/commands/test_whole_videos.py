"""A test that looks at other frames than training did: as many as it likes, spread over the whole video."""

import csv
import json

import numpy as np
import pytest
from make_video import read_numbers, write_video
from omegaconf import open_dict
from tiny import TINY_RUN

from vidtrain import build

WHOLE = ["views.num_frames=7", "views.sampling=segments", "views.clips=1", "views.crops=1"]
NARROW_VTN = [
    "model=vtn_base",
    "+model.dim=24",
    "+model.depth=1",
    "+model.heads=3",
    "+model.patch=8",
]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A set whose videos, of 40 frames at 20 per second, show their frames' numbers."""
    root = tmp_path_factory.mktemp("numbered")
    for split in ("train", "val", "test"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True)
            path = root / split / label / "0.mp4"
            write_video(path, num_frames=40, fps=20, size=(96, 96), pattern="flat")
    return root


@pytest.fixture
def data_of(compose, numbered, tmp_path):
    """Build the data of a run: `data_of("views.clips=1")`."""

    def make(*words, without=()):
        cfg = compose(
            "train",
            *TINY_RUN,
            "clip.num_frames=4",
            "clip.stride=3",
            "clip.size=96",
            f"data.root={numbered}",
            f"paths.cache={tmp_path}",
            *words,
        )
        with open_dict(cfg):
            for key in without:
                del cfg.views[key]
        return build.data(cfg)

    return make


def seen(dataset):
    """Read the numbers of the frames that come out of its first row, sorted, each once."""
    return read_numbers(dataset[0, 0]["frames"], "flat")


def test_frames_of_a_test_by_their_numbers(data_of):
    middle = [15, 18, 21, 24]
    segments = [2, 8, 14, 20, 25, 31, 37]  # the middles of seven stretches of 40 / 7
    data = data_of(*WHOLE)
    assert seen(data.dataset("test", test_views=True)) == segments
    assert seen(data.dataset("val")) == middle  # validation looks as training does
    drawn = [data.dataset("train", training=True)[0, seed]["video"][0] for seed in range(9)]
    clips = np.array([read_numbers(frames, "flat") for frames in drawn])
    assert clips.shape == (9, 4) and (np.diff(clips) == 3).all()

    one = ["views.clips=1", "views.crops=1"]
    assert seen(data_of(*one).dataset("test", test_views=True)) == middle
    more = data_of(*one, "views.num_frames=6")
    assert seen(more.dataset("test", test_views=True)) == [12, 15, 18, 21, 24, 27]
    spread = data_of(*one, "views.sampling=segments")
    assert seen(spread.dataset("test", test_views=True)) == [5, 15, 25, 35]
    back = data_of(*one, "data.sampling=segments", "views.sampling=random")
    assert seen(back.dataset("test", test_views=True)) == middle
    assert seen(back.dataset("val")) == [5, 15, 25, 35]


def test_frames_of_checkpoints_that_do_not_know_these_keys(data_of):
    data = data_of("views.clips=1", "views.crops=1", without=("num_frames", "sampling"))
    assert seen(data.dataset("test", test_views=True)) == [15, 18, 21, 24]


def test_whole_videos_through_the_command_line(vidtrain, tiny_dataset, tmp_path):
    words = [*TINY_RUN, *NARROW_VTN, "clip.fps=null", f"data.root={tiny_dataset}"]
    words = [
        word for word in words if word not in ("model=late_fusion_pool", "model.backbone=small")
    ]
    done = vidtrain("train", *words, "trainer.max_epochs=1", *WHOLE, "test=true")
    assert done.code == 0, done.err
    (run,) = tmp_path.glob("runs/*/*")
    report = json.loads((run / "report.json").read_text())
    shape = report["protocol"]
    assert (shape["frames"], shape["sampling"], shape["clips"]) == (7, "segments", 1)
    assert shape["fps"] == [15.27, 16.8]  # 7 of 11 and of 10 frames, at 24 per second
    assert "7 frames over the whole video, 1 clips x 1 crops of 32" in done.out
    assert "A clip is 7 frames, spread over the whole video" in (run / "report.html").read_text()

    done = vidtrain(
        "test",
        f"ckpt={run}",
        "trainer=cpu",
        "output=as",
        "views.num_frames=null",
        "views.sampling=null",
    )
    assert done.code == 0 and "2 frames x 2, 1 clips" in done.out, done.err
    done = vidtrain("test", f"ckpt={run}", "trainer=cpu", "output=again", *WHOLE)
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["metrics"] == pytest.approx(report["metrics"])

    file = next((tiny_dataset / "test").glob("*/*.mp4"))
    scores = {}
    for name, frames in (("whole", 7), ("other", 3)):
        done = vidtrain(
            "predict",
            f"ckpt={run}",
            f"input={file}",
            "device=cpu",
            "workers=0",
            f"output={name}",
            f"views.num_frames={frames}",
        )
        assert done.code == 0, done.err
        (line,) = (tmp_path / name).read_text().splitlines()
        scores[name] = {p["label"]: p["score"] for p in json.loads(line)["predictions"]}
    with (tmp_path / "again" / "predictions.csv").open(newline="") as rows:
        (row,) = (r for r in csv.DictReader(rows) if str(file).endswith(r["path"]))
    tested = {row[f"top{k}"]: float(row[f"top{k}_score"]) for k in (1, 2, 3)}
    assert scores["whole"] == pytest.approx(tested, abs=2e-6)
    assert scores["other"] != pytest.approx(tested, abs=2e-6)

    for verb in ("test", "predict"):
        for word, said in (
            ("views.num_frames=0", "views.num_frames is 0; it must be a whole number, at least 1"),
            ("views.num_frames=all", "views.num_frames is 'all'; it must be a whole number"),
            ("views.sampling=evenly", "views.sampling is 'evenly'; it is random, segments or null"),
            ("views.num_frames=287", "knows 286 positions and got a clip of 287 frames"),
        ):
            more = {
                "test": ["trainer=cpu"],
                "predict": [f"input={file}", "device=cpu", "workers=0"],
            }
            done = vidtrain(verb, f"ckpt={run}", *more[verb], word)
            assert done.code == 2 and said in done.err, (verb, word, done.err)
            lines = [x for x in done.err.strip().splitlines() if "%" not in x]  # but the bar
            assert len(lines) == 1, done.err
    done = vidtrain("train", *words, "views.num_frames=true")
    assert done.code == 2 and "views.num_frames is True" in done.err
