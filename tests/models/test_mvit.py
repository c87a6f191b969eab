"""MViT: counts, tokens and channels of every stage, what v2 adds, and torchvision's logits."""

import named_net
import pytest
import torch
from nets import counts
from torch import nn
from torchvision.models.video import mvit as tv

from vidtrain.models import mvit
from vidtrain.models.mvit import MViT, PoolingAttention
from vidtrain.optim.groups import depths
from vidtrain.recompute import recompute
from vidtrain.types import UserError
from vidtrain.weights.load import fill, named, open_parts

V1 = ("mvit_v1_b_16x4", "mvit_v1_b_32x3")
CLIPS = {
    "mvit_v1_b_16x4": (16, 224),
    "mvit_v1_b_32x3": (32, 224),
    "mvit_v2_s_16x4": (16, 224),
    "mvit_v2_b_32x3": (32, 224),
    "mvit_v2_l_40x3": (40, 312),
}
STARTS = {  # first blocks of the stages after the first one
    "mvit_v1_b_16x4": [1, 3, 14],
    "mvit_v1_b_32x3": [1, 3, 14],
    "mvit_v2_s_16x4": [1, 3, 14],
    "mvit_v2_b_32x3": [2, 5, 21],
    "mvit_v2_l_40x3": [2, 8, 44],
}


def on_meta(name: str, **kwargs) -> MViT:
    with torch.device("meta"):
        return getattr(mvit, name)(400, **kwargs).eval()


def narrow(name: str, num_classes: int = 5, frames: int = 4, size: int = 64, **kwargs) -> MViT:
    """Make a network of 16 channels whose tensors all have values that show."""
    torch.manual_seed(0)
    net = getattr(mvit, name)(num_classes, num_frames=frames, size=size, width=16, **kwargs)
    named_net.randomise(net)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("mvit_v1_b_16x4", 36_610_672, 70.5994),
        ("mvit_v1_b_32x3", 36_611_440, 169.9581),
        ("mvit_v2_s_16x4", 34_537_744, 64.2238),
        ("mvit_v2_b_32x3", 51_230_128, 224.4728),
        ("mvit_v2_l_40x3", 213_390_112, 2823.4041),
    ],
)
def test_parameters_and_multiply_adds(name, params, macs):
    assert counts(on_meta(name), *CLIPS[name]) == (params, pytest.approx(macs, abs=1e-4))


