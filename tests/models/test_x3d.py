"""X3D against the paper's tables, the expansion's arithmetic, and PyTorchVideo."""

from dataclasses import fields, replace

import pytest
import torch
from nets import counts, shake_norms
from torch import nn

from vidtrain.models import x3d
from vidtrain.models.x3d import Expansion
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError

MEMBERS = {"x3d_xs": x3d.XS, "x3d_s": x3d.S, "x3d_m": x3d.M, "x3d_l": x3d.L, "x3d_xl": x3d.XL}
AXES = {  # a factor's name, that of its step, and what it changes
    "gamma_tau": ("fast", "stride"),
    "gamma_t": ("temporal", "num_frames"),
    "gamma_s": ("spatial", "size"),
    "gamma_d": ("depth", "depths"),
    "gamma_w": ("width", "widths"),
    "gamma_b": ("bottleneck", "inner_widths"),
}


def build(name: str, num_classes: int = 400, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return getattr(x3d, name)(num_classes, **kwargs)


def sizes(expansion: Expansion) -> dict[str, object]:
    return {name: getattr(expansion, name) for _, name in AXES.values()}


@pytest.mark.parametrize(
    ("name", "params", "gmacs", "test_size", "at_test"),
    [
        ("x3d_xs", 3_794_274, 0.6053, 182, 0.8388),
        ("x3d_s", 3_794_274, 1.9629, 182, 2.7270),
        ("x3d_m", 3_794_274, 4.7325, 256, 6.1806),
        ("x3d_l", 6_153_384, 18.3677, 356, 24.7640),
        ("x3d_xl", 11_095_840, 35.8376, 356, 48.4068),
    ],
)
def test_parameters_and_multiply_adds(name, params, gmacs, test_size, at_test):
    net, frames = build(name), MEMBERS[name].num_frames
    assert counts(net, frames, MEMBERS[name].size) == (params, pytest.approx(gmacs, abs=1e-4))
    # PyTorchVideo's head slides over a larger map, which costs it 0.1 to 0.6 % more than one mean.
    assert counts(net, frames, test_size)[1] == pytest.approx(at_test, rel=0.01)


@pytest.mark.parametrize(("name", "params"), [("x3d_s", 3_794_322), ("x3d_l", 6_153_432)])
def test_pyslowfast_has_a_norm_more(name, params):
    net = build(name, norm_res2=True)
    assert sum(p.numel() for p in net.parameters()) == params
    more = net.state_dict().keys() - build(name).state_dict().keys()
    assert {key.rpartition(".")[0] for key in more} == {"res2.0.shortcut_norm"}


def test_what_the_files_say_is_what_the_expansion_comes_to(compose):
    for name, expansion in MEMBERS.items():
        clip = compose("train", f"model={name}", "data=ucf101").clip
        assert (clip.num_frames, clip.stride, clip.size) == (
            expansion.num_frames,
            expansion.stride,
            expansion.size,
        ), name


def test_widths_and_depths_of_table_1():
    assert sizes(Expansion()) == {
        "stride": 1,
        "num_frames": 1,
        "size": 112,
        "depths": (1, 2, 5, 3),
        "widths": (24, 48, 96, 192),
        "inner_widths": (24, 48, 96, 192),
    }
    for expansion in (x3d.XS, x3d.S, x3d.M):
        assert expansion.depths == (3, 5, 11, 7)
        assert expansion.inner_widths == (54, 108, 216, 432)
    assert x3d.L.depths == x3d.XL.depths == (5, 10, 25, 15)
    assert x3d.XL.widths == (32, 72, 136, 280)
    assert x3d.XL.inner_widths == (72, 162, 306, 630)


@pytest.mark.parametrize("factor", AXES)
@pytest.mark.parametrize("start", [x3d.S, x3d.XL])
def test_each_factor_changes_its_own_dimension(factor, start):
    step, dimension = AXES[factor]
    grown = start.expand(**{step: 2.0})
    by = 0.5 if step == "fast" else 2.0  # a higher frame rate is a smaller stride
    assert grown == replace(start, **{factor: getattr(start, factor) * by})
    before, after = sizes(start), sizes(grown)
    changed = {name for name in before if before[name] != after[name]}
    # A block's inner channels are counted in its channels.
    assert changed == ({"widths", "inner_widths"} if step == "width" else {dimension})
    if dimension in ("widths", "inner_widths", "depths"):
        ratios = [b / a for a, b in zip(before[dimension], after[dimension], strict=True)]
        rounding = {"widths": 0.13, "inner_widths": 0.02, "depths": 0.17}[dimension]
        assert ratios == pytest.approx([2, 2, 2, 2], rel=rounding)
    else:
        assert after[dimension] == pytest.approx(before[dimension] * by, abs=0.5)


def test_the_networks_factors_change_only_what_they_name():
    plain = build("x3d_s")
    deeper, wider, inner = (
        build("x3d_s", **{name: 2 * getattr(x3d.S, name)})
        for name in ("gamma_d", "gamma_w", "gamma_b")
    )
    depths = {
        net: [len(getattr(net, f"res{n}")) for n in (2, 3, 4, 5)]
        for net in (plain, deeper, wider, inner)
    }
    assert depths[plain] == depths[wider] == depths[inner] == [3, 5, 11, 7]
    assert depths[deeper] == [5, 9, 22, 14]
    for n, dim in zip((2, 3, 4, 5), (24, 48, 96, 192), strict=True):
        shapes = {
            net: getattr(net, f"res{n}")[1].conv_a.weight.shape[:2]  # out of the block, into it
            for net in (plain, deeper, wider, inner)
        }
        thick = int(2.25 * dim)
        assert shapes[plain] == shapes[deeper] == (thick, dim)
        assert shapes[wider] == (2 * thick, 2 * dim) and shapes[inner] == (2 * thick, dim)


def test_sizes_of_m():
    outputs = {layer.name: layer.output for layer in layer_table(build("x3d_m"), (3, 16, 224, 224))}
    assert outputs["stem.norm"] == [24, 16, 112, 112]
    for stage, last, dim, side in ((2, 2, 24, 56), (3, 4, 48, 28), (4, 10, 96, 14), (5, 6, 192, 7)):
        assert outputs[f"res{stage}.{last}.norm_c"] == [dim, 16, side, side]
    assert outputs["norm5"] == [432, 16, 7, 7]
    assert outputs["fc1"] == [2048]


@pytest.mark.parametrize("name", MEMBERS)
def test_squeeze_and_excitation_in_every_other_block(name):
    net = build(name)
    for n in (2, 3, 4, 5):
        blocks = getattr(net, f"res{n}")
        has = [not isinstance(block.se, nn.Identity) for block in blocks]
        assert has == [i % 2 == 0 for i in range(len(blocks))]
        widths = {block.se.reduce.out_channels for block in blocks[::2]}
        if name == "x3d_xl":
            assert widths == {{2: 8, 3: 16, 4: 24, 5: 40}[n]}
        else:
            assert widths == {{2: 8, 3: 8, 4: 16, 5: 32}[n]}


def test_blocks_start_as_their_shortcut():
    torch.manual_seed(0)
    net = x3d.x3d_xs(5).eval()
    for block in (net.res2[0], net.res3[0], net.res3[1]):
        x = torch.randn(1, block.conv_a.in_channels, 3, 8, 8)
        shortcut = block.shortcut_norm(block.shortcut_conv(x))
        assert torch.equal(block(x), shortcut.relu())
        nn.init.ones_(block.norm_c.weight)
        assert not torch.allclose(block(x), shortcut.relu(), atol=1e-3)
    assert net.fc2.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (5, 48, 80), (7, 33, 47)])
