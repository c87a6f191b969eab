"""One contract for every model in conf/model/: what the rest of the house may rely on."""

import inspect
import re
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vidtrain import build
from vidtrain.config import conf_dir
from vidtrain.types import UserError, VideoModel

MODELS = Path(build.__file__).parent / "models"
NAMES = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
K = 5

# In all tables below the first pattern that fits a case's name counts.

NARROW = ["+model.dim=48", "+model.depth=2", "+model.heads=3"]  # of transformers
NARROW_DECODER = ["+model.decoder_dim=24", "+model.decoder_depth=1", "+model.decoder_heads=3"]

# Small clips: as few frames and pixels as the network takes, so that all of them run in seconds.
SMALL = {
    "c3d": ["clip.size=32"],
    "cnn_lstm*": ["clip.size=48", "clip.num_frames=4", "model.backbone=small"],
    "gru_rcn*": ["clip.size=48", "clip.num_frames=3", "model.backbone=small"],
    "rcn": ["clip.size=48", "clip.num_frames=4"],
    "toy_*": ["clip.size=32"],
    "two_stream*": ["clip.size=48", "clip.num_frames=3"],
    "i3d": ["clip.size=32", "clip.num_frames=16"],
    "i3d_flow": ["clip.size=32", "clip.num_frames=16"],
    "i3d_two_stream": ["clip.size=32", "clip.num_frames=16"],
    "s3d": ["clip.size=32", "clip.num_frames=16"],
    "*_18": ["clip.size=32", "clip.num_frames=8"],
    "x3d_*": ["clip.size=48", "clip.num_frames=4"],
    # A path that is dropped for both samples gets no gradient.
    "movinet_*": ["clip.size=32", "clip.num_frames=5", "model.drop_path=0"],
    "timesformer_*": ["clip.size=32", "clip.num_frames=4", "model.drop_path=0", *NARROW],
    "*_giant_pretrain": ["clip.size=56", "clip.num_frames=4", *NARROW, *NARROW_DECODER],
    "mae_st_huge_pretrain": ["clip.size=56", "clip.num_frames=4", *NARROW, *NARROW_DECODER],
    "*_pretrain": ["clip.size=64", "clip.num_frames=4", *NARROW, *NARROW_DECODER],
    "mae_st_huge": ["clip.size=28", "clip.num_frames=4", "model.drop_path=0", *NARROW],
    "mae_st_*": ["clip.size=32", "clip.num_frames=4", "model.drop_path=0", *NARROW],
    "videomae_giant": ["clip.size=28", "clip.num_frames=4", "model.drop_path=0", *NARROW],
    "videomae_*": ["clip.size=32", "clip.num_frames=4", "model.drop_path=0", *NARROW],
    "mvit_*": ["clip.size=32", "clip.num_frames=4", "model.drop_path=0", "+model.width=16"],
    "vivit_*": ["clip.size=32", "clip.num_frames=4", *NARROW[:2], "+model.heads=4"],
    "vtn_*": ["clip.size=32", "clip.num_frames=4", *NARROW],
    "*": ["clip.size=48"],
}

# Settings beside a file's own under which the contract holds as well: name of the case -> model, overrides.
ALSO: dict[str, list[str]] = {
    "two_stream spatial": ["model=two_stream", "model.streams=spatial"],
    "two_stream temporal": ["model=two_stream", "model.streams=temporal", "model.fields=T-1"],
    "two_stream resnet": [
        "model=two_stream", "model.backbone=resnet18", "model.temporal_backbone=squeezenet1_1",
        "model.fusion=svm",
        "model.stacking=trajectory",
    ],
    "cnn_lstm features": ["model=cnn_lstm", "model.features=16", "model.answers=last"],
    "movinet_a0_stream 3d": [
        "model=movinet_a0_stream", "+model.conv=3d", "+model.positional_encoding=true"
    ],
    "cnn_lstm fc6": ["model=cnn_lstm", "model.fc6=16"],
    "gru_rcn both": ["model=gru_rcn", "model.stacked=true", "model.bidirectional=true"],
    "videomae_small attentive": ["model=videomae_small", "model.probe=attentive"],
}  # fmt: skip

