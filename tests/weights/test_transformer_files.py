"""The authors' checkpoints of TimeSformer, VideoMAE, MAE-ST and MViT, by their names, against ours."""

import argparse

import named_vit as nv
import pytest
import torch
import torch.nn.functional as F
from named_net import Net
from omegaconf import OmegaConf

from vidtrain.layers.masking import Mask
from vidtrain.models.mae_st import mae_st_base, mae_st_base_pretrain
from vidtrain.models.mvit import MViT
from vidtrain.models.resnet3d import r3d_18
from vidtrain.models.timesformer import timesformer_base
from vidtrain.models.videomae import videomae_giant, videomae_small
from vidtrain.models.videomae_pretrain import videomae_small_pretrain, videomae_v2_base_pretrain
from vidtrain.types import UserError
from vidtrain.weights.load import fill, open_parts

K, DIM, DEPTH, HEADS = 5, 24, 2, 3
FRAMES, SIZE, PATCH = 4, 32, 8
SMALL = {
    "num_frames": FRAMES,
    "size": SIZE,
    "patch": PATCH,
    "dim": DIM,
    "depth": DEPTH,
    "heads": HEADS,
}
GREY = ((0.45,) * 3, (0.225,) * 3)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def clip(batch=2):
    return torch.rand(batch, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def saved(tmp_path, state, layout, key="model", **extra):
    torch.save({key: state, **extra}, tmp_path / "w.pth")
    (part,) = open_parts({"weights": str(tmp_path / "w.pth")}, tmp_path, print)
    assert part.layout.name == layout
    return part


def bent(part, network, name, tensor):
    """What is said of a file in which one tensor is another, or, for None, is missing."""
    tensors = dict(part.file.tensors)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    file = type(part.file)(part.file.path, tensors, part.file.extra)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        fill(network, part._replace(file=file))
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return str(error.value)


# -- TimeSformer


def timesformer(net, x, attention):
    """The network `model` of the authors' checkpoints."""
    maps = nv.patches(net, x, "model.patch_embed.proj", DIM, PATCH)
    batch, frames, places = maps.shape[:3]
    table = net.tensor("model.pos_embed", 1, 1 + places, DIM)
    maps = maps + table[:, None, 1:]
    if attention != "space":
        maps = maps + net.tensor("model.time_embed", 1, frames, DIM)[:, :, None]
    cls = (net.tensor("model.cls_token", 1, 1, DIM) + table[:, :1]).expand(batch, -1, -1)
    if attention == "space":
        first = cls.unsqueeze(1).expand(-1, frames, -1, -1)
        x = torch.cat([first, maps], 2).flatten(0, 1)
    elif attention == "joint":
        x = torch.cat([cls, maps.flatten(1, 2)], 1)
    for i in range(DEPTH):
        name = f"model.blocks.{i}."
        qkv = nv.one_qkv(net, f"{name}attn.qkv")
        if attention != "divided":
            x = nv.block(net, x, name, qkv, HEADS, nv.TIMM)
            continue
        rows = maps.transpose(1, 2).flatten(0, 1)  # a row for each place
        along = nv.attend(
            nv.one_qkv(net, f"{name}temporal_attn.qkv"),
            nv.norm(net, rows, f"{name}temporal_norm1"),
            HEADS,
        )
        along = nv.dense(net, along, f"{name}temporal_attn.proj", DIM)
        rows = rows + nv.dense(net, along, f"{name}temporal_fc", DIM)
        maps = rows.unflatten(0, (batch, places)).transpose(1, 2)
        each = torch.cat([cls[:, None].expand(-1, frames, -1, -1), maps], 2).flatten(0, 1)
        seen = nv.attend(qkv, nv.norm(net, each, f"{name}norm1"), HEADS)
        seen = nv.dense(net, seen, f"{name}attn.proj", DIM).unflatten(0, (batch, frames))
        cls, maps = cls + seen[:, :, 0].mean(1, keepdim=True), maps + seen[:, :, 1:]
        tokens = torch.cat([cls, maps.flatten(1, 2)], 1)
        inner = nv.dense(net, nv.norm(net, tokens, f"{name}norm2"), f"{name}mlp.fc1", 4 * DIM)
        tokens = tokens + nv.dense(net, F.gelu(inner), f"{name}mlp.fc2", DIM)
        cls, maps = tokens[:, :1], tokens[:, 1:].unflatten(1, (frames, places))
    x = cls if attention == "divided" else x
    first = x[:, 0].unflatten(0, (batch, frames)).mean(1) if attention == "space" else x[:, 0]
    return nv.dense(net, nv.norm(net, first, "model.norm"), "model.head", K)


@pytest.mark.parametrize("attention", ["divided", "joint", "space"])
def test_timesformers_checkpoint(attention, tmp_path):
    net = Net()
    with torch.no_grad():
        expected = timesformer(net, clip(), attention)
        part = saved(tmp_path, net.state, "timesformer", "model_state", cfg="TASK: ''\n", epoch=3)
        ours = timesformer_base(K, **SMALL, attention=attention).eval()
        assert fill(ours, part).endswith(f"{len(net.state)} tensors")
        torch.testing.assert_close(ours(clip()), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert (part.facts.mean, part.facts.std) == GREY


def test_timesformers_config_and_what_does_not_fit(tmp_path):
    net = Net()
    timesformer(net, clip(), "divided")
    cfg = OmegaConf.to_yaml({"DATA": {"MEAN": [0.4, 0.4, 0.4], "STD": [0.2, 0.2, 0.2]}})
    part = saved(tmp_path, net.state, "timesformer", "model_state", cfg=cfg)
    assert part.facts.mean == (0.4,) * 3 and part.facts.std == (0.2,) * 3
    ours = timesformer_base(K, **SMALL)
    said = bent(part, ours, "model.blocks.0.ls1.gamma", torch.ones(DIM))
    assert "no place for 'model.blocks.0.ls1.gamma'" in said
    assert "nothing for 'blocks.1.temporal_fc.bias'" in bent(
        part, ours, "model.blocks.1.temporal_fc.bias", None
    )
    said = bent(part, ours, "model.pos_embed", torch.ones(1, 26, DIM))
    assert "'model.pos_embed' is 1 x 26 x 24 there and 1 x 17 x 24 here" in said
    with pytest.raises(UserError, match=r"'model\.blocks\.0\.temporal_norm1\.weight'"):
        fill(timesformer_base(K, **SMALL, attention="joint"), part)
    with pytest.raises(UserError, match="VideoMAE is none of them"):
        fill(videomae_small(K, **SMALL), part)


# -- VideoMAE


def videomae_encoder(net, x, place, depth=DEPTH, prefix="blocks"):
    for i in range(depth):
        name = f"{place}{prefix}.{i}."
        x = nv.block(net, x, name, nv.no_key_bias(net, f"{name}attn"), HEADS, nv.TIMM)
    return x


def videomae(net, x, place=""):
    x = nv.tubelets(net, x, f"{place}patch_embed.proj", DIM, (2, PATCH, PATCH))
    return videomae_encoder(net, x + nv.sincos(x.shape[1], DIM), place)


def videomae_logits(net, x, place=""):
    mean = nv.norm(net, videomae(net, x, place).mean(1), f"{place}fc_norm")
    return nv.dense(net, mean, f"{place}head", K)


def videomae_pixels(net, x, hidden, decoder=12):
    """What the pretraining network predicts of the tubelets that are hidden, in their order."""
    x = nv.tubelets(net, x, "encoder.patch_embed.proj", DIM, (2, PATCH, PATCH))
    x = (x + nv.sincos(x.shape[1], DIM))[:, ~hidden]
    x = nv.norm(net, videomae_encoder(net, x, "encoder."), "encoder.norm")
    x = nv.dense(net, x, "encoder_to_decoder", decoder, bias=False)
    table = nv.sincos(len(hidden), decoder)
    asked = net.tensor("mask_token", 1, 1, decoder) + table[hidden]
    x = torch.cat([x + table[~hidden], asked.expand(len(x), -1, -1)], 1)
    x = videomae_encoder(net, x, "decoder.", depth=1)[:, -int(hidden.sum()) :]
    return nv.dense(net, nv.norm(net, x, "decoder.norm"), "decoder.head", 3 * 2 * PATCH**2)


@pytest.mark.parametrize("place", ["", "model."])  # as saved, and as V2 is published in safetensors
def test_videomaes_classifier(place, tmp_path):
    net = Net()
    with torch.no_grad():
        expected = videomae_logits(net, clip(), place)
        part = saved(tmp_path, net.state, "videomae", "module", args=argparse.Namespace(lr=1e-3))
        ours = videomae_small(K, **SMALL).eval()
        assert fill(ours, part).endswith(f"{len(net.state)} tensors")
        torch.testing.assert_close(ours(clip()), expected, rtol=1e-4, atol=1e-4)
    assert (part.facts.mean, part.facts.std) == IMAGENET
    assert expected.std() > 0.1


def hide(batch):
    """Tubes of 4 x 4 places, the same in both slots, and our mask of them."""
    places = torch.ones(16, dtype=torch.bool)
    places[[4, 7, 10, 13]] = False
    hidden = places.repeat(2)
    visible, asked = ((which.nonzero()[:, 0]).expand(batch, -1) for which in (~hidden, hidden))
    return hidden, Mask(visible, asked, torch.ones_like(asked, dtype=torch.bool))


def test_videomaes_pretraining_network(tmp_path):
    net = Net()
    hidden, mask = hide(2)
    with torch.no_grad():
        expected = videomae_pixels(net, clip(), hidden)
        part = saved(tmp_path, net.state, "videomae", epoch=3, args=argparse.Namespace(lr=1e-3))
        ours = videomae_small_pretrain(
            **SMALL, decoder_dim=12, decoder_depth=1, decoder_heads=HEADS
        ).eval()
        assert fill(ours, part).endswith(f"{len(net.state)} tensors")
        torch.testing.assert_close(ours(clip(), mask), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1
        # V2's has the same parts; what it hides from its decoder is no tensor.
        other = videomae_v2_base_pretrain(
            **SMALL, decoder_dim=12, decoder_depth=1, decoder_heads=HEADS
        )
        assert fill(other, part).endswith(f"{len(net.state)} tensors")


def test_videomaes_encoder_into_a_classifier(tmp_path):
    net = Net()
    videomae_pixels(net, clip(), hide(2)[0])
    part = saved(tmp_path, net.state, "videomae")
    ours = videomae_small(K, **SMALL).eval()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    line = fill(ours, part)
    decoder = sum(not key.startswith("encoder.") for key in net.state)
    assert f"its decoder ({decoder})" in line and "the norm behind its encoder (2)" in line
    assert "new here: fc_norm, head" in line
    for name in ("fc_norm.weight", "head.weight", "head.bias"):
        assert torch.equal(ours.state_dict()[name], before[name])
    used = len(net.state) - decoder - 2
    assert used == sum(not torch.equal(ours.state_dict()[n], before[n]) for n in before)
    with torch.no_grad():
        theirs = videomae(net, clip(), "encoder.")
        features = ours.forward_features(clip()).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, theirs, rtol=1e-4, atol=1e-4)
    said = bent(part, ours, "encoder.blocks.0.gamma_1", torch.ones(DIM))
    assert "no place for 'encoder.blocks.0.gamma_1'" in said
    said = bent(part, ours, "encoder.blocks.1.attn.v_bias", None)
    assert "nothing for 'blocks.1.attn.v_bias'" in said
    said = bent(part, ours, "encoder.blocks.1.mlp.fc1.bias", torch.ones(7))
    assert "'encoder.blocks.1.mlp.fc1.bias' is 7 there and 96 here" in said
    with pytest.raises(UserError, match="TimeSformer is none of them"):
        fill(timesformer_base(K, **SMALL), part)


def test_a_classifier_that_reads_the_first_token_does_not_fit(tmp_path):
    net = Net()
    videomae_logits(net, clip())
    state = {name.replace("fc_norm", "norm"): tensor for name, tensor in net.state.items()}
    part = saved(tmp_path, state, "videomae", "module")
    with pytest.raises(UserError, match=r"no place for 'norm\.weight'"):
        fill(videomae_small(K, **SMALL), part)


def test_names_and_sizes_of_the_giant(tmp_path):
    """Its MLPs are 48 / 11 as wide; sizes from V2's paper, on no device."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in videomae_giant(710).state_dict().items()}
    per_block = {
        "norm1.weight": (1408,), "norm1.bias": (1408,), "attn.q_bias": (1408,), "attn.v_bias": (1408,),
        "attn.qkv.weight": (4224, 1408), "attn.proj.weight": (1408, 1408), "attn.proj.bias": (1408,),
        "norm2.weight": (1408,), "norm2.bias": (1408,), "mlp.fc1.weight": (6144, 1408),
        "mlp.fc1.bias": (6144,), "mlp.fc2.weight": (1408, 6144), "mlp.fc2.bias": (1408,),
    }  # fmt: skip
    expected = {f"blocks.{i}.{name}": size for i in range(40) for name, size in per_block.items()}
    expected |= {
        "patch_embed.proj.weight": (1408, 3, 2, 14, 14), "patch_embed.proj.bias": (1408,),
        "fc_norm.weight": (1408,), "fc_norm.bias": (1408,), "head.weight": (710, 1408), "head.bias": (710,),
    }  # fmt: skip
    assert {name: tuple(size) for name, size in shapes.items()} == expected


# -- MAE-ST


def mae_st_positions(net, x, prefix, slots, places):
    """Positions of all tubelets, and the class token with its own."""
    dim = x.shape[-1]
    space = net.tensor(f"{prefix}pos_embed_spatial", 1, places, dim).repeat(1, slots, 1)
    time = net.tensor(f"{prefix}pos_embed_temporal", 1, slots, dim).repeat_interleave(places, 1)
    cls = net.tensor(f"{prefix}cls_token", 1, 1, dim)
    cls = cls + net.tensor(f"{prefix}pos_embed_class", 1, 1, dim)
    return space + time, cls.expand(len(x), -1, -1)


def mae_st_blocks(net, x, prefix, depth):
    for i in range(depth):
        name = f"{prefix}{i}."
        qkv = nv.three(net, *(f"{name}attn.{letter}" for letter in "qkv"))
        x = nv.block(net, x, name, qkv, HEADS, nv.TIMM)
    return x


def mae_st(net, x, seen=slice(None)):
    x = nv.tubelets(net, x, "patch_embed.proj", DIM, (2, PATCH, PATCH))
    table, cls = mae_st_positions(net, x, "", 2, 16)
    x = torch.cat([cls, (x + table)[:, seen]], 1)
    return mae_st_blocks(net, x, "blocks.", DEPTH)


def mae_st_logits(net, x):
    return nv.dense(net, nv.norm(net, mae_st(net, x)[:, 1:].mean(1), "norm"), "head", K)


def mae_st_pixels(net, x, hidden, decoder=12):
    x = nv.norm(net, mae_st(net, x, ~hidden), "norm")[:, 1:]
    x = nv.dense(net, x, "decoder_embed", decoder)
    whole = net.tensor("mask_token", 1, 1, decoder).repeat(len(x), len(hidden), 1)
    whole[:, ~hidden] = x
    table, cls = mae_st_positions(net, whole, "decoder_", 2, 16)
    x = mae_st_blocks(net, torch.cat([cls, whole + table], 1), "decoder_blocks.", 1)
    return nv.dense(net, nv.norm(net, x, "decoder_norm"), "decoder_pred", 3 * PATCH**2)[:, 1:]


def test_mae_sts_classifier(tmp_path):
    net = Net()
    with torch.no_grad():
        expected = mae_st_logits(net, clip())
        part = saved(tmp_path, net.state, "mae_st")
        ours = mae_st_base(K, **SMALL).eval()
        line = fill(ours, part)
        assert line.endswith(f"{len(ours.state_dict())} tensors") and "new here" not in line
        torch.testing.assert_close(ours(clip()), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert (part.facts.mean, part.facts.std) == GREY


def test_mae_sts_pretraining_network(tmp_path):
    net = Net()
    hidden, mask = hide(2)
    with torch.no_grad():
        expected = mae_st_pixels(net, clip(), hidden)[:, hidden]
        part = saved(tmp_path, net.state, "mae_st", args=argparse.Namespace(blr=1e-3))
        ours = mae_st_base_pretrain(
            **SMALL, decoder_dim=12, decoder_depth=1, decoder_heads=HEADS
        ).eval()
        line = fill(ours, part)
        assert line.endswith(f"{len(ours.state_dict())} tensors") and "new here" not in line
        torch.testing.assert_close(ours(clip(), mask), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_mae_sts_encoder_into_a_classifier(tmp_path):
    net = Net()
    mae_st_pixels(net, clip(), hide(2)[0])
    part = saved(tmp_path, net.state, "mae_st", "model_state")
    ours = mae_st_base(K, **SMALL).eval()
    decoder = sum(key.startswith(("decoder_", "mask_token")) for key in net.state)
    line = fill(ours, part)
    # of a decoder's block three layers became one
    assert f"its decoder ({decoder - 4})" in line and "norm" not in line
    assert "new here: head" in line
    assert torch.equal(ours.norm.weight, net.state["norm.weight"])
    with torch.no_grad():
        features = ours.forward_features(clip()).flatten(2).transpose(1, 2)
        torch.testing.assert_close(features, mae_st(net, clip())[:, 1:], rtol=1e-4, atol=1e-4)
    assert "nothing for 'pos_embed_class'" in bent(part, ours, "pos_embed_class", None)
    said = bent(part, ours, "blocks.1.attn.k.weight", None)
    assert "no place for 'blocks.1.attn.q.weight', 'blocks.1.attn.v.weight'" in said
    said = bent(part, ours, "pos_embed_temporal", torch.ones(1, 8, DIM))
    assert "'pos_embed_temporal' is 1 x 8 x 24 there and 1 x 2 x 24 here" in said
    with pytest.raises(UserError, match="VideoMAE is none of them"):
        fill(videomae_small(K, **SMALL), part)


# -- MViT in PySlowFast


def pool(net, x, name, letter, grid, stride):
    """A depthwise convolution of each head's map without the class token, and a norm of all."""
    dim = x.shape[-1]
    cls, maps = x[:, :, :1], x[:, :, 1:].flatten(0, 1).transpose(1, 2).unflatten(2, grid)
    maps = net.conv(maps, f"{name}.pool_{letter}", dim, (3, 3, 3), stride, groups=dim)
    size = tuple(maps.shape[2:])
    tokens = maps.flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])
    return nv.norm(net, torch.cat([cls, tokens], 2), f"{name}.norm_{letter}"), size


