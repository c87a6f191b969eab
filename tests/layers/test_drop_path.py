"""Stochastic depth: the layer, its rates, and the networks that have it."""

import inspect

import pytest
import torch
from nets import compiled_for_gpu
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from vidtrain.build import locate
from vidtrain.config import conf_dir
from vidtrain.layers.bottleneck import Bottleneck
from vidtrain.layers.drop_path import drop_path, path_rates
from vidtrain.models import movinet, resnet3d, slow, slowfast, x3d
from vidtrain.models.resnet3d import BasicBlock
from vidtrain.types import UserError

# Small networks, and how many blocks each row of theirs has.
NETS = {
    "r3d_18": (resnet3d.r3d_18, {"width": 4}, [8]),
    "mc3_18": (resnet3d.mc3_18, {"width": 4}, [8]),
    "r2plus1d_18": (resnet3d.r2plus1d_18, {"width": 4}, [8]),
    "slow": (slow.slow_r50_8x8, {"width": 4, "zero_init": False}, [16]),
    "c2d": (slow.c2d_r50_8x8, {"width": 4, "zero_init": False}, [16]),
    "i3d": (slow.i3d_r50_8x8, {"width": 4, "zero_init": False}, [16]),
    "slowfast": (slowfast.slowfast_r50_8x8, {"width": 8, "zero_init": False}, [16, 16]),
    "slowfast_r101": (slowfast.slowfast_r101_16x8, {"width": 8, "zero_init": False}, [33, 33]),
    "x3d": (x3d.x3d_xs, {}, [26]),
}
FAMILIES = ["r3d_18", "slow", "slowfast", "x3d"]


def make(name: str, **settings: float) -> nn.Module:
    function, narrow, _ = NETS[name]
    torch.manual_seed(0)
    return function(4, **narrow, **settings)


def clip(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_sample_is_dropped_whole_or_scaled_up():
    torch.manual_seed(0)
    layer, x = drop_path(0.3).train(), torch.rand(20_000, 2, 3) + 1
    kept = layer(x) / x
    shares = kept.amin((1, 2))
    torch.testing.assert_close(shares, kept.amax((1, 2)))  # one draw for all of a sample
    is_dropped = shares == 0
    torch.testing.assert_close(
        shares[~is_dropped], torch.full((), 1 / 0.7).expand_as(shares[~is_dropped])
    )
    assert is_dropped.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert torch.equal(layer.eval()(x), x)


def test_rates_rise_linearly():
    assert path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert path_rates(0.3, 4)[-1] == 0.3 and path_rates(0.3, 1) == [0]


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, True, "much", None])
@pytest.mark.parametrize("build", [x3d.x3d_xs, movinet.movinet_a0])
def test_a_bad_rate_is_named(build, rate):
    with (
        torch.device("meta"),
        pytest.raises(UserError, match=r"model\.drop_path is .*from 0 to below 1"),
    ):
        build(4, drop_path=rate)


@pytest.mark.parametrize("name", NETS)
def test_rates_of_a_network(name):
    with torch.device("meta"):
        net = make(name, drop_path=0.2)
    blocks = [m for m in net.modules() if isinstance(getattr(m, "drop_path", None), nn.Module)]
    rates = [m.drop_path.p if isinstance(m.drop_path, StochasticDepth) else 0 for m in blocks]
    assert rates == [rate for row in NETS[name][2] for rate in path_rates(0.2, row)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_is_the_same_without_and_in_a_test(name):
    plain, none, some = make(name), make(name, drop_path=0.0), make(name, drop_path=0.5)
    assert not any(isinstance(module, StochasticDepth) for module in plain.modules())
    assert list(plain.state_dict()) == list(some.state_dict())
    for key, tensor in plain.state_dict().items():  # the same first weights
        assert torch.equal(none.state_dict()[key], tensor) and torch.equal(
            some.state_dict()[key], tensor
        )
    with torch.no_grad():
        logits = plain.eval()(clip())
        assert torch.equal(none.eval()(clip()), logits) and torch.equal(some.eval()(clip()), logits)
        state = torch.get_rng_state()
        none.train().forward_features(clip())
        assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
        some.train().forward_features(clip())
        assert not torch.equal(torch.get_rng_state(), state)


def test_without_a_rate_nothing_is_computed_for_it():
    def operations(net: nn.Module) -> list[str]:
        exported = torch.export.export(net.train(), (clip(),))
        return [str(node.target) for node in exported.graph.nodes]

    plain, some = operations(make("r3d_18")), operations(make("r3d_18", drop_path=0.1))
    assert not any("bernoulli" in op for op in plain)
    assert sum("bernoulli" in op for op in some) == 7 and len(some) > len(plain)


@pytest.mark.parametrize(
    ("block", "shortcut"),
    [
        (lambda drop: Bottleneck(4, 2, 4, 1, 1, False, drop), lambda block, x: x),
        (
            lambda drop: Bottleneck(4, 2, 8, 1, 2, False, drop),
            lambda block, x: block.shortcut_norm(block.shortcut_conv(x)),
        ),
        (lambda drop: BasicBlock("3d", 4, 4, 1, drop), lambda block, x: x),
        (lambda drop: BasicBlock("2plus1d", 4, 8, 2, drop), lambda block, x: block.downsample(x)),
        (lambda drop: x3d.Block(4, 8, 4, 1, True, False, drop), lambda block, x: x),
    ],
)  # fmt: skip
def test_a_block_is_its_shortcut_or_has_its_branch_scaled_up(block, shortcut):
    torch.manual_seed(0)
    net, x = block(0.5).eval(), torch.randn(16, 4, 2, 4, 4)
    with torch.no_grad():
        beside = shortcut(net, x)
        branch = {}
        net.drop_path.register_forward_hook(
            lambda module, args, out: branch.update(x=args[0].clone())
        )
        net(x)
        net.drop_path.train()  # the norms stay as they are
        out = net(x)
    skipped, doubled = beside.relu(), (beside + 2 * branch["x"]).relu()
    is_skipped = [torch.equal(a, b) for a, b in zip(out, skipped, strict=True)]
    assert 0 < sum(is_skipped) < 16
    for sample, dropped in enumerate(is_skipped):
        if not dropped:
            torch.testing.assert_close(out[sample], doubled[sample])


@pytest.mark.parametrize(
    "name",
    ["r3d_18", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])],
)
def test_a_compiler_traces_training_whole(name):
    shape = (2, 3, 8, 32, 32)
    operations = compiled_for_gpu(lambda: make(name, drop_path=0.5), shape)  # fullgraph=True
    found = sum(count for op, count in operations.items() if "bernoulli" in op)
    assert found == sum(row - 1 for row in NETS[name][2])


def test_it_can_be_set_from_the_command_line(vidtrain):
    done = vidtrain("train", "model=mc3_18", "model.drop_path=0.125", "--cfg", "job")
    assert done.code == 0 and "drop_path: 0.125" in done.out, done.err


def test_every_file_of_a_network_that_has_it_says_so():
    found = 0
    for path in (conf_dir() / "model").glob("*.yaml"):
        node = OmegaConf.load(path).model
        parameter = inspect.signature(locate(node._target_)).parameters.get("drop_path")
        assert (parameter is None) == ("drop_path" not in node), path
        if parameter is not None:
            assert node.drop_path == parameter.default, path
            found += 1
    assert found >= 30
