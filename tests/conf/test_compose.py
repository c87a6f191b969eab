"""Every config composes, its interpolations resolve, and its arguments bind to its targets."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_method
from omegaconf import OmegaConf

from vidtrain import build
from vidtrain.config import conf_dir, resolved

CONF = conf_dir()


def names(group: str) -> list[str]:
    return sorted(
        path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_")
    )


def bind(node: object) -> None:
    """Bind every `_target_` below a node to its keys, without calling it."""
    if isinstance(node, list):
        for value in node:
            bind(value)
    if not isinstance(node, dict):
        return
    for value in node.values():
        bind(value)
    if "_target_" in node:
        given = {key: value for key, value in node.items() if not key.startswith("_")}
        if node["_target_"].startswith("vidtrain.models."):  # build.model takes them out
            given = {key: value for key, value in given.items() if key not in build.FILL_KEYS}
        if node["_target_"].startswith("lightning.pytorch.Trainer"):
            given = {key: value for key, value in given.items()}
        target = (
            get_method(node["_target_"])
            if not _is_class(node["_target_"])
            else _class(node["_target_"])
        )
        signature = inspect.signature(target)
        (signature.bind_partial if node.get("_partial_") else signature.bind)(**given)


def _class(name: str) -> type:
    from hydra.utils import get_class

    return get_class(name)


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2][0].isupper()


@pytest.mark.parametrize("model", names("model"))
def test_every_model_composes_with_its_recipe(compose, model):
    cfg = compose("train", f"model={model}", "data=demo")
    plain = resolved(cfg)
    for part in ("model", "clip", "task", "optim"):
        bind(plain[part])
    assert plain["model"]["_target_"].rpartition(".")[2] == model
    if plain["task"]["_target_"].endswith("Classification"):
        assert plain["model"]["num_classes"] == plain["data"]["num_classes"]
    else:  # pretraining knows no classes
        assert model.endswith("_pretrain") and "num_classes" not in plain["model"]


@pytest.mark.parametrize("data", names("data"))
def test_every_dataset_composes_and_its_keys_are_arguments(compose, data):
    cfg = compose("train", "model=c3d", f"data={data}", "data.root=/videos")
    build.data(cfg)  # binds the module's and the prepare function's arguments, reads nothing
    assert OmegaConf.select(cfg, "data.name") == data or data.startswith("kinetics")


@pytest.mark.parametrize(
    "group", ["augment", "multigrid", "optim", "trainer", "callbacks", "logger", "task", "debug"]
)
def test_every_option_of_a_group_composes_and_binds(compose, group):
    for name in names(group):
        cfg = compose("train", f"{group}={name}", "data.root=/videos")
        node = resolved(cfg).get(group)
        if group == "logger":  # the verb adds where to write
            node = None
        bind(node)


def experiments() -> list[str]:
    folder = CONF / "experiment"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


@pytest.mark.parametrize("experiment", experiments())
def test_every_experiment_composes(compose, experiment):
    plain = resolved(compose("train", f"experiment={experiment}"))
    for part in ("model", "clip", "task", "optim", "trainer"):
        bind(plain[part])


@pytest.mark.parametrize(
    "verb", ["train", "test", "predict", "extract", "summary", "bench", "data"]
)
def test_every_verb_has_a_root(compose, verb):
    assert compose(verb) is not None


def test_a_checkpoints_config_survives_the_way_through_plain_values(compose):
    from vidtrain.config import overlay

    cfg = compose("train", "model=c3d", "data=demo")
    saved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    given = compose("test", "ckpt=x", "clip.num_frames=8", "views.clips=2", "data=ucf101")
    merged = overlay(saved, given, ["clip.num_frames=8", "views.clips=2", "data=ucf101"])
    assert merged.clip.num_frames == 8 and merged.data.clip.num_frames == 8
    assert merged.data.views.clips == 2 and merged.views.crops == cfg.views.crops
    assert merged.data.name == "ucf101" and merged.model.num_classes == 101
    assert merged.optim == cfg.optim


def test_no_class_count_is_written_outside_the_data_files():
    for path in [*CONF.rglob("*.yaml")]:
        if path.parent.name != "data" and "experiment" not in path.parts:
            for line in path.read_text().splitlines():
                if "num_classes:" in line:
                    assert "${data.num_classes}" in line, (path, line)
    for path in Path(build.__file__).parent.rglob("*.py"):
        assert not __import__("re").search(r"num_classes(: int)? = \d", path.read_text()), path
