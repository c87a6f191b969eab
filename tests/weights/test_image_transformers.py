"""Image transformers of timm and torchvision: they start TimeSformer, ViViT and VTN."""

import named_vit as nv
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from named_net import Net, randomise

from vidtrain.models.fusion import single_frame
from vidtrain.models.resnet3d import r3d_18
from vidtrain.models.timesformer import timesformer_base
from vidtrain.models.videomae import videomae_small
from vidtrain.models.vivit import (
    vivit_b_factorised_attention,
    vivit_b_factorised_dot_product,
    vivit_b_factorised_encoder,
    vivit_b_joint,
)
from vidtrain.models.vtn import vtn_base
from vidtrain.types import UserError
from vidtrain.weights.load import fill, named, open_parts

DIM, DEPTH, HEADS, SIZE, PATCH, FRAMES = 24, 2, 3, 32, 8, 4
SMALL = {"size": SIZE, "patch": PATCH, "dim": DIM, "depth": DEPTH, "heads": HEADS}
CLIPS = {**SMALL, "num_frames": FRAMES}
EVEN = {**CLIPS, "heads": 2}
VIVITS = {
    "joint": lambda k=5, **more: vivit_b_joint(k, **CLIPS | more),
    "encoder": lambda k=5, **more: vivit_b_factorised_encoder(k, **CLIPS | more),
    "attention": lambda k=5, **more: vivit_b_factorised_attention(k, **CLIPS | more),
    "dot_product": lambda k=5, **more: vivit_b_factorised_dot_product(k, **EVEN | more),
}


def vit(net, x, classes=7, gelu="none"):
    """timm's network of one frame: its tokens behind the norm, and its logits."""
    x = nv.patches(net, x[:, :, None], "patch_embed.proj", DIM, PATCH)[:, 0]
    cls = net.tensor("cls_token", 1, 1, DIM).expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1)
    x = x + net.tensor("pos_embed", 1, x.shape[1], DIM)
    for i in range(DEPTH):
        name = f"blocks.{i}."
        parts = nv.TIMM | {"gelu": gelu}
        x = nv.block(net, x, name, nv.one_qkv(net, f"{name}attn.qkv"), HEADS, parts)
    x = nv.norm(net, x, "norm")
    return x, nv.dense(net, x[:, 0], "head", classes)


def made(seed=0, size=SIZE, classes=7):
    net = Net(seed)
    with torch.no_grad():
        vit(net, torch.rand(1, 3, size, size), classes)
    return net


def opened(tmp_path, state, layout="vit", **node):
    torch.save(state, tmp_path / "w.pth")
    (part,) = open_parts({"weights": str(tmp_path / "w.pth"), **node}, tmp_path, print)
    assert part.layout.name == layout
    return part


def still(frames=FRAMES):
    """A frame, and a clip of nothing else."""
    frame = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return frame, frame[:, :, None].expand(-1, -1, frames, -1, -1)


@pytest.mark.parametrize("attention", ["divided", "space"])
def test_timesformer_begins_as_the_image_network(attention, tmp_path):
    net = made(classes=5)
    part = opened(tmp_path, net.state)
    ours = timesformer_base(5, **CLIPS, attention=attention).eval()
    line = fill(ours, part)
    new = "new here: time_embed, blocks.*.temporal_fc"
    assert line.endswith(new) if attention == "divided" else "new here" not in line
    frame, clip = still()
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), vit(net, frame, 5)[1], rtol=1e-4, atol=1e-4)
    if attention == "space":
        return
    for i in range(DEPTH):
        block = ours.blocks[i]
        for part in ("norm1", "attn"):
            theirs = getattr(block, part).state_dict()
            copy = getattr(block, f"temporal_{part}").state_dict()
            for name, tensor in theirs.items():
                assert torch.equal(tensor, net.state[f"blocks.{i}.{part}.{name}"])
                assert torch.equal(copy[name], tensor)
        assert not block.temporal_fc.weight.any() and not block.temporal_fc.bias.any()
    assert not ours.time_embed.any()


def test_joint_attention_of_one_frame_is_the_image_network(tmp_path):
    net = made(classes=5)
    ours = timesformer_base(5, **CLIPS | {"num_frames": 1}, attention="joint").eval()
    assert "new here: time_embed" in fill(ours, opened(tmp_path, net.state))
    frame, clip = still(1)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), vit(net, frame, 5)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VIVITS)
