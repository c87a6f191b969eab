"""One contract for every model in conf/model/: what the rest of the house may rely on."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from vidtrain import build
from vidtrain.config import conf_dir
from vidtrain.types import VideoModel

MODELS = Path(build.__file__).parent / "models"
NAMES = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
# Small clips: as few pixels as the network takes, so that all of them run in seconds.
SIZE = {"c3d": 32, "toy_late_fusion": 32, "toy_early_fusion": 32, "toy_3d_cnn": 32}
K = 5


@pytest.fixture
def configured(compose):
    """Build a model by the name of its file: `net, clip = configured("c3d")`."""

    def make(name: str, batch: int = 2) -> tuple[nn.Module, torch.Tensor]:
        size = f"clip.size={SIZE.get(name, 48)}"
        cfg = compose("train", f"model={name}", "data=ucf101", f"data.num_classes={K}", size)
        torch.manual_seed(0)
        clip = torch.randn(batch, 3, cfg.clip.num_frames, cfg.clip.size, cfg.clip.size)
        # In the units that the model's own file asks for: c3d takes values up to 255.
        return build.model(cfg), clip * 0.25 / cfg.clip.std[0]

    return make


def test_every_file_is_a_function_of_its_name_and_every_function_has_a_file():
    functions = set()
    for path in MODELS.glob("*.py"):
        module = import_module(f"vidtrain.models.{path.stem}")
        for name, value in vars(module).items():
            public = inspect.isfunction(value) and not name.startswith("_")
            if public and value.__module__ == module.__name__:
                functions.add(f"vidtrain.models.{path.stem}.{name}")
    targets = set()
    for name in NAMES:
        text = (conf_dir() / "model" / f"{name}.yaml").read_text()
        (target,) = re.findall(r"^  _target_: (\S+)$", text, re.MULTILINE)
        assert target.rpartition(".")[2] == name
        targets.add(target)
    assert targets == functions


def test_no_signature_has_a_number_of_classes():
    for path in MODELS.glob("*.py"):
        module = import_module(f"vidtrain.models.{path.stem}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) or inspect.isclass(value):
                if value.__module__ != module.__name__:
                    continue
                parameter = inspect.signature(value).parameters.get("num_classes")
                assert parameter is None or parameter.default is inspect.Parameter.empty, name


@pytest.mark.parametrize("name", NAMES)
def test_contract(configured, name):
    net, clip = configured(name)
    assert isinstance(net, VideoModel)
    assert net.inputs == ("video",)

    # forward and backward: logits, and a gradient in every parameter
    net.train()
    logits = net(clip)
    assert logits.shape == (2, K)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key
    net.zero_grad(set_to_none=True)

    # the same clip gives the same logits, whatever its neighbours
    net.eval()
    with torch.no_grad():
        together = net(clip)
        torch.testing.assert_close(net(clip), together, rtol=0, atol=0)
        apart = torch.cat([net(clip[:1]), net(clip[1:])])
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)

        features = net.forward_features(clip)
        assert features.ndim == 5 and features.shape[:2] == (2, net.num_features)

        with torch.autocast("cpu", torch.bfloat16):
            assert net(clip).isfinite().all()

        net.reset_classifier(0)
        embedding = net(clip)
        assert embedding.ndim == 2 and len(embedding) == 2
        net.reset_classifier(7)
        assert net(clip).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_state_goes_into_another_of_the_same(configured, name):
    net, clip = configured(name, batch=1)
    other, _ = configured(name, batch=1)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(0.123)
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net.eval()(clip), other.eval()(clip))


@pytest.mark.parametrize("name", NAMES)
def test_no_classes_from_the_start(compose, name):
    overrides = (f"model={name}", "data=ucf101", "data.num_classes=0", "clip.size=64")
    cfg = compose("train", *overrides)
    with torch.device("meta"):
        net = build.model(cfg).eval()
        clip = torch.empty(2, 3, cfg.clip.num_frames, 64, 64)
        embedding = net(clip)
        net.reset_classifier(0)
        assert net(clip).shape == embedding.shape and embedding.ndim == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_lowers_the_loss(configured, name):
    net, clip = configured(name)
    labels = torch.tensor([0, 3])
    before = nn.functional.cross_entropy(net.eval()(clip), labels)
    before.backward()
    with torch.no_grad():
        squares = sum(p.grad.square().sum() for p in net.parameters())
        for parameter in net.parameters():  # to first order, this takes 1 % off the loss
            parameter -= 0.01 * before.detach() / squares * parameter.grad
        assert nn.functional.cross_entropy(net(clip), labels) < before


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_export_gives_the_same_logits(configured, name):
    net, clip = configured(name, batch=1)
    with torch.no_grad():
        exported = torch.export.export(net.eval(), (clip,)).module()
        torch.testing.assert_close(exported(clip), net(clip))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compile_traces_it_whole(configured, name):
    net, clip = configured(name, batch=1)
    with torch.no_grad():
        compiled = torch.compile(net.eval(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(clip), net(clip))
