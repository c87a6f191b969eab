from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vidtrain.commands.report import read_curves, write_report
from vidtrain.types import UserError
from vidtrain.visualize.charts import Point, as_json, heat_map, line_chart, ticks
from vidtrain.visualize.clips import write_mp4
from vidtrain.visualize.page import Prediction, confusion, interval

ODD = ["massaging person's head", "<b>bold</b>", '</script><script>alert("1")</script>', "a & b"]
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser would make of the page: elements, tables, text; every tag must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.words.append(data)
        if "table" in self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += data

    def table(self, head: str) -> list[list[str]]:
        """Rows of the first table that has this word in its first row."""
        return next(table for table in self.tables if table and head in " ".join(table[0]))

    def sources(self) -> list[str]:
        keys = ("src", "href", "srcset")
        return [a[key] for _, a in self.elements for key in keys if a.get(key)]


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def run(folder: Path, names: list[str], answers: list[tuple], **changes) -> Path:
    """Make a run folder. An answer is (true label, said label, score[, path])."""
    rows = []
    for i, (true, said, score, *path) in enumerate(answers):
        rows.append({"path": path[0] if path else f"{i}.mp4", "label": true})
        others = [name for name in names if name != said][:4]
        for k, name in enumerate([said, *others], 1):
            rows[-1] |= {f"top{k}": name, f"top{k}_score": score if k == 1 else (1 - score) / 4}
    write_csv(folder / "predictions.csv", rows)
    right = sum(true == said for true, said, *_ in answers)
    report = {
        "vidtrain": "0.1.0",
        "verb": "test",
        "created": "2026-11-20 10:00",
        "command": "vidtrain test ckpt='a <b>.ckpt'",
        "model": "c3d",
        "data": "demo",
        "split": "test",
        "ckpt": "runs/a/best.ckpt",
        "params": 78_009_445,
        "metrics": {"test/top1": right / len(answers), "test/clip_top1": 0.25, "test/loss": 1.5},
        "protocol": {
            "frames": 16,
            "stride": 2,
            "clips": 10,
            "crops": 3,
            "size": 112,
            "short_side": 128,
            "fps": 15.0,
        },
        "videos": {"asked": len(answers), "scored": len(answers), "failed": []},
        "label_names": names,
        "multi_label": False,
        "fingerprint": "9f2c",
        "data_root": str(folder),
    }
    (folder / "report.json").write_text(json.dumps(report | changes))
    return folder


def page(folder: Path) -> Page:
    written = write_report(folder)
    assert written == folder / "report.html"
    return Page(written.read_text(encoding="utf-8"))


def test_scores_are_told_with_what_they_rest_on(tmp_path):
    answers = [("up", "up", 0.9)] * 3 + [("down", "up", 0.6)]
    failed = [{"path": "x/<odd>.mp4", "reason": "moov atom not found"}]
    videos = {"asked": 1005, "scored": 4, "failed": failed}
    shown = page(run(tmp_path, ["up", "down"], answers, videos=videos))
    assert "75.0% top-1 accuracy on 4 of 1,005 videos" in shown.text
    low, high = interval(0.75, 4)
    assert f"95% interval {100 * low:.1f}% to {100 * high:.1f}%" in shown.text
    assert "Always answering up , the most frequent class, would score 75.0%" in shown.text
    assert "top-1 of a single view 25.0%" in shown.text
    assert "test/loss 1.5" in shown.text
    assert shown.table("Reason")[1] == ["x/<odd>.mp4", "moov atom not found"]
    assert "78.0 M parameters" in shown.text and "vidtrain test ckpt='a <b>.ckpt'" in shown.text


def test_the_interval_is_wilsons():
    assert interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval(1.0, 20)[1] == 1.0
    assert interval(0.0, 20)[0] == 0.0


def test_the_protocol_stands_in_words_and_as_a_table(tmp_path):
    shown = page(run(tmp_path, ["a", "b"], [("a", "a", 0.9)]))
    assert (
        "Each video is seen 30 times: 10 clips spread over its length, 3 crops of each; the scores "
        "of these views are averaged. A clip is 16 frames, 2 apart (15 frames per second), scaled "
        "to 128 pixels on the shorter side and cropped to 112 × 112 pixels."
    ) in shown.text
    rows = dict(shown.table("Clip"))
    assert rows["Clip"] == "16 frames, every 2nd" and rows["Crops per clip"] == "3"
    protocol = {"frames": 1, "stride": 1, "clips": 1, "crops": 1, "size": 64, "fps": [12.5, 30]}
    shown = page(run(tmp_path, ["a", "b"], [("a", "a", 0.9)], protocol=protocol))
    assert "Each video is seen once: one clip, one crop. A clip is 1 frame, cropped" in shown.text
    assert dict(shown.table("Clip"))["Effective rate"] == "12.5 to 30 frames per second"