# Of these families this one runs by default and the others, which differ in numbers alone, are slow.
FAMILIES = {
    "x3d_xs": "x3d_*",
    "movinet_a0_stream": "movinet_*_stream",
    "movinet_a0": "movinet_*[0-9]",
    "slowfast_r50_4x16": "slowfast_*",
    "slow_r50_4x16": "slow_r50_*",
    "c2d_r50_8x8": "*_r50_*8x8",
    "mvit_v1_b_16x4": "mvit_v1_*",
    "mvit_v2_s_16x4": "mvit_v2_*",
    "vivit_b_joint": "vivit_*_joint",
}

# What is built for one number of frames (T) or one size (S), and says so when it gets another.
FIXED = {
    "c3d": "TS",
    "cnn_lstm fc6": "S",
    "early_fusion": "TS",
    "late_fusion": "TS",
    "single_frame": "S",
    "slow_fusion": "TS",
    "toy_early_fusion": "T",
    "two_stream": "TS",
    "two_stream spatial": "S",
    "two_stream resnet": "T",
    "two_stream temporal": "TS",
    "*": "",
}

# Parameters, as a regular expression, that logits do not depend on: where they come from the class token
# alone, what the last block makes of other tokens' queries goes no further.
UNUSED = {
    "mvit_v2_s_*": r"blocks\.15\.attn\.(rel_pos_.|pool_q\.conv\.weight)",
    "mvit_v2_b_*": r"blocks\.23\.attn\.(rel_pos_.|pool_q\.conv\.weight)",
    "mvit_v2_l_*": r"blocks\.47\.attn\.(rel_pos_.|pool_q\.conv\.weight)",
    "vtn_*": r"temporal\.layers\.2\.attn\.(query|key|value)\.(weight|bias)",
    "*": "",
}


class Case(NamedTuple):
    """A network, and a small clip for each of its inputs."""

    net: nn.Module
    clip: tuple[Tensor, ...]


def look_up(table, name):
    """Find the value of the first pattern in a table that fits a name."""
    return next(value for pattern, value in table.items() if fnmatchcase(name, pattern))


def is_big(name: str) -> bool:
    return name not in FAMILIES and any(fnmatchcase(name, p) for p in FAMILIES.values())


MASKED = [
    name for name in NAMES if name.endswith("_pretrain")
]  # no classes: a contract of their own
CASES = [
    pytest.param(name, marks=pytest.mark.slow) if is_big(name) else name
    for name in [*NAMES, *ALSO]
    if name not in MASKED
]


def make_inputs(net, clip, batch: int) -> tuple[Tensor, ...]:
    """Make a tensor for each of a network's inputs, in the units that its own file asks for."""
    frames, size = clip.num_frames, clip.size
    made = {
        "video": lambda: torch.randn(batch, 3, frames, size, size) * (0.25 / clip.std[0]),
        "flow": lambda: torch.rand(batch, 2, frames, size, size) * 2 - 1,
        "features": lambda: torch.randn(batch, net.num_features, frames),
    }
    return tuple(made[key]() for key in net.inputs)


def configure(compose, name: str, *overrides: str):
    words = ALSO.get(name, [f"model={name}"])
    cfg = ("data=ucf101", f"data.num_classes={K}", *look_up(SMALL, name), *words, *overrides)
    return compose("train", *cfg)


