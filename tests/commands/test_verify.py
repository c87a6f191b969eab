"""`vidtrain verify`: a small checkpoint against a recipe of the test's own."""

import json
from pathlib import Path

import pytest

RECIPE = """# @package _global_
defaults:
  - override /model: late_fusion_pool
  - override /data: folder
  - override /optim: adamw_cosine
  - override /trainer: cpu
  - _self_
model: {{backbone: small}}
clip: {{num_frames: 2, stride: 2, size: 32}}
data: {{name: folder, batch_size: 4, workers: 0}}
optim: {{lr: 0.01}}
trainer: {{max_epochs: 4}}
views: {{clips: 2, crops: 1}}
test: true
published: {published}
"""


@pytest.fixture
def recipe(tmp_path):
    """Write `experiment=mine` with this `published`; gives back the words that find it."""

    def write(published: str, name: str = "mine") -> list[str]:
        folder = tmp_path / "own" / "experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(RECIPE.format(published=published))
        return ["--config-dir", str(tmp_path / "own")]

    return write


@pytest.fixture
def run(vidtrain, recipe, tiny_dataset, tmp_path) -> Path:
    words = recipe("{top1: 100.0, source: a paper, tolerance: 0.5}")
    root = f"data.root={tiny_dataset}"
    done = vidtrain("train", *words, "experiment=mine", root, "logger=csv", "test=false")
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs" / "late_fusion_pool-folder").iterdir()
    return folder


def verified(run: Path) -> dict:
    newest = max(run.glob("verify-*/verify.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_a_checkpoint_is_held_against_its_recipe(vidtrain, recipe, run):
    words = recipe("{top1: 99.8, source: a paper, tolerance: 0.5}")
    done = vidtrain("verify", *words, f"run={run}")  # which recipe, its command says
    assert done.code == 0, done.err + done.out
    assert "reproduced: mine (a paper)" in done.out and "the protocol is the recipe's" in done.out
    said = verified(run)
    assert said["passed"] and said["protocol"] == [] and said["experiment"] == "mine"
    (score,) = said["scores"]
    assert score == {
        "metric": "top1",
        "ours": 100.0,
        "published": 99.8,
        "difference": 0.2,
        "tolerance": 0.5,
        "within": True,
    }

    recipe("{top1: 80.0, source: a paper}")  # better than published is no reproduction either
    done = vidtrain("verify", *words, "experiment=mine", f"ckpt={run}", "output=second")
    assert done.code == 1, done.err
    assert "not reproduced" in done.out and "+20.00" in done.out

    recipe("{source: nobody published one}")
    done = vidtrain("verify", *words, f"run={run}", "output=third")
    assert done.code == 0 and "no score was published for this recipe" in done.out


def test_what_is_not_as_the_recipe_says_is_listed(vidtrain, recipe, run, tmp_path):
    words = recipe("{top1: 100.0, source: a paper}")
    file = tmp_path / "own" / "experiment" / "mine.yaml"
    file.write_text(file.read_text().replace("stride: 2", "stride: 1"))  # trained with 2
    done = vidtrain("verify", *words, f"run={run}", "views.clips=1", "trainer.limit_test_batches=5")
    assert done.code == 1, done.err
    said = {row.pop("what"): row for row in verified(run)["protocol"]}
    assert said == {
        "clip.stride": {"recipe": 1, "trained": 2, "tested": 1},
        "views.clips": {"recipe": 2, "trained": None, "tested": 1},
        "videos scored": {"recipe": 6, "trained": None, "tested": 5},
    }
    assert "the protocol differs" in done.out and "clip.stride" in done.out


def test_other_data_are_tested_where_they_lie(vidtrain, recipe, run, tiny_dataset):
    words = recipe("{top1: 100.0, source: a paper}")
    done = vidtrain("verify", *words, f"run={run}", "split=val", f"data.root={tiny_dataset}")
    assert done.code == 1, done.err
    assert [row["what"] for row in verified(run)["protocol"]] == ["split"]


def test_mistakes_are_one_line(vidtrain, recipe, run, tiny_dataset):
    words = recipe("null", "bare")
    for args, said in (
        ([], "name what is verified: ckpt=... or run=..."),
        ([f"run={run}", "experiment=bare"], "experiment=bare names no published score"),
        ([f"run={run}", "experiment=ucf101/c3d"], "is a recipe for vidtrain.models.c3d.c3d"),
        (["run=nowhere"], "no checkpoint nowhere"),
    ):
        done = vidtrain("verify", *words, *args)
        assert done.code == 2 and said in done.err, done.err
        assert len(done.err.strip().splitlines()) == 1
    (run.parents[2] / "own" / "experiment" / "mine.yaml").unlink()
    done = vidtrain("verify", *words, f"run={run}")
    assert done.code == 2 and "experiment=mine" in done.err, done.err