def test_vivits_tubelets_and_positions(name, tmp_path):
    net = made()
    ours = VIVITS[name]().eval()
    line = fill(ours, opened(tmp_path, net.state))
    assert "its classifier has 7 classes, the data 5" in line
    assert ("not used: its class token (1)" in line) == (name in ("attention", "dot_product"))
    kernel = ours.patch_embed.proj.weight
    assert torch.equal(kernel[:, :, 1], net.state["patch_embed.proj.weight"])
    assert not kernel[:, :, 0].any()
    slots = 1 if name == "encoder" else FRAMES // 2
    places = net.state["pos_embed"][:, 1:]
    has_cls = name in ("joint", "encoder")
    assert ours.pos_embed.shape[1] == has_cls + 16 * slots
    for slot in range(slots):
        first = has_cls + 16 * slot
        assert torch.equal(ours.pos_embed[:, first : first + 16], places)
    if has_cls:
        assert torch.equal(ours.pos_embed[:, :1], net.state["pos_embed"][:, :1])
        assert torch.equal(ours.cls_token, net.state["cls_token"])
    for key in net.state:
        if key.startswith(("blocks.", "norm.")):
            assert torch.equal(ours.state_dict()[key], net.state[key]), key


def test_vivits_kernel_in_equal_parts_on_demand(tmp_path):
    net = made()
    part = opened(tmp_path, net.state, "vit_average", weights_from="vit_average")
    ours = VIVITS["joint"]()
    fill(ours, part)
    for tap in range(2):
        theirs = net.state["patch_embed.proj.weight"] / 2
        torch.testing.assert_close(ours.patch_embed.proj.weight[:, :, tap], theirs)


def test_vivit_of_a_still_clip_sees_the_image_networks_tokens(tmp_path):
    """Model 3, which begins as a network of frames, has no class token: a network without one is asked."""
    net = made()
    ours = VIVITS["attention"]().eval()
    for weights_from in ("vit", "vit_average"):
        line = fill(ours, opened(tmp_path, net.state, weights_from, weights_from=weights_from))
        assert "new here: blocks.*.temporal_norm1, blocks.*.temporal_attn" in line
        frame, clip = still()
        with torch.no_grad():
            tokens = nv.patches(net, frame[:, :, None], "patch_embed.proj", DIM, PATCH)[:, 0]
            tokens = tokens + net.state["pos_embed"][:, 1:]
            for i in range(DEPTH):
                name, parts = f"blocks.{i}.", nv.TIMM | {"gelu": "tanh"}
                qkv = nv.one_qkv(net, f"{name}attn.qkv")
                tokens = nv.block(net, tokens, name, qkv, HEADS, parts)
            expected = nv.norm(net, tokens, "norm")
            for slot in ours.tokens(clip)[1].flatten(2, 3).unbind(1):
                torch.testing.assert_close(slot, expected, rtol=1e-4, atol=1e-4)


def test_vivits_encoder_of_frames_is_the_image_network(tmp_path):
    """Model 2 without blocks over time: the frames' class tokens are those of images, but for GELU's tanh."""
    net = made(classes=5)
    ours = VIVITS["encoder"](temporal_depth=0).eval()
    assert "new here" not in fill(ours, opened(tmp_path, net.state))
    frame, clip = still()
    with torch.no_grad():
        expected = vit(net, frame, 5, gelu="tanh")[1]
        torch.testing.assert_close(ours(clip), expected, rtol=1e-4, atol=1e-4)


def test_vtns_backbone(tmp_path):
    net = made()
    part = opened(tmp_path, net.state)
    ours = vtn_base(5, **SMALL, temporal_depth=1, window=2).eval()
    line = fill(ours, part)
    assert "not used: its classifier (2)" in line
    assert "new here: cls_token, temporal, norm, fc, head" in line
    frame, clip = still(2)
    with torch.no_grad():
        expected = vit(net, frame)[0][:, 0]
        for seen in ours.backbone(clip).unbind(1):
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
    other = vtn_base(5, **SMALL, temporal_depth=1, window=2)
    before = other.norm.weight.clone()
    line = fill(other, part._replace(at="backbone"))
    assert "weights for backbone" in line and torch.equal(other.norm.weight, before)
    assert torch.equal(other.backbone.cls_token, net.state["cls_token"])


