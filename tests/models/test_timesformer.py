"""TimeSformer: counts, what each kind of attention sees, and the same logits as others' code."""

import re

import pytest
import torch
from nets import counts
from torch import nn

from vidtrain.models import timesformer
from vidtrain.models.timesformer import ATTENTION, DividedBlock, TimeSformer
from vidtrain.optim.groups import depths
from vidtrain.recompute import recompute
from vidtrain.types import UserError

NAMES = {
    "divided": "timesformer_base",
    "joint": "timesformer_base_joint",
    "space": "timesformer_base_space",
}


def size_of(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def on_meta(name: str, **kwargs) -> TimeSformer:
    with torch.device("meta"):
        return getattr(timesformer, name)(400, **kwargs)


def small(attention: str = "divided", **kwargs) -> TimeSformer:
    """A narrow network for 4 frames of 32 x 32 pixels, in patches of 8, as it begins."""
    torch.manual_seed(0)
    sizes = {"num_frames": 4, "size": 32, "patch": 8, "dim": 24, "depth": 2, "heads": 3}
    return TimeSformer(5, attention=attention, **{**sizes, **kwargs}).eval()


def shaken(net: nn.Module) -> nn.Module:
    """Fill all parameters with noise, zeros and ones too, so that nothing is hidden."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            norm = re.search(r"norm\d?\.weight$", name) is not None
            nn.init.normal_(parameter, 1.0 if norm else 0.0, 0.2)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "frames", "size", "params", "gmacs"),
    [
        ("timesformer_base", 8, 224, 121_566_352, 195.8303),
        ("timesformer_hr", 16, 448, 122_024_080, 1702.6857),
        ("timesformer_large", 96, 224, 121_633_936, 2379.8570),
        ("timesformer_base_joint", 8, 224, 86_112_400, 179.5628),
        # HF's 140.5069 has a classifier for each of the 8 frames: 7 · 307,200 more.
        ("timesformer_base_space", 8, 224, 86_106_256, 140.5069 - 7 * 307_200e-9),
    ],
)
def test_parameters_and_multiply_adds(name, frames, size, params, gmacs):
    assert counts(on_meta(name), frames, size) == (params, pytest.approx(gmacs, abs=1e-3))


@pytest.mark.parametrize(("frames", "size"), [(8, 224), (1, 224), (16, 224), (8, 96)])
def test_multiply_adds_are_the_formulas(frames, size):
    d, places = 768, (size // 16) ** 2
    n, m = frames * places, frames * places + 1
    once = n * 768 * d + d * 400
    over_time = 5 * d**2 * n + 2 * places * frames**2 * d
    over_space = frames * (4 * d**2 * (places + 1) + 2 * (places + 1) ** 2 * d)
    divided = 12 * (over_time + over_space + 8 * d**2 * m) + once
    joint = 12 * (12 * d**2 * m + 2 * m**2 * d) + once
    for name, macs in (("timesformer_base", divided), ("timesformer_base_joint", joint)):
        net = on_meta(name, num_frames=frames, size=size)
        assert counts(net, frames, size)[1] == pytest.approx(macs / 1e9, abs=1e-6)


def test_cost_of_longer_clips():
    def gmacs(name, frames):
        return counts(on_meta(name, num_frames=frames), frames, 224)[1]

    divided = gmacs("timesformer_base", 8)
    assert gmacs("timesformer_base", 16) / divided == pytest.approx(2.002, abs=1e-3)
    assert gmacs("timesformer_base", 96) / divided == pytest.approx(12.15, abs=1e-2)
    joint = gmacs("timesformer_base_joint", 8)
    assert gmacs("timesformer_base_joint", 96) / joint == pytest.approx(45.3, abs=0.1)


def test_parameters_of_time():
    divided, joint = on_meta("timesformer_base"), on_meta("timesformer_base_joint")
    block = divided.blocks[0]
    parts = (block.temporal_attn, block.temporal_norm1, block.temporal_fc)
    assert tuple(map(size_of, parts)) == (2_362_368, 1_536, 590_592)
    assert size_of(divided) - size_of(joint) == 12 * sum(map(size_of, parts)) == 35_453_952
    assert size_of(on_meta("timesformer_base", num_frames=9)) - size_of(divided) == 768
    space = on_meta("timesformer_base_space")
    assert size_of(joint) - size_of(space) == 8 * 768 and not hasattr(space, "time_embed")


# what is seen


@pytest.mark.parametrize("attention", ATTENTION)
def test_order_of_frames(attention):
    net, clip = small(attention), torch.randn(2, 3, 4, 32, 32)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        logits = net(clip)
        assert logits.std() > 0.01  # at first no network knows time
        torch.testing.assert_close(net(clip[:, :, order]), logits, rtol=0, atol=1e-6)
        logits = shaken(net)(clip)
        moved = (net(clip[:, :, order]) - logits).abs().max()
        if attention == "space":
            assert moved < 1e-4
        else:
            assert moved > 1e-2
            net.time_embed.zero_()  # attention itself knows no order
            torch.testing.assert_close(net(clip[:, :, order]), net(clip), rtol=0, atol=1e-4)


def test_first_step_in_time_changes_the_logits():
    """What is zero at first gets a gradient, and then the network knows time."""
    net, clip = small().train(), torch.randn(2, 3, 4, 32, 32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for _ in range(2):
        nn.functional.cross_entropy(net(clip), torch.tensor([0, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert not torch.allclose(net(clip.flip(2)), net(clip), atol=1e-4)


def changed(before: torch.Tensor, after: torch.Tensor) -> set[tuple[int, int]]:
    """Name the tokens, by place and frame, that differ between two blocks' (1, 1 + S·T, D), T = 4."""
    rows = (before != after).any(-1)[0, 1:].unflatten(0, (-1, 4))
    return {(place, frame) for place, frame in rows.nonzero().tolist()}


def test_attention_over_time_stays_in_its_place_and_over_space_in_its_frame():
    block, x = shaken(DividedBlock(24, 3, 48, 0.0)), torch.randn(1, 1 + 6 * 4, 24)
    other = x.clone()
    other[0, 1 + 3 * 4 + 2] += torch.randn(24)  # place 3 of frame 2
    with torch.no_grad():
        rest = {name: p.clone() for name, p in block.state_dict().items()}
        for name in ("attn.proj.weight", "attn.proj.bias"):
            block.get_parameter(name).zero_()
        before, after = block(x, 4), block(other, 4)
        assert changed(before, after) == {(3, frame) for frame in range(4)}
        assert torch.equal(before[:, 0], after[:, 0])  # the class token takes no part in it

        block.load_state_dict(rest)
        block.temporal_fc.weight.zero_()
        before, after = block(x, 4), block(other, 4)
        assert changed(before, after) == {(place, 2) for place in range(6)}
        assert not torch.equal(before[:, 0], after[:, 0])

        block.load_state_dict(rest)  # both together: every token sees every other
        before, after = block(x, 4), block(other, 4)
        assert len(changed(before, after)) == 6 * 4


def look(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Self-attention of (N, D), written out: softmax(q k^T / sqrt(d)) v of each head."""
    q, k, v = torch.einsum("nd,chkd->chnk", x, attn.qkv.weight.unflatten(0, (3, attn.heads, -1)))
    if attn.qkv.bias is not None:
        qb, kb, vb = attn.qkv.bias.unflatten(0, (3, attn.heads, 1, -1))
        q, k, v = q + qb, k + kb, v + vb
    weights = (torch.einsum("hnk,hmk->hnm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return attn.proj(torch.einsum("hnm,hmk->nhk", weights, v).flatten(1))


def test_divided_block_is_the_papers_formulas():
    block, x = shaken(DividedBlock(24, 3, 48, 0.0)), torch.randn(2, 1 + 5 * 3, 24)
    with torch.no_grad():
        for one, out in zip(x, block(x, 3), strict=True):
            cls, rows = one[0], one[1:].view(5, 3, 24).clone()
            for place in range(5):
                row = rows[place].clone()
                rows[place] += block.temporal_fc(
                    look(block.temporal_attn, block.temporal_norm1(row))
                )
            copies, maps = [], []
            for frame in range(3):
                tokens = torch.cat([cls[None], rows[:, frame]])
                seen = look(block.attn, block.norm1(tokens))
                copies.append(seen[0])
                maps.append(tokens[1:] + seen[1:])
            y = torch.cat([(cls + sum(copies) / 3)[None], torch.stack(maps, 1).flatten(0, 1)])
            y = y + block.mlp(block.norm2(y))
            torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-4)


def test_space_only_is_the_mean_of_its_frames():
    net, clip = shaken(small("space")), torch.randn(2, 3, 4, 32, 32)
    seen = []
    net.blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1][:, 0]))
    with torch.no_grad():
        logits = net(clip)
        for frame in range(4):
            net(clip[:, :, [frame]])
        mean = torch.stack(seen[1:]).mean(0)
        torch.testing.assert_close(net.head(net.norm(mean)), logits, rtol=1e-4, atol=1e-4)


# other clips


@pytest.mark.parametrize("attention", ["divided", "space"])
def test_longer_clips_get_the_nearest_position_in_time(attention):
    """Each frame twice is then the same video: a softmax over twice the tokens has the same mean.

    In joint attention it is not, since the class token, one of the tokens, comes once.
    """
    net, clip = shaken(small(attention)), torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            net(clip.repeat_interleave(2, 2)), net(clip), rtol=1e-4, atol=1e-4
        )


def test_larger_frames_get_the_nearest_position():
    net = shaken(small())
    blank = torch.zeros(1, 3, 4, 48, 64)
    with torch.no_grad():
        maps = net.embed(blank)[:, :, 1:].unflatten(2, (6, 8))
        known = net.embed(blank[..., :32, :32])[:, :, 1:].unflatten(2, (4, 4))
        rows, columns = [0, 0, 1, 2, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(maps, known[:, :, rows][:, :, :, columns])
        assert net(torch.randn(2, 3, 5, 48, 64)).isfinite().all()


@pytest.mark.parametrize("attention", ATTENTION)
def test_map_lies_as_the_clip_does(attention):
    net, clip = shaken(small(attention, depth=0)), torch.randn(1, 3, 4, 32, 40)
    other = clip.clone()
    other[0, 1, 2, 9, 31] += 1
    with torch.no_grad():
        before, after = net.forward_features(clip), net.forward_features(other)
    assert before.shape == (1, 24, 4, 4, 5)
    assert (before != after).any(1).nonzero().tolist() == [[0, 2, 1, 3]]


def test_embedding_is_the_class_token():
    net, clip = shaken(small()), torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        logits, head = net(clip), net.head
        net.reset_classifier(0)
        embedding = net(clip)
        assert embedding.shape == (2, net.num_features)
        torch.testing.assert_close(head(embedding), logits)


# training


def test_what_time_starts_from():
    net = small(drop_path=0.0).train()
    assert not net.time_embed.any()
    assert all(not p.any() for block in net.blocks for p in block.temporal_fc.parameters())
    for weight in (net.pos_embed, net.blocks[0].temporal_attn.qkv.weight, net.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2) and weight.abs().max() < 2
    net(torch.randn(2, 3, 4, 32, 32)).square().sum().backward()
    without = {name for name, p in net.named_parameters() if not p.grad.any()}
    behind = {n for n, _ in net.named_parameters() if re.search(r"temporal_(norm1|attn)", n)}
    assert without == behind and len(behind) == 2 * 6  # temporal_fc holds them back
    net.zero_grad()
    shaken(net).train()(torch.randn(2, 3, 4, 32, 32)).square().sum().backward()
    assert all(p.grad.any() for p in net.parameters())


def test_drop_path_leaves_out_whole_branches():
    net = small(drop_path=0.4, depth=3)
    assert [getattr(block.drop_path, "p", 0) for block in net.blocks] == [0, 0.2, 0.4]
    block = shaken(DividedBlock(24, 3, 48, 0.5))
    x = torch.randn(64, 1 + 4 * 3, 24)
    with torch.no_grad():
        torch.manual_seed(0)
        same = (block.train()(x, 3) == x).flatten(1)
        untouched = same.all(1)
        assert 2 <= untouched.sum() <= 20  # 1 in 8 skips all three
        assert not same[~untouched].all(1).any()
        assert torch.equal(block.eval()(x, 3), block(x, 3)) and not (block(x, 3) == x).all()


def test_dropout_is_before_the_classifier():
    net, clip = small(dropout=0.5, drop_path=0.0).train(), torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert not torch.equal(net(clip), net(clip))
        net.reset_classifier(0)
        assert (net(clip) == 0).float().mean() > 0.2


@pytest.mark.parametrize("attention", ATTENTION)
def test_blocks_computed_again_give_the_same_gradients(attention):
    clip, grads = torch.randn(2, 3, 4, 32, 32), []
    for again in (False, True):
        net = shaken(small(attention, drop_path=0.3)).train()
        if again:
            assert recompute(net, True) == 2
        torch.manual_seed(3)
        net(clip).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_depth_of_layers():
    depth, last = depths(on_meta("timesformer_base"))
    assert last == 13
    assert {depth[name] for name in ("cls_token", "pos_embed", "time_embed")} == {0}
    assert depth["patch_embed.proj.weight"] == 0 and depth["norm.weight"] == 13
    for number in range(12):
        found = {d for name, d in depth.items() if name.startswith(f"blocks.{number}.")}
        assert found == {number + 1}
    assert depth["head.weight"] == 13


def test_bad_arguments_are_named():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"model\.attention is 'axial'; it must be one of div"):
            small("axial")
        with pytest.raises(UserError, match=r"model\.heads is 5; it must divide model\.dim, 24"):
            small(heads=5)
        with pytest.raises(UserError, match=r"got 30 x 30; make clip\.size .* a multiple of 8"):
            small(size=30)
        with pytest.raises(UserError, match=r"8 x 8 pixels and got 32 x 33"):
            small()(torch.empty(1, 3, 4, 32, 33))
        with pytest.raises(UserError, match=r"model\.drop_path is 1\.5"):
            small(drop_path=1.5)


HF = (
    (r"^timesformer\.embeddings\.cls_token", "cls_token"),
    (r"^timesformer\.embeddings\.position_embeddings", "pos_embed"),
    (r"^timesformer\.embeddings\.time_embeddings", "time_embed"),
    (r"^timesformer\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^timesformer\.encoder\.layer\.", "blocks."),
    (r"^timesformer\.layernorm", "norm"),
    (r"^classifier", "head"),
    (r"temporal_layernorm", "temporal_norm1"),
    (r"temporal_attention\.attention", "temporal_attn"),
    (r"temporal_attention\.output\.dense", "temporal_attn.proj"),
    (r"temporal_dense", "temporal_fc"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"\.attention\.attention", ".attn"),
    (r"\.attention\.output\.dense", ".attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"\.output\.dense", ".mlp.fc2"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "theirs"),
    [("divided", "divided_space_time"), ("joint", "joint_space_time"), ("space", "space_only")],
)
def test_same_logits_as_transformers(attention, theirs):
    hf = pytest.importorskip("transformers")
    config = hf.TimesformerConfig(
        image_size=64, num_frames=6, attention_type=theirs, num_labels=400
    )
    other = hf.TimesformerForVideoClassification(config).eval()
    torch.manual_seed(0)
    state = {}
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            norm = "layernorm" in name and name.endswith("weight")
            nn.init.normal_(parameter, 1.0 if norm else 0.0, 0.1 if parameter.ndim == 1 else 0.05)
            for old, new in HF:
                name = re.sub(old, new, name)
            state[name] = parameter.unsqueeze(2) if parameter.ndim == 4 else parameter
    net = getattr(timesformer, NAMES[attention])(400, num_frames=6, size=64).eval()
    net.load_state_dict(state)
    clip = torch.randn(2, 3, 6, 64, 64)
    with torch.no_grad():
        videos = clip.transpose(1, 2)
        if attention == "space":  # theirs answers for each frame: the mean over them is missing
            seen = []
            layers = other.timesformer.encoder.layer
            layers[-1].register_forward_hook(lambda *args: seen.append(args[-1][0]))
            other(videos)
            cls = seen[0][:, 0].unflatten(0, (2, 6)).mean(1)
            logits = other.classifier(other.timesformer.layernorm(cls))
        else:
            logits = other(videos).logits
        torch.testing.assert_close(net(clip), logits, rtol=0, atol=1e-4)
        assert logits.std() > 0.1
