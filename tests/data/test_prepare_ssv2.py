from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidtrain.data.prepare.ssv2 import prepare
from vidtrain.types import UserError

# Numbers are text, and neither in the order of the file nor of the alphabet.
LABELS = {
    "Holding something next to something": "1",
    "Pushing something from left to right": "0",
    "Putting something, something and something on the table": "2",
}
TRAIN = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "7", "label": "..", "template": "Pushing [something] from left to right"},
    {"id": "8", "template": "Putting [something], [something] and [something] on the table"},
]
VALIDATION = [{"id": "100", "template": "Pushing [something] from left to right"}]
TEST = [{"id": "1420"}]


def lay_out(root: Path, folder: str = "labels", prefix: str = "", ending: str = "webm") -> None:
    parts = {"labels": LABELS, "train": TRAIN, "validation": VALIDATION, "test": TEST}
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, content in parts.items():
        (root / folder / f"{prefix}{name}.json").write_text(json.dumps(content))
    videos = root / "20bn-something-something-v2"
    videos.mkdir(exist_ok=True)
    for number in (7, 78687, 8, 100, 1420):
        (videos / f"{number}.{ending}").touch()


@pytest.mark.parametrize(
    ("folder", "prefix"), [("labels", ""), ("", "something-something-v2-"), ("annotations", "")]
)
@pytest.mark.parametrize("ending", ["webm", "mp4"])
def test_templates_and_numbers(tmp_path: Path, folder: str, prefix: str, ending: str) -> None:
    lay_out(tmp_path, folder, prefix, ending)
    found = prepare(tmp_path, num_classes=3)
    assert found.label_names == [name for name, _ in sorted(LABELS.items(), key=lambda i: i[1])]
    top = "20bn-something-something-v2"
    assert found.rows.to_pydict() == {
        "path": [f"{top}/{n}.{ending}" for n in (78687, 7, 8, 100, 1420)],
        "labels": [[1], [0], [2], [0], []],
        "split": ["train", "train", "train", "val", "test"],
    }
    assert found.official == {"train": 168_913, "val": 24_777, "test": 27_157}


def test_missing_videos_and_a_missing_split(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "labels" / "test.json").unlink()
    (tmp_path / "20bn-something-something-v2" / "7.webm").unlink()
    found = prepare(tmp_path, num_classes=3)
    assert set(found.official) == {"train", "val"}
    assert found.rows.num_rows == 3
    assert any("1 of 4 rows" in note for note in found.notes)


def test_what_cannot_work_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.json .*Something-Something v2 page"):
        prepare(tmp_path, num_classes=174)
    lay_out(tmp_path)
    with pytest.raises(UserError, match=r"3 classes, but data\.num_classes is 174"):
        prepare(tmp_path, num_classes=174)
    train, labels = tmp_path / "labels" / "train.json", tmp_path / "labels" / "labels.json"
    cases = {
        '[{"id": "1", "template": "Eating [something]"}]': "'Eating something' of video 1",
        '[{"template": "x"}]': "is not a list",
        "{": "is not JSON",
    }
    for text, message in cases.items():
        train.write_text(text)
        with pytest.raises(UserError, match=message):
            prepare(tmp_path, num_classes=3)
    for text in ('["a"]', '{"a": "x"}', '{"a": "1", "b": "2"}'):
        labels.write_text(text)
        with pytest.raises(UserError, match=r"labels\.json"):
            prepare(tmp_path, num_classes=3)
    labels.write_text(json.dumps(LABELS))
    for name in ("train", "validation", "test"):
        (tmp_path / "labels" / f"{name}.json").unlink()
    with pytest.raises(UserError, match=r"train\.json, validation\.json and test\.json"):
        prepare(tmp_path, num_classes=3)