def test_positions_for_another_size_are_spread_and_it_is_said(tmp_path):
    net = made(size=24)
    part = opened(tmp_path, net.state)
    places = net.state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    spread = F.interpolate(places, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    said = "its positions, 3 x 3, were spread over 4 x 4 (bicubic)"
    ours = timesformer_base(5, **CLIPS)
    assert said in fill(ours, part)
    torch.testing.assert_close(ours.pos_embed[:, 1:], spread)
    assert torch.equal(ours.pos_embed[:, :1], net.state["pos_embed"][:, :1])
    ours = VIVITS["joint"]()
    assert said in fill(ours, part)
    torch.testing.assert_close(ours.pos_embed[:, 1:], spread.repeat(1, 2, 1))
    ours = vtn_base(5, **SMALL, temporal_depth=1, window=2)
    assert said in fill(ours, part)
    torch.testing.assert_close(ours.backbone.pos_embed[:, 1:], spread)
    assert "spread" not in fill(timesformer_base(5, **CLIPS | {"size": 24}), part)


def test_what_does_not_fit(tmp_path):
    net = made()
    ours = timesformer_base(5, **CLIPS)
    for key, tensor, message in (
        ("dist_token", torch.ones(1, 1, DIM), "no place for 'dist_token'"),
        ("blocks.0.ls1.gamma", torch.ones(DIM), r"no place for 'blocks\.0\.ls1\.gamma'"),
        ("blocks.1.norm2.bias", None, r"nothing for 'blocks\.1\.norm2\.bias'"),
        ("pos_embed", torch.ones(1, 18, DIM), "'pos_embed' is 1 x 18 x 24 there and 1 x 17 x 24"),
        ("norm.bias", torch.ones(3), r"'norm\.bias' is 3 there and 24 here"),
    ):
        state = {**net.state, key: tensor}
        part = opened(tmp_path, {k: v for k, v in state.items() if v is not None})
        before = {name: value.clone() for name, value in ours.state_dict().items()}
        with pytest.raises(UserError, match=message) as error:
            fill(ours, part)
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    part = opened(tmp_path, {**net.state, "pre_logits.fc.weight": torch.ones(DIM, DIM)})
    assert "a layer before its classifier (1)" in fill(ours, part)
    for other in (r3d_18(5, width=8), videomae_small(5, **CLIPS)):
        with pytest.raises(UserError, match="timm's weights are read for timesformer, vivit, vtn"):
            fill(other, part)


def test_colours_are_fixed_by_torchvision_alone(tmp_path):
    part = opened(tmp_path, made(classes=1000).state)
    assert part.facts.mean is None and len(part.facts.labels) == 1000
    part = opened(tmp_path, torchvision().state_dict())
    assert part.facts.mean == (0.485, 0.456, 0.406) and part.facts.labels is None


# -- torchvision


def torchvision(classes=7, size=SIZE):
    net = tv.VisionTransformer(size, PATCH, DEPTH, HEADS, DIM, 4 * DIM, num_classes=classes).eval()
    randomise(net)
    return net


def older(state):
    """The names that the published files have."""
    return {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for key, tensor in state.items()
    }


@pytest.mark.parametrize("names", [dict, older])
def test_torchvisions_gives_the_same_logits(names, tmp_path):
    theirs = torchvision(5)
    part = opened(tmp_path, names(theirs.state_dict()))
    ours = timesformer_base(5, **CLIPS).eval()
    fill(ours, part)
    frame, clip = still()
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), theirs(frame), rtol=1e-4, atol=1e-4)
        fill(vtn := vtn_base(5, **SMALL, temporal_depth=1, window=2).eval(), part)
        tokens = theirs.encoder(
            torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(frame)], 1)
        )
        torch.testing.assert_close(vtn.backbone(clip)[:, 1], tokens[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("names", [dict, older])
def test_torchvisions_goes_into_its_own_network_as_well(names, tmp_path):
    theirs = tv.vit_b_32(num_classes=5).eval()
    randomise(theirs)
    part = opened(tmp_path, names(theirs.state_dict()))
    ours = single_frame(5, size=224, backbone="vit_b_32").eval()
    fill(ours, part)
    frame = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(frame[:, :, None]), theirs(frame), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "model"),
    [
        ("timesformer.timesformer_base", "vit_b_16"),
        ("timesformer.timesformer_large", "vit_b_16"),  # of longer clips; ViT-B all the same
        ("vivit.vivit_b_factorised_encoder", "vit_b_16"),
        ("vivit.vivit_l_joint", "vit_l_16"),
        ("vtn.vtn_base", "vit_b_16"),
        ("videomae.videomae_base", None),
    ],
)
def test_weights_by_name(function, model):
    names = named({"_target_": f"vidtrain.models.{function}"})
    if model is None:
        assert not names
        return
    item, entry = names["imagenet"], tv.get_model_weights(model).DEFAULT
    assert item.model == model and item.address.url == entry.url
    assert item.facts.mean == (0.485, 0.456, 0.406)
    assert "imagenet1k_swag_linear_v1" in names