@pytest.mark.parametrize("name", CLIPS)
def test_tokens_and_channels_of_every_stage(name):
    net, (frames, size) = on_meta(name), CLIPS[name]
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((out[0].shape, out[1])))
    features = net.forward_features(torch.empty(1, 3, frames, size, size, device="meta"))
    ends = [start - 1 for start in STARTS[name]] + [len(net.blocks) - 1]
    side = [size // 4, size // 8, -(-size // 16), -(-size // 32)]
    width = net.cls_token.numel()
    for stage, end in enumerate(ends):
        (_, tokens, dim), grid = seen[end]
        assert grid == (frames // 2, side[stage], side[stage])
        assert tokens == 1 + frames // 2 * side[stage] ** 2
        grown = stage + (name in V1 and stage < 3)  # v1 doubles them in the last block's MLP
        assert dim == width << grown
        assert net.blocks[end].attn.qkv.out_features == 3 * width << stage
        assert net.blocks[end].attn.heads == (2 if "_l_" in name else 1) << stage
    assert features.shape == (1, 8 * width, frames // 2, side[3], side[3])
    if size == 224 and frames == 16:
        assert [seen[end][0][1] for end in ends] == [25_089, 6_273, 1_569, 393]


def test_where_v1_grows_and_pools():
    state = on_meta("mvit_v1_b_16x4").state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert [shapes[f"blocks.{n}.mlp.fc2.weight"] for n in (0, 2, 13)] == [
        (192, 384), (384, 768), (768, 1536),
    ]  # fmt: skip
    assert [shapes[f"blocks.{n}.attn.qkv.weight"] for n in (0, 1, 3, 14)] == [
        (288, 96), (576, 192), (1152, 384), (2304, 768),
    ]  # fmt: skip
    assert [shapes[name] for name in ("pos_spatial", "pos_temporal", "pos_class", "cls_token")] == [
        (3136, 96), (8, 96), (96,), (96,),
    ]  # fmt: skip
    pools = {key: shape for key, shape in shapes.items() if key.endswith(".conv.weight")}
    assert set(pools.values()) == {(96, 1, 3, 3, 3)} and len(pools) == 2 * 16 + 3
    assert [key for key in pools if "pool_q" in key] == [
        f"blocks.{n}.attn.pool_q.conv.weight" for n in (1, 3, 14)
    ]
    assert not any("rel_pos" in key for key in shapes)


def test_longer_clips_of_v1_only_have_more_positions():
    short, long = on_meta("mvit_v1_b_16x4"), on_meta("mvit_v1_b_32x3")
    other = {
        key
        for key, tensor in long.state_dict().items()
        if tensor.shape != short.state_dict()[key].shape
    }
    assert other == {"pos_temporal"} and long.pos_temporal.shape == (16, 96)


@pytest.mark.parametrize(
    ("name", "time", "lengths"),
    [
        ("mvit_v2_s_16x4", 15, [111] * 1 + [55] * 2 + [27] * 12 + [13]),
        ("mvit_v2_b_32x3", 31, [111] * 2 + [55] * 3 + [27] * 17 + [13] * 2),
        ("mvit_v2_l_40x3", 39, [155] * 2 + [77] * 6 + [37] * 37 + [17] * 3),
    ],
)
def test_tables_of_distances(name, time, lengths):
    net = on_meta(name)
    head = 72 if "_l_" in name else 96
    for block, length in zip(net.blocks, lengths, strict=True):
        assert block.attn.rel_pos_t.shape == (time, head)
        assert block.attn.rel_pos_h.shape == block.attn.rel_pos_w.shape == (length, head)
        assert block.attn.pool_q is not None
    assert not any("pos_" in key and "rel_pos_" not in key for key in net.state_dict())
    grown = [n for n, block in enumerate(net.blocks) if block.proj is not None]
    strided = [n for n, block in enumerate(net.blocks) if block.pool_skip is not None]
    assert grown == strided == STARTS[name]


def attention(**kwargs) -> PoolingAttention:
    torch.manual_seed(0)
    settings = {
        "dims": (8, 8), "heads": 2, "stride": (1, 1, 1), "key_stride": (1, 2, 2),
        "pool_queries": True, "residual": True, "lengths": (3, 7, 7),
    }  # fmt: skip
    layer = PoolingAttention(**{**settings, **kwargs})
    named_net.randomise(layer)
    return layer.eval()


def pooled_queries(layer: PoolingAttention, x: torch.Tensor, grid) -> torch.Tensor:
    q = layer.qkv(x).unflatten(2, (3, layer.heads, -1))[:, :, 0].transpose(1, 2)
    return layer.pool_q(q, grid)


def test_pooled_queries_are_added_but_the_class_token_is_not():
    layer, grid = attention(), (2, 4, 4)
    x = torch.randn(2, 33, 8)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.eye(8))
        layer.proj.bias.zero_()
        for parameter in layer.pool_v.norm.parameters():
            parameter.zero_()  # all values are 0
        out = layer(x, grid)
        q = pooled_queries(layer, x, grid).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out[:, 1:], q[:, 1:])
    assert not out[:, 0].any() and q[:, 0].any()


def test_without_distances_and_residual_it_is_plain_attention():
    layer, plain = attention(residual=False), attention(residual=False, lengths=None)
    x, grid = torch.randn(2, 33, 8), (2, 4, 4)
    with torch.no_grad():
        plain.load_state_dict(
            {key: t for key, t in layer.state_dict().items() if "rel_pos" not in key}
        )
        assert not torch.allclose(layer(x, grid), plain(x, grid), atol=1e-3)
        for table in (layer.rel_pos_t, layer.rel_pos_h, layer.rel_pos_w):
            table.zero_()
        torch.testing.assert_close(layer(x, grid), plain(x, grid))


@pytest.mark.parametrize(
    ("grid", "keys"), [((2, 4, 4), (2, 2, 2)), ((3, 2, 5), (3, 4, 5)), ((2, 6, 3), (2, 3, 6))]
)
def test_bias_of_every_pair(grid, keys):
    most = [2 * max(pair) - 1 for pair in zip(grid, keys, strict=True)]
    layer = attention(lengths=tuple(most))
    q = torch.randn(1, 2, 1 + grid[0] * grid[1] * grid[2], 4)
    with torch.no_grad():
        bias = layer.bias(q, grid, keys)
    assert bias.shape == (1, 2, q.shape[2], 1 + keys[0] * keys[1] * keys[2])
    assert not bias[:, :, 0].any() and not bias[:, :, :, 0].any()
    tables = (layer.rel_pos_t, layer.rel_pos_h, layer.rel_pos_w)
    places = [torch.cartesian_prod(*map(torch.arange, sizes)).tolist() for sizes in (grid, keys)]
    for i, query in enumerate(places[0]):
        for j, key in enumerate(places[1]):
            rows = 0
            for axis, table in enumerate(tables):
                n, m = grid[axis], keys[axis]
                wide = query[axis] * max(m / n, 1) + (m - 1 - key[axis]) * max(n / m, 1)
                rows = rows + table[int(wide)]
            torch.testing.assert_close(bias[0, :, 1 + i, 1 + j], q[0, :, 1 + i] @ rows)


def test_scores_are_scaled_and_distances_are_not():
    layer, grid = attention(key_stride=(1, 1, 1), residual=False), (2, 4, 4)
    x = torch.randn(1, 33, 8)
    with torch.no_grad():
        q, k, v = layer.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k, v = layer.pool_q(q, grid), layer.pool_k(k, grid), layer.pool_v(v, grid)
        scores = q @ k.mT / 4**0.5 + layer.bias(q, grid, grid)
        expected = layer.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, grid), expected)