def test_nothing_is_fetched_and_nothing_escapes(tmp_path):
    answers = [(true, said, 0.9) for true in ODD for said in ODD]
    (tmp_path / "config.yaml").write_text("name: </code></pre><script>alert(2)</script>\n")
    changes = {"model": ODD[2], "command": ODD[2], "data": ODD[1]}
    shown = page(run(tmp_path, ODD, answers, **changes))
    assert all(source.startswith("data:") for source in shown.sources())
    scripts = [attrs for tag, attrs in shown.elements if tag == "script"]
    assert scripts == [{}]  # ours; what the labels hold became text
    assert not [tag for tag, _ in shown.elements if tag == "b"]
    for name in ODD:
        assert name in shown.text
    assert "</code></pre><script>alert(2)</script>" in shown.text
    policy = next(a["content"] for _, a in shown.elements if a.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_accuracy_per_class_is_sorted_and_counted(tmp_path):
    names = ["a", "b", "c", "absent"]
    answers = [("a", "a", 0.9)] * 3 + [("a", "b", 0.5)] + [("b", "c", 0.5)] * 2 + [("c", "c", 0.9)]
    shown = page(run(tmp_path, names, answers))
    assert shown.table("Accuracy")[1:] == [
        ["b", "", "0.0%", "2", "c (2)"],
        ["a", "", "75.0%", "4", "b (1)"],
        ["c", "", "100%", "1", ""],
    ]
    assert f"Mean over 3 classes: {100 * 1.75 / 3:.1f}%" in shown.text
    assert "No video was scored of 1 further class" in shown.text


def test_a_small_confusion_matrix_is_a_table(tmp_path):
    answers = [("a", "a", 0.9)] * 3 + [("a", "b", 0.5)] + [("b", "a", 0.5)]
    shown = page(run(tmp_path, ["a", "b"], answers))
    matrix = next(t for t in shown.tables if t[0] == ["", "a", "b"])
    assert matrix[1:] == [["a", "3", "1"], ["b", "1", ""]]
    counts = confusion([Prediction("x", ("b",), (("a", 0.5),))], ["a", "b"])
    assert counts.tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("classes", [2, 8, 40, 41, 101, 400, 700])
def test_any_number_of_classes_makes_a_page(tmp_path, classes):
    names = [f"class {k}" for k in range(classes)]
    answers = [(name, name, 0.9) for name in names] * 2
    answers += [(names[0], names[1], 0.8, "none.mp4")] * 3
    shown = page(run(tmp_path, names, answers))
    if classes <= 40:
        assert len(shown.table("class 0")) == classes + 1
        return
    assert shown.table("Predicted")[1:] == [["class 0", "class 1", "3", "60.0%"]]
    uri = next(s for s in shown.sources() if s.startswith("data:image/png"))
    image = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert image.size == (classes, classes)
    alpha = np.array(image)[..., 3]
    assert np.count_nonzero(alpha) == classes + 1 and alpha[0, 1] > alpha[0, 0] > 0


def test_right_and_wrong_cells_of_the_map_have_their_own_colours():
    pixels = np.array(Image.open(io.BytesIO(heat_map(np.array([[3, 1], [0, 0]])))))
    assert tuple(pixels[0, 0, :3]) != tuple(pixels[0, 1, :3])
    assert pixels[0, 0, 3] > pixels[0, 1, 3] > 0 and pixels[1].sum(axis=1)[0] >= 0
    assert pixels[1, 0, 3] == pixels[1, 1, 3] == 0


def charts(shown: Page) -> dict[str, str]:
    labels = [a["aria-label"] for tag, a in shown.elements if tag == "svg" and a.get("aria-label")]
    return {label.partition(":")[0]: label for label in labels}


def test_curves_go_on_over_a_resume(tmp_path):
    def attempt(name: str, steps: range, loss: float) -> None:
        rows = [{"step": s, "epoch": s // 10, "train/loss": loss, "val/top1": ""} for s in steps]
        rows.append({"step": steps[-1], "epoch": 1, "train/loss": "", "val/top1": loss / 10})
        write_csv(tmp_path / name, rows)

    attempt("metrics.2.csv", range(6, 14), 2.0)  # went back to step 6
    attempt("metrics.10.csv", range(10, 16), 3.0)
    attempt("metrics.1.csv", range(0, 10), 1.0)
    attempt("metrics.csv", range(14, 18), 4.0)
    curves = read_curves(tmp_path)
    assert [(p.step, p.value) for p in curves["train/loss"]] == [
        *((s, 1.0) for s in range(0, 6)),
        *((s, 2.0) for s in range(6, 10)),
        *((s, 3.0) for s in range(10, 14)),
        *((s, 4.0) for s in range(14, 18)),
    ]
    assert [(p.step, p.value, p.epoch) for p in curves["val/top1"]] == [(17, 0.4, 1)]
    shown = page(run(tmp_path, ["a", "b"], [("a", "a", 0.9)]))
    assert charts(shown)["Loss"].endswith("from 1.000 at step 0 to 4.000 at step 17")
    assert charts(shown)["Accuracy"].endswith("from 40.0% at step 17 to 40.0% at step 17")


def test_a_test_after_training_undoes_no_curve(tmp_path):
    write_csv(
        tmp_path / "metrics.1.csv", [{"step": s, "epoch": 0, "train/loss": 1} for s in (1, 2)]
    )
    write_csv(tmp_path / "metrics.csv", [{"step": 0, "epoch": 0, "test/top1": 0.5}])
    assert [p.step for p in read_curves(tmp_path)["train/loss"]] == [1, 2]


def test_odd_rows_of_a_log_are_borne(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,lr-SGD,step,train/loss\n0,0.1,0,1.5\n0,,1,nan\n0,,2,inf\n0,,3,0.5\n0,,4\n0,,fi"
    )
    shown = page(run(tmp_path, ["a", "b"], [("a", "a", 0.9)]))
    assert charts(shown)["Loss"].endswith("from 1.500 at step 0 to 0.500 at step 3")
    assert "train/loss was not finite at 2 of its points" in shown.text
    assert set(charts(shown)) == {"Loss", "Learning rate"}


def test_without_a_log_there_are_no_curves(tmp_path):
    shown = page(run(tmp_path, ["a", "b"], [("a", "a", 0.9)]))
    assert "Training" not in shown.text and not charts(shown)


def test_a_test_in_its_own_folder_shows_the_curves_of_its_run(tmp_path):
    trained, tested = tmp_path / "trained", tmp_path / "tested"
    trained.mkdir()
    tested.mkdir()
    write_csv(trained / "metrics.csv", [{"step": 3, "epoch": 0, "train/loss": 0.5}])
    (trained / "config.yaml").write_text("seed: 77\n")
    run(tested, ["a", "b"], [("a", "a", 0.9)], ckpt=str(trained / "checkpoints" / "best.ckpt"))
    shown = page(tested)
    assert set(charts(shown)) == {"Loss"} and "seed: 77" in shown.text


def test_groups_with_one_learning_rate_are_one_line(tmp_path):
    rows = [
        {"step": s, "epoch": 0, "lr-SGD/pg1": 0.1, "lr-SGD/pg2": 0.1, "lr-SGD/pg3": 0.2 * s}
        for s in (1, 2)
    ]
    write_csv(tmp_path / "metrics.csv", rows)
    shown = page(run(tmp_path, ["a", "b"], [("a", "a", 0.9)]))
    label = charts(shown)["Learning rate"]
    assert "pg1" in label and "pg2" not in label and "pg3" in label


def test_a_long_line_is_thinned_and_its_numbers_lie_beside_it():
    points = [Point(step, float(step), step // 100) for step in range(10_000)]
    figure = line_chart("Loss", {"train/loss": points, "empty": [Point(0, math.nan)]})
    (data,) = re.findall(r"<script[^>]*>(.*?)</script>", figure)
    (line,) = json.loads(data)
    assert len(line) <= 240
    x, _, step, value, epoch = line[-1]
    assert (x, step, epoch) == (350, 9999, 99)
    assert float(value.replace(",", "")) == pytest.approx(
        9978.5, abs=20
    )  # a mean over the last steps
    assert line_chart("Loss", {"empty": [Point(0, math.inf)]}) == ""


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.5, 3e4, -2.0])
def test_a_line_of_one_number_can_be_drawn(value):
    for points in ([Point(5, value)], [Point(5, value), Point(9, value)]):
        figure = line_chart("lr", {"lr-SGD": points})
        numbers = [float(n) for n in re.findall(r'c[xy]="([^"]*)"', figure)]
        assert len(numbers) == 2 * len(points) and all(0 <= n <= 360 for n in numbers)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.3), (0, 6.93), (-1, 3), (0, 1e6), (0, 0)])
