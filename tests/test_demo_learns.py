"""The built-in videos do what they are for: motion alone tells the class."""

import csv
import json

import pytest

pytestmark = pytest.mark.slow

REVERSE = {
    **{"left": "right", "up": "down", "grow": "shrink", "clockwise": "counterclockwise"},
    **{"right": "left", "down": "up", "shrink": "grow", "counterclockwise": "clockwise"},
}


@pytest.fixture
def tested(vidtrain, tmp_path):
    """Train on the demo videos with its recipe and give the report and the predictions."""

    def run(*overrides: str):
        result = vidtrain("train", "experiment=demo", "logger=none", *overrides)
        assert result.code == 0, result.err
        (folder,) = tmp_path.glob("runs/*/*")
        with (folder / "predictions.csv").open() as file:
            return json.loads((folder / "report.json").read_text()), list(csv.DictReader(file))

    return run


def test_a_small_3d_cnn_learns_them(tested):
    report, rows = tested()
    assert report["metrics"]["test/top1"] >= 0.95
    assert report["videos"]["scored"] == report["videos"]["asked"] == len(rows) == 128
    assert report["protocol"]["clips"] == 3 and report["protocol"]["crops"] == 3


def test_a_single_frame_says_next_to_nothing(tested):
    report, _ = tested(
        "model=single_frame", "model.backbone=small", "clip.num_frames=1", "clip.size=56",
        "views.clips=10",
    )  # fmt: skip
    assert report["metrics"]["test/top1"] <= 0.25  # chance is 0.125


def test_late_fusion_with_pooling_cannot_tell_a_motion_from_its_reverse(tested):
    _, rows = tested(
        "model=late_fusion_pool", "model.backbone=small", "clip.num_frames=16", "clip.stride=2",
        "clip.size=56",
    )  # fmt: skip
    pairs = [row for row in rows if row["top1"] in (row["label"], REVERSE[row["label"]])]
    right = sum(row["top1"] == row["label"] for row in pairs)
    assert len(pairs) >= 10
    # Half, give or take three standard deviations of that many coin throws.
    assert abs(right / len(pairs) - 0.5) <= 1.5 / len(pairs) ** 0.5
