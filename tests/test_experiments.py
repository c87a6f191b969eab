"""Every recipe of conf/experiment/: it says what was published, and trains and tests when scaled down."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from vidtrain import build
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
NARROW = ["+model.dim=48", "+model.depth=2", "+model.heads=4"]  # of transformers
DECODER = ["+model.decoder_dim=24", "++model.decoder_depth=1", "+model.decoder_heads=3"]

# More of the same, by a recipe's name: of all patterns that fit.
SMALLER = {
    "*/timesformer_*": NARROW,
    "*/vivit_*": NARROW,
    "*/vtn_*": [*NARROW, "+model.temporal_depth=1", "model.window=4", "views.num_frames=20"],
    "*/videomae_*": NARROW,
    "*/mae_st_*": NARROW,
    "*/*_pretrain": [*DECODER, "test=false"],
    "*/videomae_*giant*": ["clip.size=56"],  # patches of 14 pixels
    "*/mae_st_huge*": ["clip.size=56"],
    "*/mvit_*": ["+model.width=16"],
}


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
    if recipe.endswith("_pretrain"):  # what it gave is fine-tuned, and that has a score
        assert not published and not cfg.test and cfg.task._target_.endswith("MaskedPretraining")
        return
    assert published.pop("tolerance") == 0.5 or "Tolerance: " in text  # another needs a reason
    assert published and all(0 < score < 100 for score in published.values())
    assert cfg.test
    assert resolved(compose("verify", f"experiment={recipe}"))["views"] == cfg.views


# By a recipe's name: epochs of warm-up and of cuts, and the last rate where a cosine does not end at 0.
EPOCHS = {
    "*/timesformer_*": (0, [11, 14], None),
    "*/vivit_*": (2.5, None, 0),
    "*/vtn_*": (0, [13, 24], None),
    "*/mvit_v2_l_*": (3, None, 1.6e-7),
    "*/mvit_*": (30, None, 1.6e-5),
    "*/videomae_v2_*_pretrain": (30, None, 2.5e-6),
    "*/videomae_*_pretrain": (40, None, 1e-5),
    "*/mae_st_*_pretrain": (20, None, 0),
    "*/videomae_huge": (5, None, 1e-5),
    "*/videomae_*": (5, None, 1e-6),
    "*/mae_st_*": (5, None, 1e-6),
}


@pytest.mark.parametrize(
    "recipe", [name for name in RECIPES if any(fnmatchcase(name, p) for p in EPOCHS)]
)
def test_shares_of_training_are_the_papers_epochs(compose, recipe):
    warmup, cuts, last = next(v for pattern, v in EPOCHS.items() if fnmatchcase(recipe, pattern))
    cfg = compose("train", f"experiment={recipe}")
    epochs, optim = cfg.trainer.max_epochs, cfg.optim
    assert optim.warmup * epochs == pytest.approx(warmup, abs=0.1)
    if cuts is not None:
        assert [share * epochs for share in optim.milestones] == pytest.approx(cuts, abs=0.01)
    else:
        assert optim.schedule == "cosine" and optim.floor * optim.lr == pytest.approx(
            last, rel=0.02
        )


@pytest.mark.parametrize(
    ("recipe", "epochs", "blocks"),
    [("base", 1600, 4), ("small", 1600, 4), ("large", 1600, 12), ("huge", 1600, 12)],
)
def test_videomae_is_pretrained_as_its_published_score_needs(compose, recipe, epochs, blocks):
    pretrain = compose("train", f"experiment=kinetics400/videomae_{recipe}_pretrain")
    source = compose("train", f"experiment=kinetics400/videomae_{recipe}").published.source
    assert pretrain.trainer.max_epochs == epochs and f"{epochs:,} epochs" in source
    with torch.device("meta"):
        assert len(build.model(pretrain).decoder.blocks) == blocks


def test_a_recipe_without_a_published_score_says_so(compose):
    assert dict(compose("train", "experiment=demo").published) == {
        "source": "no published score: the videos are vidtrain's own"
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_and_tests_when_scaled_down(vidtrain, demo, recipe, monkeypatch):
    monkeypatch.setenv("VIDTRAIN_CACHE", str(demo / "cache"))  # one set of videos for all
    more = [word for name, words in SMALLER.items() if fnmatchcase(recipe, name) for word in words]
    cfg_text = (conf_dir() / "experiment" / f"{recipe}.yaml").read_text()
    if "flow: stored" in cfg_text:
        pytest.importorskip("cv2")
        more += ["data.flow=farneback"]
    done = vidtrain("train", f"experiment={recipe}", *SMALL, f"data.root={demo / 'demo'}", *more)
    assert done.code == 0, done.err
    assert ("top1" in done.out) == (not recipe.endswith("_pretrain"))