def distances(net, q, name, grid, keys):
    """What distances add, one pair of places at a time along each axis."""
    dim = q.shape[-1]
    places = q[:, :, 1:].unflatten(2, grid)
    total = 0
    for axis, letter in enumerate("thw"):
        queries, seen = grid[axis], keys[axis]
        length = 2 * max(queries, seen) - 1
        table = net.tensor(f"{name}.rel_pos_{letter}", length, dim)
        rows = [
            int(i * max(seen / queries, 1) + (seen - 1 - j) * max(queries / seen, 1))
            for i in range(queries)
            for j in range(seen)
        ]
        looked = table[rows].unflatten(0, (queries, seen))
        one = torch.einsum(f"bnthwd,{letter}kd->bnthwk", places, looked)
        shape = [1, 1, 1]
        shape[axis] = seen
        total = total + one.reshape(*one.shape[:5], *shape)
    return F.pad(total.flatten(5).flatten(2, 4), (1, 0, 1, 0))


def mvit(net, x, v2, width=8, separate=False):
    """Two stages of two blocks, of v1's kind or v2's."""
    maps = net.conv(x, "patch_embed.proj", width, (3, 7, 7), (2, 4, 4), (1, 3, 3), bias=True)
    grid = tuple(maps.shape[2:])
    x = maps.flatten(2).transpose(1, 2)
    cls = net.tensor("cls_token", 1, 1, width).expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1)
    if not v2:
        space = net.tensor("pos_embed_spatial", 1, grid[1] * grid[2], width)
        time = net.tensor("pos_embed_temporal", 1, grid[0], width)
        both = space.repeat(1, grid[0], 1) + time.repeat_interleave(grid[1] * grid[2], 1)
        x = x + torch.cat([net.tensor("pos_embed_class", 1, 1, width), both], 1)
    for i in range(4):
        name, stage = f"blocks.{i}", i // 2
        heads, dim = 1 << stage, width << stage
        out = 2 * dim if not v2 and i == 1 else dim
        stride = (1, 2, 2) if i == 2 else (1, 1, 1)
        step = (1, 8, 8) if stage == 0 else (1, 4, 4)
        normed = nv.norm(net, x, f"{name}.norm1")
        parts = (
            [nv.dense(net, normed, f"{name}.attn.{letter}", dim) for letter in "qkv"]
            if separate
            else nv.dense(net, normed, f"{name}.attn.qkv", 3 * dim).chunk(3, -1)
        )
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        seen, keys = grid, grid
        if v2 or i == 2:
            q, seen = pool(net, q, f"{name}.attn", "q", grid, stride)
        k, keys = pool(net, k, f"{name}.attn", "k", grid, step)
        v, _ = pool(net, v, f"{name}.attn", "v", grid, step)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if v2:
            scores = scores + distances(net, q, f"{name}.attn", seen, keys)
        y = scores.softmax(-1) @ v
        if v2:
            y = torch.cat([y[:, :, :1], y[:, :, 1:] + q[:, :, 1:]], 2)
        y = nv.dense(net, y.transpose(1, 2).flatten(2), f"{name}.attn.proj", dim)
        if v2 and i == 2:
            x = nv.dense(net, normed, f"{name}.proj", dim)
        if i == 2:
            short = x[:, 1:].transpose(1, 2).unflatten(2, grid)
            short = F.max_pool3d(short, (1, 3, 3), (1, 2, 2), (0, 1, 1)).flatten(2).transpose(1, 2)
            x = torch.cat([x[:, :1], short], 1)
        x, grid = x + y, seen
        normed = nv.norm(net, x, f"{name}.norm2")
        inner = F.gelu(nv.dense(net, normed, f"{name}.mlp.fc1", 4 * dim))
        y = nv.dense(net, inner, f"{name}.mlp.fc2", out)
        x = y + (nv.dense(net, normed, f"{name}.proj", out) if out != dim else x)
    return nv.dense(net, nv.norm(net, x, "norm")[:, 0], "head.projection", K)