@pytest.mark.parametrize("name", ["mvit_v1_b_16x4", "mvit_v2_s_16x4"])
def test_map_and_class_token(name):
    net = narrow(name)
    clip = torch.randn(2, 3, 4, 64, 96)
    with torch.no_grad():
        features, (tokens, grid) = net.forward_features(clip), net.tokens(clip)
        assert features.shape == (2, net.num_features, 2, 2, 3) and grid == (2, 2, 3)
        normed = net.norm(tokens)
        for place in range(12):
            t, h, w = place // 6, place // 3 % 2, place % 3
            torch.testing.assert_close(features[:, :, t, h, w], normed[:, 1 + place])
        net.reset_classifier(0)
        torch.testing.assert_close(net(clip), normed[:, 0])
        net.reset_classifier(7)
        assert net(clip).shape == (2, 7)


@pytest.mark.parametrize("name", ["mvit_v1_b_16x4", "mvit_v2_s_16x4"])
@pytest.mark.parametrize(("frames", "height", "width"), [(2, 32, 32), (7, 48, 80), (1, 100, 64)])
def test_any_clip(name, frames, height, width):
    net = narrow(name)
    with torch.no_grad():
        logits = net(torch.randn(1, 3, frames, height, width))
    assert logits.shape == (1, 5) and logits.isfinite().all()


def test_stretched_positions():
    net = narrow("mvit_v1_b_16x4", frames=8, size=32)
    with torch.no_grad():
        same = net.positions((4, 8, 8))
        frame, row, column = 3, 2, 5
        torch.testing.assert_close(
            same[1 + (frame * 8 + row) * 8 + column],
            net.pos_temporal[frame] + net.pos_spatial[row * 8 + column],
        )
        assert torch.equal(same[0], net.pos_class)
        rows = torch.arange(8.0)[:, None, None].expand(8, 8, 16)  # a table that counts rows
        net.pos_spatial.copy_(rows.flatten(0, 1))
        net.pos_temporal.zero_()
        twice = net.positions((4, 16, 8))[1:].unflatten(0, (4, 16, 8))
        expected = (torch.arange(16.0) / 2 - 0.25).clamp(0, 7)  # centres stay where they were
        torch.testing.assert_close(twice, expected[:, None, None].expand(4, 16, 8, 16))
        net.pos_temporal.copy_(torch.arange(4.0)[:, None].expand(4, 16))
        net.pos_spatial.zero_()
        fewer = net.positions((2, 8, 8))[1:].unflatten(0, (2, 8, 8))
        torch.testing.assert_close(fewer[:, 0, 0, 0], torch.tensor([0.5, 2.5]))


def test_whole_in_bf16():
    for name in ("mvit_v1_b_16x4", "mvit_v2_s_16x4"):
        net = narrow(name)
        for size in (64, 48):
            clip = torch.randn(1, 3, 4, size, size)
            with torch.no_grad():
                logits, exact = net.bfloat16()(clip.bfloat16()), net.float()(clip)
            assert logits.dtype == torch.bfloat16
            torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["mvit_v1_b_16x4", "mvit_v2_s_16x4"])
