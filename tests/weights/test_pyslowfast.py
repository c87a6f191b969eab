"""PySlowFast's layout: networks written down by its names, against ours with its weights."""

import named_net
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from vidtrain.models.slow import i3d_r50_nl_8x8, slow_r50_4x16
from vidtrain.models.slowfast import slowfast_r50_4x16
from vidtrain.models.x3d import x3d_s
from vidtrain.types import UserError
from vidtrain.weights.load import fill, layout_of, open_parts

K = 5


def block(net, x, name, inner, out, frames, stride):
    """A bottleneck, called as PySlowFast does."""
    y = net.conv(x, f"{name}.branch2.a", inner, (frames, 1, 1))
    y = F.relu(net.norm(y, f"{name}.branch2.a_bn"))
    y = net.conv(y, f"{name}.branch2.b", inner, (1, 3, 3), (1, stride, stride))
    y = F.relu(net.norm(y, f"{name}.branch2.b_bn"))
    y = net.norm(net.conv(y, f"{name}.branch2.c", out, (1, 1, 1)), f"{name}.branch2.c_bn")
    if x.shape[1] != out or stride > 1:
        x = net.conv(x, f"{name}.branch1", out, (1, 1, 1), (1, stride, stride))
        x = net.norm(x, f"{name}.branch1_bn")
    return F.relu(x + y)


def non_local(net, x, name):
    """Softmax over scaled products; keys and values pooled over space."""
    inner = x.shape[1] // 2
    theta = net.conv(x, f"{name}.conv_theta", inner, (1, 1, 1), bias=True)
    less = F.max_pool3d(x, (1, 2, 2))
    phi = net.conv(less, f"{name}.conv_phi", inner, (1, 1, 1), bias=True)
    g = net.conv(less, f"{name}.conv_g", inner, (1, 1, 1), bias=True)
    look = torch.einsum("bci,bcj->bij", theta.flatten(2), phi.flatten(2)) / inner**0.5
    y = torch.einsum("bij,bcj->bci", look.softmax(2), g.flatten(2)).view_as(theta)
    return x + net.norm(
        net.conv(y, f"{name}.conv_out", x.shape[1], (1, 1, 1), bias=True), f"{name}.bn"
    )


def stem(net, x, name, width, frames):
    x = net.conv(x, f"{name}.conv", width, (frames, 7, 7), (1, 2, 2))
    x = F.relu(net.norm(x, f"{name}.bn"))
    return F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


def stage(net, x, number, pathway, width, spans, looks=()):
    """Stage s`number` with blocks that span so many frames, and non-local blocks behind some."""
    inner, stride = width << number - 2, 1 if number == 2 else 2
    for i, frames in enumerate(spans):
        name = f"s{number}.pathway{pathway}_"
        x = block(net, x, f"{name}res{i}", inner, 4 * inner, frames, stride if i == 0 else 1)
        if i in looks:
            x = non_local(net, x, f"{name}nonlocal{i}")
    return x


def slow_only(net, x, width):
    x = stem(net, x, "s1.pathway0_stem", width, 1)
    for number, spans in ((2, [1] * 3), (3, [1] * 4), (4, [3] * 6), (5, [3] * 3)):
        x = stage(net, x, number, 0, width, spans)
    return net.linear(x.mean((2, 3, 4)), "head.projection", K)


def i3d_nl(net, x, width):
    x = stem(net, x, "s1.pathway0_stem", width, 5)
    x = F.max_pool3d(stage(net, x, 2, 0, width, [3, 3, 3]), (2, 1, 1))
    x = stage(net, x, 3, 0, width, [3, 1, 3, 1], (1, 3))
    x = stage(net, x, 4, 0, width, [3, 1, 3, 1, 3, 1], (1, 3, 5))
    x = stage(net, x, 5, 0, width, [1, 3, 1])
    return net.linear(x.mean((2, 3, 4)), "head.projection", K)


