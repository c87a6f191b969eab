"""`vidtrain report`: several runs side by side, from what lies in their folders."""

import csv
import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

LABELS = ["catch", "<b>dive</b>", "swim & walk"]


def write_run(folder: Path, model: str, right: int, *, tested: bool = True, **protocol) -> Path:
    """Write a run of three classes with four videos each, `right` of the first class's right."""
    folder.mkdir(parents=True)
    config = {
        "model": {"_target_": f"vidtrain.models.{model}.{model}"},
        "optim": {"lr": right / 100},
        "data": {"name": "pool", "root": "/data/pool"},
        "paths": {"runs": str(folder)},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    (folder / "metrics.csv").write_text(
        f"epoch,step,train/loss,val/top1\n0,9,2.0,0.25\n1,19,1.5,0.{right}5\n2,29,1.4,0.1\n"
    )
    if not tested:
        return folder
    answers = [
        (label, label if number < right or label != "catch" else LABELS[1])
        for label in LABELS
        for number in range(4)
    ]
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "top1", "top1_score"])
        writer.writerows([f"{i}.mp4", *answer, 0.9] for i, answer in enumerate(answers))
    shape = {"contents": "videos", "frames": 16, "stride": 2, "clips": 10, "crops": 3, "size": 112}
    report = {
        "model": model,
        "data": "pool",
        "split": "test",
        "params": 1_500_000,
        "metrics": {"test/top1": (8 + right) / 12, "test/top5": 1.0},
        "protocol": {**shape, "fps": 12.0, **protocol},
        "videos": {"asked": 12, "scored": 12, "failed": []},
        "label_names": LABELS,
        "fingerprint": "abc",
        "command": f"vidtrain train model={model}",
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def text_of(page: Path) -> str:
    """The page's words, without script and style."""
    text = re.sub(r"(?s)<(script|style)\b.*?</\1>", " ", page.read_text())
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def test_two_runs_side_by_side(vidtrain, tmp_path):
    a = write_run(tmp_path / "runs" / "c3d-pool" / "now", "c3d", 1)
    b = write_run(tmp_path / "runs" / "x3d-pool" / "now", "x3d", 3)
    done = vidtrain("report", a, b, "output=page.html")
    assert done.code == 0, done.err
    assert done.out == "report page.html\n"
    page = tmp_path / "page.html"
    html, said = page.read_text(), text_of(page)
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)""", html)  # nothing from elsewhere
    assert "2 runs side by side" in said and "All: pool." in said
    assert "c3d 0.01 1.5 M 25.0% 75.0%" in said and "x3d 0.03 1.5 M 35.0% 91.7%" in said
    assert "All runs were tested alike." in said and "Each video is seen 30 times" in said
    assert html.count("class='n best'") == 2  # best validation and best test
    charts = re.findall(r"<h3>(.*?)</h3>", html)
    assert charts == ["val/top1", "train/loss"]
    # The class in which they differ comes first; names of classes are not HTML.
    assert said.index("catch 25.0% 75.0%") < said.index("&lt;b&gt;dive&lt;/b&gt; 100% 100%")
    assert "<b>dive" not in html and "/data/pool" not in said
    assert "optim.lr 0.01 0.03" in said


def test_each_run_says_its_code_and_data(vidtrain, tmp_path):
    a = write_run(tmp_path / "runs" / "c3d-pool" / "now", "c3d", 1)
    b = write_run(tmp_path / "runs" / "x3d-pool" / "now", "x3d", 3, tested=False)
    code = {"vidtrain": "0.1.0", "commit": "1234567890abcdef", "dirty": False, "torch": "<2.11>"}
    report = json.loads((a / "report.json").read_text())
    (a / "report.json").write_text(json.dumps({**report, "code": code}))
    made = {"code": {**code, "dirty": True}, "dataset": {"fingerprint": "def"}}
    (b / "run.json").write_text(json.dumps(made))
    done = vidtrain("report", a, b, "output=page.html")
    assert done.code == 0, done.err
    said = text_of(tmp_path / "page.html")
    assert "They were not trained with the same code." in said
    first, second = said[said.index("Made from") :].split(str(b))
    assert "vidtrain 0.1.0; commit 1234567890ab; PyTorch &lt;2.11&gt;" in first
    assert "data with fingerprint abc" in first
    assert "commit 1234567890ab, changed since;" in second and "fingerprint def" in second
    (b / "run.json").write_text("torn")
    assert vidtrain("report", a, b, "output=page.html").code == 0
    assert "not trained with the same code" not in text_of(tmp_path / "page.html")


def test_what_makes_scores_incomparable_is_said_in_words(vidtrain, tmp_path):
    a = write_run(tmp_path / "a", "c3d", 2)
    b = write_run(tmp_path / "b", "c3d", 2, crops=1, frames=8)
    c = write_run(tmp_path / "c", "c3d", 2, tested=False)
    report = json.loads((b / "report.json").read_text())
    report["split"], report["videos"]["scored"] = "val", 11
    (b / "report.json").write_text(json.dumps(report))
    done = vidtrain("report", a, b, c)
    assert done.code == 0, done.err
    said = text_of(tmp_path / "report.html")
    assert "Not tested: c." in said
    assert "Not tested on the same videos (split: test in a, val in b)" in said
    assert "12 of 12 in a; 11 of 12 in b" in said
    assert "crops per clip: 3 in a, 1 in b" in said
    assert "they differ in frames." in said


def test_a_folder_of_runs_is_all_of_them(vidtrain, tmp_path):
    for number in (10, 2):
        run = write_run(tmp_path / "sweep" / f"{number}-c3d-pool", "c3d", 2, tested=number == 2)
        (run / "wandb" / "files").mkdir(parents=True)
        (run / "wandb" / "files" / "config.yaml").write_text("no: run\n")
    failed = tmp_path / "sweep" / "3-c3d-pool"
    failed.mkdir()
    (failed / "job.json").write_text('{"job": 3, "status": "failed", "error": "<too> big"}')
    done = vidtrain("report", tmp_path / "sweep")
    assert done.code == 0, done.err
    said = text_of(tmp_path / "sweep" / "report.html")
    assert "2 runs side by side" in said
    assert said.index("2-c3d-pool") < said.index("10-c3d-pool")
    assert "Job 3 of sweep failed: &lt;too&gt; big." in said


def test_one_run_has_its_own_page(vidtrain, tmp_path):
    run = write_run(tmp_path / "run", "c3d", 2)
    assert vidtrain("report", run).code == 0
    assert "Confusion matrix" in (run / "report.html").read_text()
    (run / "report.html").write_text("as the test wrote it")
    assert vidtrain("report", run, "output=copy.html").code == 0
    assert (tmp_path / "copy.html").read_text() == "as the test wrote it"
    bare = write_run(tmp_path / "bare", "c3d", 2, tested=False)  # has curves at least
    assert vidtrain("report", bare).code == 0
    assert "Not tested: c3d." in text_of(bare / "report.html")


def test_a_run_that_lacks_a_metric_keeps_its_colour_in_the_others(vidtrain, tmp_path):
    a, b = (write_run(tmp_path / name, "c3d", 2) for name in "ab")
    (a / "metrics.csv").write_text("epoch,step,val/top1\n0,9,0.5\n")
    assert vidtrain("report", a, b).code == 0
    html = (tmp_path / "report.html").read_text()
    loss = html[html.index("<h3>train/loss</h3>") :]
    assert re.search(r'line (s\d)"', loss)[1] == "s1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is not there"),
        (["full"], "full is no run and holds none"),
        (["full/file"], "full/file is a file"),
        (["ouput=x.html"], "cannot read 'ouput=x.html'"),
        (["output=x.html"], "no run is named"),
        (["torn"], "report.json is not JSON"),
    ],
)
def test_a_mistake_is_one_line(vidtrain, tmp_path, words, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "report.json").write_text('{"model": ')
    done = vidtrain("report", *words)
    assert done.code == 2 and said in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "report.html").exists()
