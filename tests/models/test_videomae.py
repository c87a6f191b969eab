"""VideoMAE's encoder as a classifier: counts, positions, pooling, and the same logits as others' code."""

import math
import re

import pytest
import torch
from nets import counts
from torch import nn

from vidtrain.layers.attention import Attention, Block
from vidtrain.models import videomae
from vidtrain.models.videomae import VideoMAE
from vidtrain.optim.groups import decay_groups, depths
from vidtrain.recompute import recompute
from vidtrain.types import UserError


def on_meta(name: str, **kwargs) -> VideoMAE:
    with torch.device("meta"):
        return getattr(videomae, f"videomae_{name}")(400, **kwargs)


def small(**kwargs) -> VideoMAE:
    """A narrow network for 4 frames of 32 x 32 pixels, in tubelets of 2 x 8 x 8, as it begins."""
    torch.manual_seed(0)
    sizes = {"num_frames": 4, "size": 32, "patch": 8, "dim": 24, "depth": 2, "heads": 3}
    return videomae.videomae_small(5, **{**sizes, **kwargs}).eval()


def shaken(net: nn.Module, std: float = 0.2) -> nn.Module:
    """Fill all parameters with noise, zeros and ones too, so that nothing is hidden."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            norm = re.search(r"norm\d?\.weight$", name) is not None
            nn.init.normal_(parameter, 1.0 if norm else 0.0, std)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("small", 22_033_936, 56.8781),
        ("base", 86_534_800, 180.3449),
        ("large", 304_270_736, 596.8331),
        ("huge", 632_119_440, 1190.9941),
        ("giant", 1_012_174_352, 2542.7911),
    ],
)
def test_parameters_and_multiply_adds(name, params, gmacs):
    assert counts(on_meta(name), 16, 224) == (params, pytest.approx(gmacs, abs=1e-3))


@pytest.mark.parametrize(("name", "tokens"), [("base", (8, 14, 14)), ("giant", (8, 16, 16))])
def test_tokens_of_a_clip(name, tokens):
    net = on_meta(name, depth=1)
    clip = torch.empty(1, 3, 16, 224, 224, device="meta")
    assert net.forward_features(clip).shape == (1, net.num_features, *tokens)
    assert net.positions.shape == (1, math.prod(tokens), net.num_features)


# attention


def test_keys_have_no_bias():
    net = small()
    names = {name for name, _ in net.blocks[0].attn.named_parameters()}
    assert names == {"qkv.weight", "q_bias", "v_bias", "proj.weight", "proj.bias"}
    attn, x = shaken(Attention(24, 3)), torch.randn(2, 7, 24)
    with torch.no_grad():  # nor would one change anything
        before = attn(x)
        attn.qkv.bias[24:48] += 1
        torch.testing.assert_close(attn(x), before, rtol=0, atol=1e-5)
        attn.qkv.bias[:24] += 1
        assert not torch.allclose(attn(x), before, atol=1e-2)


def test_block_is_the_papers_formulas():
    block, x = shaken(Block(24, 3, 60, key_bias=False)), torch.randn(2, 7, 24)

    def norm(x, made):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * made.weight + made.bias

    with torch.no_grad():
        attn, mlp = block.attn, block.mlp
        q, k, v = torch.einsum(
            "bnd,ced->cbne", norm(x, block.norm1), attn.qkv.weight.view(3, 24, 24)
        )
        heads = (part.unflatten(-1, (3, 8)) for part in (q + attn.q_bias, k, v + attn.v_bias))
        q, k, v = heads
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        seen = torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)
        y = x + seen @ attn.proj.weight.T + attn.proj.bias
        inner = norm(y, block.norm2) @ mlp.fc1.weight.T + mlp.fc1.bias
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        y = y + inner @ mlp.fc2.weight.T + mlp.fc2.bias
        torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-4)


# positions


def test_positions_are_sines_that_are_not_learned():
    net = on_meta("base", depth=1)
    assert "positions" not in {**dict(net.named_parameters()), **net.state_dict()}
    table = videomae.videomae_base(5, depth=0).positions[0].double()
    for place, channel in ((0, 0), (0, 1), (1, 0), (1567, 0), (1567, 767), (900, 300), (900, 301)):
        angle = place / 10000 ** ((channel // 2) * 2 / 768)
        want = math.cos(angle) if channel % 2 else math.sin(angle)
        assert table[place, channel].item() == pytest.approx(want, abs=1e-6)
    distance = torch.cdist(table, table) + 1e3 * torch.eye(len(table))
    assert distance.min() > 1  # no two alike


def test_only_positions_tell_tubelets_apart():
    net, clip = shaken(small()), torch.randn(2, 3, 4, 32, 32)
    moved = clip.roll((2, 8, -16), (2, 3, 4))  # whole tubelets
    with torch.no_grad():
        assert (net(moved) - net(clip)).abs().max() > 1e-3
        assert (net(clip.roll(1, 2)) - net(clip)).abs().max() > 1e-3
        net.positions.zero_()
        torch.testing.assert_close(net(moved), net(clip), rtol=0, atol=1e-4)
        assert (net(clip.roll(1, 2)) - net(clip)).abs().max() > 1e-3  # half of them


def test_map_lies_as_the_clip_does():
    net, clip = shaken(small(depth=0)), torch.randn(1, 3, 8, 32, 40)
    other = clip.clone()
    other[0, 1, 5, 9, 31] += 1
    with torch.no_grad():
        before, after = net.forward_features(clip), net.forward_features(other)
    assert before.shape == (1, 24, 4, 4, 5)
    assert (before != after).any(1).nonzero().tolist() == [[0, 2, 1, 3]]


def test_other_clips_get_positions_in_between():
    net = small(depth=0)
    known = net.forward_features(torch.zeros(1, 3, 4, 32, 32)).detach()
    longer = net.forward_features(torch.zeros(1, 3, 8, 32, 32)).detach()
    torch.testing.assert_close(longer[:, :, [0, 3]], known)  # of two places in time
    torch.testing.assert_close(longer[:, :, 1], 0.75 * known[:, :, 0] + 0.25 * known[:, :, 1])
    wider = net.forward_features(torch.zeros(1, 3, 4, 32, 64)).detach()
    torch.testing.assert_close(wider[..., [0, 7]], known[..., [0, 3]])
    torch.testing.assert_close(wider[..., 2], 0.75 * known[..., 1] + 0.25 * known[..., 0])


# pooling and training


def test_classifier_sees_the_normed_mean():
    net, clip = shaken(small()), torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        mean = net.forward_features(clip).flatten(2).mean(2)
        embedding = nn.functional.layer_norm(
            mean, (24,), net.fc_norm.weight, net.fc_norm.bias, eps=1e-6
        )
        torch.testing.assert_close(net(clip), net.head(embedding))
        net.reset_classifier(0)
        torch.testing.assert_close(net(clip), embedding)


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_takes_the_classifiers_place(probe):
    net, clip = shaken(small(probe=probe)), torch.randn(2, 3, 4, 32, 32)
    plain = small()
    plain.load_state_dict(
        {k: v for k, v in net.state_dict().items() if "head" not in k}, strict=False
    )
    with torch.no_grad():
        tokens = net.forward_features(clip).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, plain.forward_features(clip).flatten(2).transpose(1, 2))
        seen = net.fc_norm(tokens if probe == "attentive" else tokens.mean(1))
        torch.testing.assert_close(net(clip), net.head(seen))
        net.reset_classifier(0)
        plain.reset_classifier(0)
        torch.testing.assert_close(net(clip), plain(clip))  # the same embedding
        net.reset_classifier(7)
        assert net(clip).shape == (2, 7) and type(net.head).__name__.lower() == f"{probe}probe"


@pytest.mark.parametrize("name", ["small", "base", "large", "huge", "giant"])
def test_every_size_takes_a_probe(name):
    plain, probed = (on_meta(name, depth=1, probe=probe) for probe in (None, "attentive"))
    d, k = plain.num_features, 400
    more = sum(p.numel() for p in probed.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == 11 * d * d + 11 * d and probed.head.heads == plain.blocks[0].attn.heads
    with pytest.raises(
        UserError, match=r"model\.probe is 'mean'; it is one of linear, attentive, or"
    ):
        on_meta(name, depth=1, probe="mean")
    assert plain.head.weight.shape == (k, d)


def test_every_parameter_learns_from_the_start():
    net = small(drop_path=0.0).train()
    assert net.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert net.head.weight.std().item() == pytest.approx(2e-5, rel=0.3) and not net.head.bias.any()
    nn.functional.cross_entropy(net(torch.randn(2, 3, 4, 32, 32)), torch.tensor([0, 3])).backward()
    assert all(parameter.grad.any() for parameter in net.parameters())


def test_drop_path_and_dropout():
    net = small(drop_path=0.4, depth=3)
    assert [getattr(block.drop_path, "p", 0) for block in net.blocks] == [0, 0.2, 0.4]
    block, x = shaken(Block(24, 3, 48, drop=0.5)), torch.randn(64, 5, 24)
    with torch.no_grad():
        torch.manual_seed(0)
        untouched = (block.train()(x) == x).flatten(1).all(1)
        assert 6 <= untouched.sum() <= 28  # 1 in 4 skips both
        assert not (block.eval()(x) == x).flatten(1).all(1).any()
        net = small(dropout=0.5, drop_path=0.0).train()
        net.reset_classifier(0)
        assert (net(torch.randn(1, 3, 4, 32, 32)) == 0).float().mean() > 0.2


def test_blocks_computed_again_give_the_same_gradients():
    clip, grads = torch.randn(2, 3, 4, 32, 32), []
    for again in (False, True):
        net = shaken(small(drop_path=0.3)).train()
        if again:
            assert recompute(net, True) == 2
        torch.manual_seed(3)
        net(clip).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rates_by_depth():
    """As in the paper's code: the tokens are layer 0, block k is k + 1, the norm and head come last."""
    net = on_meta("base")
    depth, last = depths(net)
    assert last == 13 and depth["patch_embed.proj.weight"] == 0
    assert depth["fc_norm.weight"] == depth["head.weight"] == 13
    for number in range(12):
        found = {d for name, d in depth.items() if name.startswith(f"blocks.{number}.")}
        assert found == {number + 1}
    groups = decay_groups(net, 0.05, lr=1.0, layer_decay=0.75)
    rates = {id(p): (g.get("lr", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}
    assert rates[id(net.blocks[11].attn.qkv.weight)] == (pytest.approx(0.75), 0.05)
    assert rates[id(net.blocks[11].attn.q_bias)] == (pytest.approx(0.75), 0.0)
    assert rates[id(net.patch_embed.proj.weight)] == (pytest.approx(0.75**13), 0.05)
    assert rates[id(net.head.weight)] == (1.0, 0.05)


def test_bad_arguments_are_named():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"2 frames at a time and got a clip of 5"):
            small(num_frames=5)
        with pytest.raises(UserError, match=r"make clip\.num_frames .* a multiple of 2"):
            small()(torch.empty(1, 3, 7, 32, 32))
        with pytest.raises(UserError, match=r"14 x 14 pixels and got 256 x 256"):
            on_meta("giant", depth=1)(torch.empty(1, 3, 16, 256, 256))
        with pytest.raises(UserError, match=r"model\.heads is 7"):
            small(heads=7)


HF = (
    (r"^videomae\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^videomae\.encoder\.layer\.", "blocks."),
    (r"^classifier", "head"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.attention\.query\.bias", "attn.q_bias"),
    (r"attention\.attention\.value\.bias", "attn.v_bias"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"\.output\.dense", ".mlp.fc2"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "size"), [(16, 64), (8, 96)])
def test_same_logits_as_transformers(frames, size):
    hf = pytest.importorskip("transformers")
    config = hf.VideoMAEConfig(
        image_size=size, num_frames=frames, layer_norm_eps=1e-6, num_labels=400
    )
    other = shaken(hf.VideoMAEForVideoClassification(config), std=0.05)
    other.fc_norm.eps = 1e-6  # the paper's code has one for all norms, theirs 1e-5 here
    theirs = other.state_dict()
    state = {}
    for name, tensor in theirs.items():
        if name.endswith("query.weight"):
            parts = [theirs[name.replace("query", part)] for part in ("query", "key", "value")]
            at = re.search(r"layer\.(\d+)", name)[1]
            state[f"blocks.{at}.attn.qkv.weight"] = torch.cat(parts)
        elif not re.search(r"(key|value)\.weight$", name):
            for old, new in HF:
                name = re.sub(old, new, name)
            state[name] = tensor
    net = videomae.videomae_base(400, num_frames=frames, size=size).eval()
    net.load_state_dict(state)
    clip = torch.randn(2, 3, frames, size, size)
    with torch.no_grad():
        logits = other(clip.transpose(1, 2)).logits
        torch.testing.assert_close(net(clip), logits, rtol=0, atol=1e-4)
        assert logits.std() > 0.1