def test_ticks_cover_the_numbers(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9
    assert ticks(3, 4, 5, whole=True) == [3, 4]


def test_json_cannot_end_its_script():
    assert "<" not in as_json(ODD) and json.loads(as_json(ODD)) == ODD


def video(path: Path) -> None:
    frames = torch.arange(40, dtype=torch.uint8).mul(6).view(40, 1, 1, 1).expand(40, 3, 48, 64)
    write_mp4(frames, 20, path)


def test_worst_errors_move(tmp_path):
    video(tmp_path / "mistaken.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    answers = [("a", "a", 0.99, "right.mp4"), ("a", "b", 0.4, "mistaken.mp4")]
    answers += [("a", "b", 0.9, "broken.mp4"), ("a", "b", 0.8, "gone.mp4")]
    answers += [("a", "b", 0.3, "gone.mp4")] * 20
    shown = page(run(tmp_path, ["a", "b"], answers))
    cards = [a for tag, a in shown.elements if tag == "article"]
    assert len(cards) == 12 and "23 of 24 first answers were wrong" in shown.text
    order = [shown.text.index(f"said b {p}") for p in ("90.0%", "80.0%", "40.0%", "30.0%")]
    assert order == sorted(order)
    assert shown.text.count("No picture:") == 11

    (moving,) = [a for tag, a in shown.elements if tag == "img"]
    assert moving["alt"] == "mistaken.mp4: said b, is a"
    image = Image.open(io.BytesIO(base64.b64decode(moving["src"].split(",")[1])))
    assert image.size == (64, 48) and image.n_frames == 20  # two seconds, ten frames each
    brightness = []
    for i in range(image.n_frames):
        image.seek(i)
        image.load()
        brightness.append(float(np.array(image.convert("L")).mean()))
        assert image.info["duration"] == 100
    assert brightness == sorted(brightness) and brightness[-1] - brightness[0] > 150
    (still,) = [a for tag, a in shown.elements if tag == "source"]
    assert "prefers-reduced-motion" in still["media"]
    image = Image.open(io.BytesIO(base64.b64decode(still["srcset"].split(",")[1])))
    assert image.format == "JPEG" and image.size == (64, 48)


def test_no_error_is_worth_a_word(tmp_path):
    shown = page(run(tmp_path, ["a", "b"], [("a", "a", 0.9)]))
    assert "every first answer was right" in shown.text


def test_many_labels_have_average_precision_or_a_word(tmp_path):
    answers = [("a|b", "a", 0.9), ("b|c", "a", 0.8), ("c", "c", 0.7)]
    changes = {"multi_label": True, "metrics": {"test/mAP": 0.613}}
    folder = run(tmp_path, ["a", "b", "c"], answers, **changes)
    shown = page(folder)
    assert "61.3% mean average precision on 3 of 3 videos" in shown.text
    assert "there is no confusion matrix" in shown.text
    assert "1 of 3 first answers were wrong" in shown.text and "is b " in shown.text

    precision = {"a": 0.5, "b": 0.25, "c": None}
    shown = page(run(tmp_path, ["a", "b", "c"], answers, class_ap=precision, **changes))
    assert shown.table("Average precision")[1:] == [
        ["b", "", "25.0%", "2"],
        ["a", "", "50.0%", "1"],
    ]
    assert "Mean over 2 classes: 37.5%" in shown.text


def test_videos_without_labels_are_scored_by_nobody(tmp_path):
    answers = [("", "a", 0.9), ("", "b", 0.8)]
    shown = page(run(tmp_path, ["a", "b"], answers, metrics={}))
    assert "No score was logged" in shown.text
    assert "Accuracy per class" not in shown.text and "Worst" not in shown.text


def test_a_report_alone_is_enough(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    assert "model on data" in page(tmp_path).text


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"report\.json is not there"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"report\.json is not JSON"):
        write_report(tmp_path)
    run(tmp_path, ["a"], [("a", "a", 0.9)])
    (tmp_path / "predictions.csv").write_text("path,label,top1,top1_score\nx,a,a,0.5\ny,a,a,much\n")
    with pytest.raises(UserError, match=r"predictions\.csv, row 2"):
        write_report(tmp_path)
