"""VTN: counts, which frames are seen by whom, long videos, positions, and the same tokens as others' code."""

import re

import pytest
import torch
from nets import counts
from torch import nn

from vidtrain.models import vtn
from vidtrain.models.vtn import VTN
from vidtrain.optim.groups import depths
from vidtrain.recompute import recompute
from vidtrain.types import UserError

LONGFORMER = 3 * (7 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
LONGFORMER += 288 * 768 + 2 * 768 + 2 * 768  # positions, token types, a norm


def small(**kwargs) -> VTN:
    """A narrow network for frames of 16 x 16 pixels, in patches of 8 x 8, as it begins."""
    torch.manual_seed(0)
    sizes = {"size": 16, "patch": 8, "dim": 24, "depth": 2, "heads": 3}
    return vtn.vtn_base(5, **{**sizes, **kwargs}).eval()


def shaken(net: nn.Module, std: float = 0.2) -> nn.Module:
    """Fill all parameters with noise, zeros and ones too, so that nothing is hidden."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            norm = re.search(r"norm\d?\.weight$", name, re.IGNORECASE) is not None
            nn.init.normal_(parameter, 1.0 if norm else 0.0, std)
    return net.eval()


def clip_of(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, frames, 16, 16)


# counts


@pytest.mark.parametrize("frames", [16, 250])
def test_parameters_and_multiply_adds(frames):
    with torch.device("meta"):
        net = vtn.vtn_base(400)
    classifier = 2 * 768 + 768 * 768 + 768 + 768 * 400 + 400
    parts = [
        sum(p.numel() for p in part.parameters())
        for part in (net.backbone, net.temporal, nn.ModuleList([net.norm, net.fc, net.head]))
    ]
    assert parts == [85_798_656, 26_803_200, 899_728] == [85_798_656, LONGFORMER, classifier]

    tokens, blocks = 1 + frames, -(-frames // 9)
    spatial = 196 * 768 * 768 + 12 * (197 * 12 * 768**2 + 2 * 197**2 * 768)
    layer = (frames + 1 + 5 * tokens) * 768**2 + 2 * tokens * 768 * 3072  # projections, MLP
    layer += 2 * (blocks * 9 * 28 + tokens) * 768  # windows of 1 + 27 keys, and the class token
    macs = frames * spatial + 3 * layer + 768 * 768 + 768 * 400
    found = counts(net, frames, 224)
    assert found == (113_502_352, pytest.approx(macs / 1e9, rel=1e-9))
    assert found[1] == pytest.approx({16: 281.4334, 250: 4397.0175}[frames], abs=1e-3)
    assert spatial / 1e9 == pytest.approx(17.563, abs=1e-3)  # of a frame
    rest = found[1] - frames * spatial / 1e9
    assert rest == pytest.approx({16: 0.424, 250: 6.252}[frames], abs=1e-3)


def test_names_of_the_image_network_are_timms():
    names = set(dict(small().backbone.named_parameters()))
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.bias"} <= names
    assert {f"blocks.1.{part}.{kind}" for kind in ("weight", "bias") for part in (
        "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"
    )} <= names  # fmt: skip
    assert len(names) == 6 + 2 * 12


# who sees whom


@pytest.mark.parametrize(("window", "first", "last"), [(18, 21, 39), (6, 27, 33)])
def test_a_frame_is_seen_in_its_window_and_by_the_class_token(window, first, last):
    net = shaken(small(temporal_depth=1, window=window))
    clip = clip_of(50)
    other = clip.clone()
    other[:, :, 30] += 1
    with torch.no_grad():
        moved = (net.tokens(other) - net.tokens(clip)).abs().amax(-1)[0]
        assert (net(other) - net(clip)).abs().max() > 1e-4
    assert moved[0] > 1e-4
    assert (moved[1:] > 1e-5).nonzero().flatten().tolist() == list(range(first, last + 1))
    assert not moved[1 : 1 + first].any() and not moved[2 + last :].any()


def test_the_class_token_is_seen_by_all_frames():
    net, clip = shaken(small(temporal_depth=1)), clip_of(50)
    with torch.no_grad():
        before = net.tokens(clip)
        net.cls_token += torch.randn(24)
        assert (net.tokens(clip) - before).abs().amax(-1).min() > 1e-5


def test_layers_carry_further():
    net, clip = shaken(small(window=2)), clip_of(20)
    other = clip.clone()
    other[:, :, 10] += 1
    with torch.no_grad():
        x, y = (
            net.temporal.norm(net.backbone(c)) for c in (clip, other)
        )  # without the class token, which all see, a frame comes as far as there are layers
        first = torch.zeros(1, 1, 24)
        for number, layer in enumerate(net.temporal.layers, 1):
            x, y = (layer(torch.cat([first, part], 1))[:, 1:] for part in (x, y))
            moved = (x - y).abs().amax(-1)[0].nonzero().flatten().tolist()
            assert moved == list(range(10 - number, 11 + number))


@pytest.mark.parametrize("frames", [1, 16, 17, 250, 286])
def test_any_number_of_frames(frames):
    net = shaken(small(depth=1))
    with torch.no_grad():
        clip = clip_of(frames, 2)
        assert net(clip).shape == (2, 5) and net(clip).isfinite().all()
        assert net.forward_features(clip).shape == (2, 24, frames, 1, 1)
        other = clip.clone()
        other[:, :, -1] += 1  # the last one counts too, however the windows are cut
        assert (net(other) - net(clip)).abs().amax(1).min() > 1e-4


def test_more_frames_than_positions_are_refused():
    with pytest.raises(UserError, match=r"knows 286 positions and got a clip of 287 frames; set"):
        small()(clip_of(287))
    with pytest.raises(UserError, match=r"\+model\.max_frames=9"):
        small(max_frames=8)(clip_of(9))
    assert small(max_frames=9)(clip_of(9)).shape == (1, 5)


def test_only_positions_tell_the_order_of_frames():
    net, clip = shaken(small()), clip_of(9)  # which all see one another
    with torch.no_grad():
        assert (net(clip.flip(2)) - net(clip)).abs().max() > 1e-3
        net.temporal.position_embeddings.zero_()
        torch.testing.assert_close(net(clip.flip(2)), net(clip), rtol=0, atol=1e-5)


def test_positions_are_the_frames_numbers_and_the_class_tokens_own():
    net = shaken(small(temporal_depth=1))
    clip = clip_of(7)
    table = net.temporal.position_embeddings
    loss = net.tokens(clip).square().sum() + net.tokens(clip)[0].sum()
    (grad,) = torch.autograd.grad(loss, table)
    assert table.shape == (288, 24)
    assert grad.any(1).nonzero().flatten().tolist() == [*range(7), 286]


# frames of long videos in pieces


def test_the_image_network_takes_frames_in_pieces_in_a_test_alone():
    net, whole = small(frames_per_forward=4), small(frames_per_forward=None)
    sizes: list[int] = []
    net.backbone.blocks[0].register_forward_hook(lambda _, args, out: sizes.append(len(args[0])))
    clip = clip_of(5, 2)
    with torch.no_grad():
        torch.testing.assert_close(net(clip), whole(clip))
        assert sizes == [4, 4, 2]
        sizes.clear()
        net.train()(clip)
        assert sizes == [10]
        sizes.clear()
        net.backbone.eval()(clip)  # frozen
        assert sizes == [4, 4, 2]


def test_other_sizes_get_positions_in_between():
    net = shaken(small(depth=0))
    with torch.no_grad():
        wide = torch.zeros(1, 3, 1, 32, 48)
        assert net(wide).shape == (1, 5)
        assert net(torch.randn(1, 3, 2, 32, 48)).isfinite().all()
    with pytest.raises(UserError, match="8 x 8 pixels and got 20 x 20"):
        net(torch.zeros(1, 3, 1, 20, 20))


# the classifier and training


def test_classifier_reads_the_class_token():
    net, clip = shaken(small()), clip_of(12, 2)
    with torch.no_grad():
        tokens = net.tokens(clip)
        hidden = nn.functional.layer_norm(tokens[:, 0], (24,), net.norm.weight, net.norm.bias, 1e-6)
        hidden = hidden @ net.fc.weight.T + net.fc.bias
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        torch.testing.assert_close(net(clip), hidden @ net.head.weight.T + net.head.bias)
        torch.testing.assert_close(net.forward_features(clip)[..., 0, 0], tokens[:, 1:].mT)
        net.reset_classifier(0)
        torch.testing.assert_close(net(clip), hidden)


def test_first_weights():
    net = small(dim=96, max_frames=286)
    tables = (net.temporal.position_embeddings, net.backbone.pos_embed, net.fc.weight)
    for table in (*tables, net.head.weight, net.temporal.layers[0].attn.query_global.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.15)
    assert not net.temporal.layers[2].attn.key.bias.any() and not net.head.bias.any()


def test_every_parameter_learns_but_what_only_frames_need_behind_the_last_layer():
    net = small(drop_path=0.0, dropout=0.0).train()
    nn.functional.cross_entropy(net(clip_of(6, 2)), torch.tensor([0, 3])).backward()
    still = {name for name, parameter in net.named_parameters() if not parameter.grad.any()}
    at = "temporal.layers.2.attn."
    assert still == {f"{at}{p}.{k}" for p in ("query", "key", "value") for k in ("weight", "bias")}


@pytest.mark.slow
def test_it_learns_in_which_order_frames_come():
    """Clips that grow brighter, and the same backwards: of their frames as a set all are alike.

    From positions as small as they are at first it takes several hundred steps until they count.
    """
    net = small(dim=48, dropout=0.0, temporal_dropout=0.0).train()
    with torch.no_grad():
        net.temporal.position_embeddings *= 10
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    ramp, losses = torch.linspace(-1, 1, 12), []
    for _ in range(200):
        labels = torch.randint(2, (16,))
        light = torch.where(labels[:, None] == 1, ramp, -ramp)[:, None, :, None, None]
        loss = nn.functional.cross_entropy(net(0.3 * clip_of(12, 16) + light), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.1


def test_dropout_and_drop_path():
    net, clip = shaken(small(temporal_dropout=0.0)), clip_of(4)
    net.reset_classifier(0)
    with torch.no_grad():
        frames = net.backbone(clip)
        torch.testing.assert_close(net.temporal.train()(frames), net.temporal.eval()(frames))
        assert 0.2 < (net.train()(clip) == 0).float().mean() < 0.8
        net = shaken(small(temporal_dropout=0.1))
        net.temporal.train()
        assert (net(clip) - net(clip)).abs().max() > 1e-4
    rates = [getattr(b.drop_path, "p", 0) for b in small(depth=3, drop_path=0.4).backbone.blocks]
    assert rates == [0, 0.2, 0.4]


def test_blocks_computed_again_give_the_same_gradients():
    clip, grads = clip_of(5, 2), []
    for again in (False, True):
        net = shaken(small(drop_path=0.3)).train()
        if again:
            assert recompute(net, True) == 2 + 3
        torch.manual_seed(3)
        net(clip).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_layers_of_the_two_parts_come_one_behind_the_other():
    depth, last = depths(small())
    found = [depth[name] for name in ("backbone.patch_embed.proj.weight",
             "backbone.blocks.0.attn.qkv.weight", "backbone.blocks.1.mlp.fc1.weight",
             "temporal.position_embeddings", "temporal.layers.0.attn.query_global.weight",
             "temporal.layers.2.mlp.fc2.weight", "fc.weight", "head.weight")]  # fmt: skip
    assert found == [0, 1, 2, 3, 4, 6, 7, 8] and last == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": 7}, r"model\.window is 7; it must be an even number"),
        ({"heads": 5}, r"model\.heads is 5"),
        ({"temporal_depth": 0}, r"model\.temporal_depth is 0; it must be a whole number"),
        ({"max_frames": 1.5}, r"model\.max_frames is 1\.5"),
        ({"frames_per_forward": 0}, r"model\.frames_per_forward is 0; .*, or null for all"),
        ({"dropout": 1}, r"model\.dropout is 1; it is a share"),
        ({"temporal_dropout": "high"}, r"model\.temporal_dropout is 'high'"),
        ({"drop_path": -1}, r"model\.drop_path is -1"),
        ({"size": 20}, r"8 x 8 pixels and got 20 x 20"),
    ],
)
def test_bad_arguments_are_named(settings, said):
    with torch.device("meta"), pytest.raises(UserError, match=said):
        small(**settings)


LONGFORMER_NAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.self\.", "attn."),
    (r"attention\.output\.dense", "attn.proj"),
    (r"attention\.output\.LayerNorm", "norm1"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"output\.LayerNorm", "norm2"),
    (r"^embeddings\.LayerNorm", "norm"),
    (r"^embeddings\.(\w+)\.weight", r"\1"),
)


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 16, 17, 18, 37, 250])
def test_same_tokens_as_transformers(frames):
    """Theirs pads to whole windows by itself, as the released code does."""
    hf = pytest.importorskip("transformers")
    config = hf.LongformerConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=3, intermediate_size=96,
        attention_window=[18] * 3, max_position_embeddings=288, vocab_size=10, pad_token_id=1,
    )  # fmt: skip
    theirs = shaken(hf.LongformerModel(config, add_pooling_layer=False))
    net = shaken(small())
    state = {}
    for name, tensor in theirs.state_dict().items():
        if "word_embeddings" in name:
            continue  # which vectors in the place of words do without
        for old, new in LONGFORMER_NAMES:
            name = re.sub(old, new, name)
        state[name] = tensor
    net.temporal.load_state_dict(state)
    clip = clip_of(frames, 2)
    with torch.no_grad():
        inputs = torch.cat([net.cls_token.expand(2, -1, -1), net.backbone(clip)], 1)
        attention = torch.zeros(2, 1 + frames, dtype=torch.long)
        attention[:, 0] = 1
        places = torch.tensor([286, *range(frames)]).expand(2, -1)
        other = theirs(
            inputs_embeds=inputs, attention_mask=torch.ones(2, 1 + frames),
            global_attention_mask=attention, position_ids=places,
        ).last_hidden_state  # fmt: skip
        torch.testing.assert_close(net.tokens(clip), other, rtol=1e-4, atol=1e-4)
    assert other.std() > 0.1
    real = hf.LongformerConfig(
        num_hidden_layers=3, attention_window=[18] * 3, max_position_embeddings=288
    )
    with torch.device("meta"):
        model = hf.LongformerModel(real, add_pooling_layer=False)
    words = model.embeddings.word_embeddings.weight.numel()
    assert sum(p.numel() for p in model.parameters()) - words == LONGFORMER == 26_803_200