def slow_fast(net, x, width, alpha=8):
    """Two pathways; a fifth of the frames' names say which the slow one sees."""
    picked = torch.linspace(0, x.shape[2] - 1, x.shape[2] // alpha).long()
    slow = stem(net, x[:, :, picked], "s1.pathway0_stem", width, 1)
    fast = stem(net, x, "s1.pathway1_stem", width // 8, 5)
    for number, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        name = f"s{number - 1}_fuse"
        dim = 2 * fast.shape[1]
        side = net.conv(fast, f"{name}.conv_f2s", dim, (5, 1, 1), (alpha, 1, 1))
        slow = torch.cat([slow, F.relu(net.norm(side, f"{name}.bn"))], 1)
        spans = [3 if number > 3 else 1] * blocks
        slow = stage(net, slow, number, 0, width, spans)
        fast = stage(net, fast, number, 1, width // 8, [3] * blocks)
    both = torch.cat([slow.mean((2, 3, 4)), fast.mean((2, 3, 4))], 1)
    return net.linear(both, "head.projection", K)


def x3d(net, x):
    """X3D-S with fewer blocks: PySlowFast normalises every shortcut that has a convolution."""
    x = net.conv(x, "s1.pathway0_stem.conv_xy", 24, (1, 3, 3), (1, 2, 2))
    x = net.conv(x, "s1.pathway0_stem.conv", 24, (5, 1, 1), groups=24)
    x = F.relu(net.norm(x, "s1.pathway0_stem.bn"))
    for number, (blocks, dim, excited) in enumerate(
        ((1, 24, 8), (2, 48, 8), (5, 96, 16), (3, 192, 32)), start=2
    ):
        inner = int(2.25 * dim)
        for i in range(blocks):
            name, stride = f"s{number}.pathway0_res{i}", 1 if i else 2
            y = F.relu(
                net.norm(net.conv(x, f"{name}.branch2.a", inner, (1, 1, 1)), f"{name}.branch2.a_bn")
            )
            y = net.conv(
                y, f"{name}.branch2.b", inner, (3, 3, 3), (1, stride, stride), groups=inner
            )
            y = net.norm(y, f"{name}.branch2.b_bn")
            if i % 2 == 0:
                mean = y.mean((2, 3, 4), keepdim=True)
                mean = F.relu(
                    net.conv(mean, f"{name}.branch2.se.fc1", excited, (1, 1, 1), bias=True)
                )
                y = (
                    y
                    * net.conv(
                        mean, f"{name}.branch2.se.fc2", inner, (1, 1, 1), bias=True
                    ).sigmoid()
                )
            y = net.norm(
                net.conv(F.silu(y), f"{name}.branch2.c", dim, (1, 1, 1)), f"{name}.branch2.c_bn"
            )
            if i == 0:
                x = net.conv(x, f"{name}.branch1", dim, (1, 1, 1), (1, 2, 2))
                x = net.norm(x, f"{name}.branch1_bn")
            x = F.relu(x + y)
    x = F.relu(net.norm(net.conv(x, "head.conv_5", 432, (1, 1, 1)), "head.conv_5_bn"))
    x = F.relu(net.conv(x.mean((2, 3, 4), keepdim=True), "head.lin_5", 2048, (1, 1, 1)))
    return net.linear(x.flatten(1), "head.projection", K)


CASES = {
    "slow": (lambda net, x: slow_only(net, x, 8), lambda: slow_r50_4x16(K, width=8), (4, 32)),
    "i3d_nl": (lambda net, x: i3d_nl(net, x, 8), lambda: i3d_r50_nl_8x8(K, width=8), (8, 64)),
    "slowfast": (lambda net, x: slow_fast(net, x, 16), lambda: slowfast_r50_4x16(K, width=16), (32, 32)),
    "x3d": (x3d, lambda: x3d_s(K, gamma_d=1, norm_res2=True), (4, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_same_logits(name, tmp_path):
    reference, build, (frames, size) = CASES[name]
    clip = torch.rand(2, 3, frames, size, size, generator=torch.Generator().manual_seed(1))
    net = named_net.Net()
    with torch.no_grad():
        expected = reference(net, clip)
        torch.save({"model_state": net.state, "epoch": 3, "cfg": "TASK: ''\n"}, tmp_path / "w.pyth")
        ours = build().eval()
        (part,) = open_parts({"weights": str(tmp_path / "w.pyth")}, tmp_path, print)
        assert part.layout.name == "pyslowfast"
        line = fill(ours, part)
        assert line.endswith(f"{len(net.state)} tensors")
        torch.testing.assert_close(ours(clip), expected, rtol=1e-4, atol=1e-4)


def saved(tmp_path, state, **extra):
    torch.save({"model_state": state, **extra}, tmp_path / "w.pyth")
    return open_parts({"weights": str(tmp_path / "w.pyth")}, tmp_path, print)[0]


@pytest.fixture(scope="module")
def slow_state():
    net = named_net.Net()
    slow_only(net, torch.rand(1, 3, 4, 32, 32), 8)
    return net.state


def test_its_config_tells_colours_and_their_order(tmp_path, slow_state):
    cfg = {"DATA": {"MEAN": [0.4, 0.5, 0.6], "STD": [0.2, 0.2, 0.3], "REVERSE_INPUT_CHANNEL": True}}
    part = saved(tmp_path, slow_state, cfg=OmegaConf.to_yaml(cfg))
    assert part.facts.mean == (0.4, 0.5, 0.6) and part.facts.bgr
    ours = slow_r50_4x16(K, width=8)
    assert "from BGR to RGB" in fill(ours, part)
    turned = slow_state["s1.pathway0_stem.conv.weight"][:, [2, 1, 0]]
    assert torch.equal(ours.stem.conv.weight, turned)
    plain = saved(tmp_path, slow_state)
    assert plain.facts.mean == (0.45, 0.45, 0.45) and plain.facts.std == (0.225,) * 3
    assert not plain.facts.bgr


def test_another_pairwise_function_is_an_error(tmp_path):
    net = named_net.Net()
    i3d_nl(net, torch.rand(1, 3, 4, 64, 64), 8)
    cfg = OmegaConf.to_yaml({"NONLOCAL": {"INSTANTIATION": "dot_product"}})
    part = saved(tmp_path, net.state, cfg=cfg)
    with pytest.raises(UserError, match=r"add model\.non_local=dot_product"):
        fill(i3d_r50_nl_8x8(K, width=8), part)
    fill(i3d_r50_nl_8x8(K, width=8, non_local="dot_product"), part)


def test_other_networks_are_refused(tmp_path, slow_state):
    part = saved(tmp_path, slow_state)
    assert layout_of(part.file).name == "pyslowfast"
    with pytest.raises(UserError, match="one pathway, and SlowFast is not"):
        fill(slowfast_r50_4x16(K, width=16), part)
    with pytest.raises(UserError, match="16 x 3 x 1 x 7 x 7 here"):
        fill(slow_r50_4x16(K, width=16), part)
    with pytest.raises(UserError, match=r"has nothing for 'res3\.after1"):
        fill(slow_r50_4x16(K, width=8, non_local="gaussian"), part)
    net = named_net.Net()
    x3d(net, torch.rand(1, 3, 2, 32, 32))
    with pytest.raises(UserError, match=r"model\.norm_res2=true"):
        fill(x3d_s(K, gamma_d=1), saved(tmp_path, net.state))