def test_blocks_that_are_computed_again(name):
    plain, again = narrow(name, drop_path=0.5), narrow(name, drop_path=0.5)
    assert recompute(again, True) == 16
    clip, losses = torch.randn(2, 3, 4, 64, 64), []
    for net in (plain, again):
        torch.manual_seed(1)
        losses.append(net.train()(clip).square().sum())
        losses[-1].backward()
    assert torch.equal(*losses)
    for (key, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        assert one.grad is None or torch.equal(one.grad, other.grad), key


@pytest.mark.parametrize("name", CLIPS)
def test_depth_of_layers(name):
    net = on_meta(name)
    depth, last = depths(net)
    assert last == len(net.blocks) + 1
    head = {"head.proj.weight", "head.proj.bias", "norm.weight", "norm.bias"}
    for key, value in depth.items():
        block = int(key.split(".")[1]) + 1 if key.startswith("blocks.") else 0
        assert value == (last if key in head else block), key


def test_dropped_paths_and_classifier():
    for name, rate in [("mvit_v1_b_16x4", 0.2), ("mvit_v2_b_32x3", 0.3), ("mvit_v2_l_40x3", 0.75)]:
        net = on_meta(name)
        rates = [getattr(block.drop, "p", 0) for block in net.blocks]
        assert rates[0] == 0 and rates[-1] == rate and rates == sorted(rates)
        assert net.head.dropout.p == 0.5
    torch.manual_seed(0)
    net = mvit.mvit_v2_s_16x4(300, 4, 32, width=16)
    assert net.head.proj.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    net.reset_classifier(200)
    assert net.head.proj.weight.detach().std() == pytest.approx(0.02, rel=0.1)
    assert net.blocks[0].attn.rel_pos_h.detach().std() == pytest.approx(0.02, rel=0.3)


def test_bad_arguments_are_named():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"model\.width is 15.* multiple of 2"):
            mvit.mvit_v2_l_40x3(5, width=15)
        with pytest.raises(UserError, match=r"model\.drop_path is 1"):
            mvit.mvit_v2_s_16x4(5, drop_path=1)
        with pytest.raises(UserError, match=r"model\.positions is 'rotary'"):
            MViT(5, (1, 1), 4, 32, positions="rotary")
        with pytest.raises(UserError, match=r"model\.growth is 'both'"):
            MViT(5, (1, 1), 4, 32, growth="both")


# -- torchvision

THEIRS = {"mvit_v1_b_16x4": "mvit_v1_b", "mvit_v2_s_16x4": "mvit_v2_s"}


def torchvision_net(name: str, monkeypatch, frames: int, size: int, factor: int) -> nn.Module:
    """Make torchvision's network with its own settings, but for fewer channels and smaller clips."""
    with monkeypatch.context() as patch:
        patch.setattr(tv, "_mvit", lambda **settings: settings)
        settings = getattr(tv, THEIRS[name])()
    for block in settings["block_setting"]:
        block.input_channels //= factor
        block.output_channels //= factor
    del settings["weights"], settings["progress"]
    settings |= {"spatial_size": (size, size), "temporal_size": frames, "num_classes": 5}
    settings = {
        "residual_pool": False, "residual_with_cls_embed": True, "rel_pos_embed": False,
        "proj_after_attn": False, **settings,
    }  # fmt: skip
    net = tv.MViT(**settings).eval()
    named_net.randomise(net)
    return net


def filled(net: nn.Module, theirs: nn.Module, tmp_path) -> str:
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    (part,) = open_parts({"weights": str(tmp_path / "w.pth")}, tmp_path, print)
    assert part.layout.name == "torchvision"
    assert part.facts.mean == (0.45,) * 3 and part.facts.std == (0.225,) * 3
    return fill(net, part)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize(
    ("frames", "size", "factor"),
    [
        (8, 96, 6),
        (4, 80, 6),  # maps of 20, 10, 5 and 3 places, keys of 3: distances that are not whole
        pytest.param(16, 224, 1, marks=pytest.mark.slow),
    ],
)
def test_same_logits_as_torchvision(name, frames, size, factor, monkeypatch, tmp_path):
    theirs = torchvision_net(name, monkeypatch, frames, size, factor)
    net = getattr(mvit, name)(5, num_frames=frames, size=size, width=96 // factor).eval()
    line = filled(net, theirs, tmp_path)
    assert line.endswith(f"{len(theirs.state_dict())} tensors")
    clip = torch.randn(2 if factor > 1 else 1, 3, frames, size, size)
    with torch.no_grad():
        logits = theirs(clip)
        torch.testing.assert_close(net(clip), logits, rtol=0, atol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", THEIRS)
def test_weights_that_do_not_fit_are_named(name, monkeypatch, tmp_path):
    theirs = torchvision_net(name, monkeypatch, 8, 64, 6)
    for clip in ({"frames": 4, "size": 64}, {"frames": 8, "size": 96}):
        with pytest.raises(UserError, match=r"set model\.num_frames=8 model\.size=64"):
            filled(narrow(name, **clip), theirs, tmp_path)
    assert "new here" not in filled(narrow(name, frames=8), theirs, tmp_path)
    other = narrow("mvit_v2_s_16x4" if "v1" in name else "mvit_v1_b_16x4", frames=8)
    with pytest.raises(UserError, match="does not fit MViT"):
        filled(other, theirs, tmp_path)


@pytest.mark.parametrize("name", THEIRS)
def test_published_weights_by_name(name):
    item = named({"_target_": f"vidtrain.models.mvit.{name}"})["kinetics400"]
    assert item.model == THEIRS[name] and len(item.facts.labels) == 400
    assert item.facts.mean == (0.45,) * 3 and item.facts.std == (0.225,) * 3
    other = {"_target_": f"vidtrain.models.mvit.{name.replace('16x4', '32x3')}"}
    assert "kinetics400" not in named(other)
