"""Every recipe of conf/experiment/: it says what was published, and trains and tests when scaled down."""

from pathlib import Path

import pytest

from vidtrain.config import conf_dir, resolved

RECIPES = sorted(
    path.relative_to(conf_dir() / "experiment").with_suffix("").as_posix()
    for path in (conf_dir() / "experiment").glob("*/*.yaml")
)
SMALL = [
    "data=demo",
    "data.scenes=[1,1,1]",
    "data.batch_size=4",
    "data.workers=0",
    "clip.num_frames=16",
    "clip.stride=1",
    "clip.size=64",
    "clip.fps=null",
    "views.clips=2",
    "views.crops=1",
    "views.short_side=null",
    "views.size=null",
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "optim.lr=0.001",
    "logger=csv",
    "test=true",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_names_its_score_and_what_it_takes(compose, recipe):
    text = (conf_dir() / "experiment" / f"{recipe}.yaml").read_text()
    for word in ("Published: ", "Needs: "):
        assert word in text, f"{recipe} lacks '{word}'"
    cfg = compose("train", f"experiment={recipe}")
    published = dict(cfg.published)
    assert published.pop("source")
    assert published.pop("tolerance") == 0.5 or "Tolerance: " in text  # another needs a reason
    assert published and all(0 < score < 100 for score in published.values())
    assert cfg.test
    assert resolved(compose("verify", f"experiment={recipe}"))["views"] == cfg.views


def test_a_recipe_without_a_published_score_says_so(compose):
    assert dict(compose("train", "experiment=demo").published) == {
        "source": "no published score: the videos are vidtrain's own"
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_and_tests_when_scaled_down(vidtrain, demo, recipe, monkeypatch):
    monkeypatch.setenv("VIDTRAIN_CACHE", str(demo / "cache"))  # one set of videos for all
    more = []
    cfg_text = (conf_dir() / "experiment" / f"{recipe}.yaml").read_text()
    if "flow: stored" in cfg_text:
        pytest.importorskip("cv2")
        more = ["data.flow=farneback"]
    done = vidtrain("train", f"experiment={recipe}", *SMALL, f"data.root={demo / 'demo'}", *more)
    assert done.code == 0, done.err
    assert "top1" in done.out