def our_mvit(v2, size=64):
    if v2:
        return MViT(K, (2, 2), 8, size, width=8).eval()
    return MViT(
        K, (2, 2), 8, size, width=8, positions="absolute", growth="mlp", pool_queries=False,
        residual_pooling=False,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("v2", "separate"), [(False, False), (True, False), (True, True)])
def test_mvit_in_pyslowfast(v2, separate, tmp_path):
    net = Net()
    video = torch.rand(2, 3, 8, 64, 64, generator=torch.Generator().manual_seed(2))
    cfg = OmegaConf.to_yaml({"MVIT": {"SEPARATE_QKV": separate, "POOL_FIRST": False}})
    with torch.no_grad():
        expected = mvit(net, video, v2, separate=separate)
        part = saved(tmp_path, net.state, "pyslowfast", "model_state", cfg=cfg)
        ours = our_mvit(v2)
        line = fill(ours, part)
        assert line.endswith(f"{len(ours.state_dict())} tensors") and "new here" not in line
        torch.testing.assert_close(ours(video), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    assert (part.facts.mean, part.facts.std) == GREY


def test_mvits_that_do_not_fit(tmp_path):
    net = Net()
    video = torch.rand(1, 3, 8, 64, 64)
    mvit(net, video, False)
    part = saved(tmp_path, net.state, "pyslowfast", "model_state")
    with pytest.raises(UserError, match=r"set model\.num_frames=8 model\.size=64"):
        fill(our_mvit(False, size=96), part)
    with pytest.raises(UserError, match="does not fit MViT"):
        fill(our_mvit(True), part)
    with pytest.raises(UserError, match="is none of them"):
        fill(r3d_18(K, width=8), part)
    ours = our_mvit(False)
    said = bent(part, ours, "norm_stem.weight", torch.ones(8))
    assert "no place for 'norm_stem.weight'" in said
    said = bent(part, ours, "blocks.2.attn.norm_q.bias", None)
    assert "nothing for 'blocks.2.attn.pool_q.norm.bias'" in said
    net = Net()
    mvit(net, video, False, separate=True)
    for about in ({}, {"SEPARATE_QKV": True, "POOL_FIRST": True}):
        cfg = OmegaConf.to_yaml({"MVIT": about})
        part = saved(tmp_path, net.state, "pyslowfast", "model_state", cfg=cfg)
        with pytest.raises(UserError, match=r"does not say MVIT\.SEPARATE_QKV"):
            fill(our_mvit(False), part)