def test_any_clip(frames, height, width):
    net = x3d.x3d_xs(5, gamma_d=1.0).eval()
    clip = torch.randn(1, 3, frames, height, width)
    with torch.no_grad():
        features = net.forward_features(clip)
        assert features.shape == (1, 432, frames, -(-height // 32), -(-width // 32))
        assert net(clip).shape == (1, 5)


def test_bad_factors_are_named():
    for name in (field.name for field in fields(Expansion)):
        with pytest.raises(UserError, match=rf"model\.{name} is -1"):
            Expansion(**{name: -1})
    with pytest.raises(UserError, match=r"model\.gamma_d is 0"):
        build("x3d_s", gamma_d=0)


# Against PyTorchVideo 0.1.5.


def from_pytorchvideo(key: str) -> str:
    """Name one of PyTorchVideo's tensors as ours is named."""
    head = {"blocks.0.conv.conv_t.": "stem.conv.", "blocks.0.conv.conv_xy.": "stem.conv_t."}
    head |= {"blocks.0.norm.": "stem.norm.", "blocks.5.pool.pre_conv.": "conv5."}
    head |= {"blocks.5.pool.pre_norm.": "norm5.", "blocks.5.pool.post_conv.": "fc1."}
    head |= {"blocks.5.proj.": "fc2."}
    for theirs, ours in head.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    _, stage, _, block, rest = key.split(".", 4)
    for theirs, ours in (
        ("branch1_conv.", "shortcut_conv."),
        ("branch1_norm.", "shortcut_norm."),
        ("branch2.norm_b.0.", "norm_b."),
        ("branch2.norm_b.1.block.0.", "se.reduce."),
        ("branch2.norm_b.1.block.2.", "se.expand."),
        ("branch2.", ""),
    ):
        if rest.startswith(theirs):
            return f"res{int(stage) + 1}.{block}.{ours}{rest.removeprefix(theirs)}"
    raise KeyError(key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", MEMBERS)
def test_same_logits_as_pytorchvideo(name):
    pytest.importorskip("pytorchvideo")
    from pytorchvideo.models.x3d import create_x3d

    clip = {"input_clip_length": 4, "input_crop_size": 64}
    factors = {"x3d_l": {"depth_factor": 5.0}}
    factors["x3d_xl"] = {"depth_factor": 5.0, "width_factor": 2.9}
    torch.manual_seed(0)
    theirs = create_x3d(**clip, **factors.get(name, {}), head_activation=None).eval()
    shake_norms(theirs)
    ours = getattr(x3d, name)(400).eval()
    own = ours.state_dict()
    state = {from_pytorchvideo(key): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict({key: value.view(own[key].shape) for key, value in state.items()})
    clip = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        expected = theirs(clip)
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(clip), expected, rtol=0, atol=1e-4)