@pytest.fixture
def configured(compose):
    """Build a model by the name of its file: `net, clip = configured("c3d")`."""

    def make(name: str, batch: int = 2) -> Case:
        cfg = configure(compose, name)
        torch.manual_seed(0)
        net = build.model(cfg)
        return Case(net, make_inputs(net, cfg.clip, batch))

    return make


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of `(B, K)` logits, or of each of the answers `(B, S, K)`."""
    if logits.ndim == 3:
        labels, logits = labels.repeat_interleave(logits.shape[1]), logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels)


def open_gates(net: nn.Module) -> None:
    """Fill what starts at zero so that a block begins as the identity: behind it no gradient passes.

    These are the scales of norms and of residual branches and matrices behind one, not biases.
    """
    for module in net.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if key in ("weight", "alpha") and not parameter.any():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.02)
                else:
                    nn.init.constant_(parameter, 0.5)


def to_channels_last(tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.to(memory_format=formats.get(tensor.ndim, torch.preserve_format))


def check_shape(logits: Tensor, batch: int, classes: int) -> None:
    """`(B, K)`, or `(B, S, K)` where a network answers several times."""
    assert logits.ndim in (2, 3) and len(logits) == batch and logits.shape[-1] == classes


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


def test_every_family_has_one_that_runs_by_default():
    for small, pattern in FAMILIES.items():
        family = [name for name in NAMES if fnmatchcase(name, pattern)]
        assert not family or small in family, (small, family)


@pytest.mark.parametrize("name", CASES)
def test_contract(configured, name):
    net, clip = configured(name)
    assert isinstance(net, VideoModel)

    # forward and backward: logits, and a gradient in every parameter
    net.train()
    open_gates(net)
    logits = net(*clip)
    check_shape(logits, 2, K)
    loss_of(logits, torch.tensor([0, 3])).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        used = not re.fullmatch(look_up(UNUSED, name), key)
        assert parameter.grad.isfinite().all() and parameter.grad.any() == used, key
    net.zero_grad(set_to_none=True)

    # the same clip gives the same logits, whatever its neighbours, and however it lies in memory
    net.eval()
    with torch.no_grad():
        together = net(*clip)
        assert together.shape == logits.shape
        torch.testing.assert_close(net(*clip), together, rtol=0, atol=0)
        apart = torch.cat([net(*(x[:1] for x in clip)), net(*(x[1:] for x in clip))])
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)

        features = net.forward_features(*clip)
        assert features.ndim == 5 and features.shape[:2] == (2, net.num_features)

        with torch.autocast("cpu", torch.bfloat16):
            assert net(*clip).isfinite().all()

        for parameter in net.parameters():
            parameter.data = to_channels_last(parameter.data)
        swapped = net(*map(to_channels_last, clip))
        torch.testing.assert_close(swapped, together, rtol=1e-4, atol=1e-4)

        net.reset_classifier(0)
        embedding = net(*clip)
        assert embedding.ndim == 2 and len(embedding) == 2
        net.reset_classifier(7)
        check_shape(net(*clip), 2, 7)


@pytest.mark.parametrize("name", CASES)
def test_state_goes_into_another_of_the_same(configured, name):
    net, clip = configured(name, batch=1)
    other, _ = configured(name, batch=1)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(0.123)
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net.eval()(*clip), other.eval()(*clip))


@pytest.mark.parametrize("name", CASES)
def test_no_classes_from_the_start(compose, name):
    cfg = configure(compose, name, "data.num_classes=0")
    with torch.device("meta"):
        net = build.model(cfg).eval()
        clip = make_inputs(net, cfg.clip, 2)
        embedding = net(*clip)
        net.reset_classifier(0)
        assert net(*clip).shape == embedding.shape and embedding.ndim == 2


@pytest.mark.parametrize("name", CASES)
def test_other_lengths_and_sizes(compose, name):
    cfg = configure(compose, name)
    fixed = look_up(FIXED, name)
    with torch.device("meta"):
        net = build.model(cfg).eval()
        for axis, change in (("T", "num_frames"), ("S", "size")):
            if axis == "S" and net.inputs == ("features",):
                continue
            other = cfg.clip.copy()
            other[change] *= 2
            clip = make_inputs(net, other, 2)
            if axis in fixed:
                with pytest.raises(UserError, match="the model was built for"):
                    net(*clip)
            else:
                check_shape(net(*clip), 2, K)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_training_step_lowers_the_loss(configured, name):
    net, clip = configured(name)
    labels = torch.tensor([0, 3])
    before = loss_of(net.eval()(*clip), labels)
    before.backward()
    with torch.no_grad():
        squares = sum(p.grad.square().sum() for p in net.parameters())
        for parameter in net.parameters():  # to first order, this takes 1 % off the loss
            parameter -= 0.01 * before.detach() / squares * parameter.grad
        assert loss_of(net(*clip), labels) < before


@pytest.mark.filterwarnings("ignore:RNN module weights")  # torch does not pack an LSTM's in bf16
@pytest.mark.gpu  # torch has no bf16 average pooling in three dimensions on the CPU
@pytest.mark.parametrize("name", CASES)
def test_whole_in_bf16(configured, name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    net, clip = configured(name, batch=1)
    with torch.no_grad():
        logits = net.eval().to("cuda", torch.bfloat16)(
            *(x.to("cuda", torch.bfloat16) for x in clip)
        )
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    check_shape(logits, 1, K)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_export_gives_the_same_logits(configured, name):
    net, clip = configured(name, batch=1)
    with torch.no_grad():
        exported = torch.export.export(net.eval(), clip).module()
        torch.testing.assert_close(exported(*clip), net(*clip))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compile_traces_it_whole(configured, name):
    torch.compiler.reset()  # it gives up on a forward that eight networks have had compiled
    net, clip = configured(name, batch=1)
    with torch.no_grad():
        compiled = torch.compile(net.eval(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*clip), net(*clip))


@pytest.mark.parametrize("name", MASKED)
def test_contract_of_masked_autoencoders(configured, name):
    net, (video,) = configured(name)
    assert net.inputs == ("video",)
    mask = net.draw(2, tuple(video.shape[2:]), torch.Generator().manual_seed(0))
    count, visible = net.boxes(video).shape[1], mask.visible.shape[1]
    assert visible < count and mask.counted.shape == mask.predicted.shape
    for numbers in (mask.visible, mask.predicted):
        assert (numbers.diff() > 0).all() and numbers.min() >= 0 and numbers.max() < count

    # a prediction for each token that is asked for, of as many numbers as the target has
    net.train()
    predicted = net(video, mask)
    target = net.standardise(net.boxes(video).gather(1, at(net, video, mask))).values
    assert predicted.shape == target.shape
    (predicted - target).square().mean().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key

    net.eval()
    with torch.no_grad():
        together = net(video, mask)
        torch.testing.assert_close(net(video, mask), together, rtol=0, atol=0)
        parts = [type(mask)(*(one[i : i + 1] for one in mask)) for i in range(2)]
        apart = [net(video[i : i + 1], part) for i, part in enumerate(parts)]
        torch.testing.assert_close(torch.cat(apart), together, rtol=1e-4, atol=1e-5)
        assert net.forward_features(video).shape[:2] == (2, net.num_features)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(video, mask).isfinite().all()
        swapped = net(to_channels_last(video), mask)
        torch.testing.assert_close(swapped, together, rtol=1e-4, atol=1e-4)
        longer = torch.cat([video, video], 2)  # positions are spread
        assert len(net(longer)) == 2
        other, _ = configured(name)
        other.load_state_dict(net.state_dict())
        assert torch.equal(other.eval()(video, mask), together)


def at(net: nn.Module, video: Tensor, mask) -> Tensor:
    """Give the places of what is predicted, as `gather` takes them."""
    shape = net.boxes(video).shape[2:]
    return mask.predicted[..., None, None].expand(-1, -1, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKED)
def test_masked_autoencoders_compile_whole_and_export(configured, name):
    torch.compiler.reset()
    net, (video,) = configured(name)
    mask = net.eval().draw(2, tuple(video.shape[2:]))
    with torch.no_grad():
        expected = net(video, mask)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(video, mask), expected)
        exported = torch.export.export(net, (video, mask)).module()
        torch.testing.assert_close(exported(video, mask), expected)
