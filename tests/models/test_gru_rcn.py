"""GRU-RCN and the lecture's RCN: sizes and counts, causality, directions, levels."""

import pytest
import torch
from torch import nn

from vidtrain.models.gru_rcn import gru_rcn, rcn
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError

CLIP = (3, 10, 224, 224)
PARAMS = [331_968, 1_327_488, 5_309_184, 5_309_184, 7_079_424]
GMACS = [1.040, 1.040, 1.040, 0.260, 0.007]  # of a step
STATES = [(64, 56), (128, 28), (256, 14), (256, 7), (512, 1)]


def small(**kwargs) -> nn.Module:
    """A narrow one for frames of 64 pixels."""
    torch.manual_seed(0)
    kwargs = {"backbone": "small", "dims": (4, 5, 6, 7, 8), "size": 64} | kwargs
    return gru_rcn(3, **kwargs).eval()


@pytest.fixture(scope="module")
def on_meta():
    with torch.device("meta"):
        return gru_rcn(num_classes=101).eval()


def test_parameters_and_multiply_adds_of_every_level(on_meta):
    rows = {row.name: row for row in layer_table(on_meta, CLIP)}
    units = [rows[f"units.0.{level}"] for level in range(5)]
    assert [row.params for row in units] == PARAMS
    assert sum(row.params for row in units) == 19_357_248
    for row, gmacs in zip(units, GMACS, strict=True):
        assert row.macs / 10 / 1e9 == pytest.approx(gmacs, rel=0.015)
    assert sum(row.macs for row in units) / 10 / 1e9 == pytest.approx(3.387, rel=0.01)
    # beside VGG-16 without its last layer, and five classifiers
    vgg = 138_357_544 - 4097 * 1000
    classifiers = sum(dim + 1 for dim, _ in STATES) * 101
    assert sum(row.params for row in rows.values()) == 19_357_248 + vgg + classifiers
    vgg_macs = 15.470e9 - 4096 * 1000
    frames = [row.macs for name, row in rows.items() if name.startswith("backbone.")]
    assert sum(frames) / 10 == pytest.approx(vgg_macs, rel=1e-3)


def test_states_are_the_papers(on_meta):
    """B5.6."""
    with torch.no_grad():
        (states,) = on_meta.states(torch.empty(2, *CLIP, device="meta"))
    sizes = [tuple(state.shape) for state in states]
    assert sizes == [(10, 2, dim, side, side) for dim, side in STATES]


def test_levels_are_vggs_pools_and_fc7():
    net = gru_rcn(3, size=32, dims=(2, 2, 2, 2, 2)).eval()
    frames = torch.randn(2, 3, 32, 32)
    vgg = net.backbone.net.net
    with torch.no_grad():
        percepts = net.backbone(frames)
        for percept, end in zip(percepts, (10, 17, 24, 31), strict=False):
            assert isinstance(vgg.features[end - 1], nn.MaxPool2d)
            torch.testing.assert_close(percept, vgg.features[:end](frames), rtol=0, atol=0)
        fc6_fc7 = nn.Sequential(vgg.avgpool, nn.Flatten(), vgg.classifier[:2], vgg.classifier[3:5])
        torch.testing.assert_close(percepts[4][..., 0, 0], fc6_fc7(vgg.features(frames)))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_answers_features_and_embedding(stacked, bidirectional):
    net = small(stacked=stacked, bidirectional=bidirectional)
    ways = 2 if bidirectional else 1
    clip = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        assert net(clip).shape == (2, 5, 3)
        assert net.forward_features(clip).shape == (2, 7 * ways, 4, 4, 4)
        assert net.num_features == 7 * ways
        net.reset_classifier(0)
        assert net(clip).shape == (2, (4 + 5 + 6 + 7 + 8) * ways)


def test_first_states_do_not_see_later_frames_and_backward_ones_do():
    net = small(bidirectional=True)
    clip = torch.randn(1, 3, 6, 64, 64)
    changed = clip.clone()
    changed[:, :, 4:] += 1
    with torch.no_grad():
        before, after = net.forward_features(clip), net.forward_features(changed)
    forward, backward = slice(0, 7), slice(7, 14)
    torch.testing.assert_close(after[:, forward, :4], before[:, forward, :4], rtol=0, atol=1e-5)
    for part, when in ((forward, slice(4, 6)), (backward, slice(0, 4)), (backward, slice(4, 6))):
        assert (after[:, part, when] - before[:, part, when]).abs().amax() > 1e-4


def test_the_backward_units_read_the_clip_from_its_end():
    net = small(bidirectional=True)
    net.units[1].load_state_dict(net.units[0].state_dict())
    clip = torch.randn(1, 3, 5, 64, 64)
    with torch.no_grad():
        ahead, back = net.states(clip)
        turned, _ = net.states(clip.flip(2))
    for one, other in zip(back, turned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert not torch.allclose(ahead[0], back[0], atol=1e-4)


def test_stacked_units_see_the_level_below_and_others_do_not():
    clip = torch.randn(1, 3, 3, 64, 64)
    for stacked in (False, True):
        net = small(stacked=stacked)
        with torch.no_grad():
            (before,) = net.states(clip)
            for parameter in net.units[0][0].parameters():
                parameter.mul_(3)
            (after,) = net.states(clip)
        changed = [bool((a - b).abs().amax() > 1e-6) for a, b in zip(after, before, strict=True)]
        assert changed == [True, *[stacked] * 4]
    # its units have one more convolution, over the pooled states below
    with torch.device("meta"):
        plain, extra = (gru_rcn(3, stacked=stacked).units[0] for stacked in (False, True))
    more = [
        sum(p.numel() for p in b.parameters()) - sum(p.numel() for p in a.parameters())
        for a, b in zip(plain, extra, strict=True)
    ]
    assert more == [0, 27 * 64 * 128, 27 * 128 * 256, 27 * 256 * 256, 3 * 256 * 512]


def test_each_classifier_reads_its_own_level_alone():
    net = small()
    clip = torch.randn(1, 3, 3, 64, 64)
    with torch.no_grad():
        before = net(clip)
        for level in range(5):
            net.units[0][level].candidate.weight.mul_(-2)
            after = net(clip)
            changed = [(after[:, k] - before[:, k]).abs().amax() > 1e-6 for k in range(5)]
            assert changed == [k == level for k in range(5)]
            before = after


def test_a_videos_score_is_the_mean_of_five_softmaxes():
    """B5.11, through the task."""
    from vidtrain.tasks.classification import Classification

    task = Classification(3)
    task.model = small()
    clip = torch.randn(2, 1, 3, 3, 64, 64)
    batch = {"video": clip, "label": torch.tensor([0, 2])}
    with torch.no_grad():
        answers = task.model(clip[:, 0])
        scores = task.eval().step(batch).scores
    torch.testing.assert_close(scores, answers.softmax(-1).mean(1))
    assert not torch.allclose(scores, answers.mean(1).softmax(-1), atol=1e-7)


def test_a_frozen_backbone_has_no_noise_in_training():
    net = small(backbone="vgg11", size=32).train()
    frames = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = net.backbone(frames), net.backbone(frames)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


def test_a_backbone_without_maps_of_four_sizes_is_refused():
    with torch.device("meta"):
        with pytest.raises(UserError, match="vit_b_16: gru_rcn reads maps of 4 sizes"):
            gru_rcn(3, backbone="vit_b_16")
        with pytest.raises(UserError, match="swin_t: gru_rcn reads maps of 4 sizes"):
            gru_rcn(3, backbone="swin_t")
        with pytest.raises(UserError, match="gru_rcn has 5 levels"):
            gru_rcn(3, dims=(1, 2, 3))


# the lecture's


def test_rcn_of_any_depth():
    clip = torch.randn(2, 3, 4, 32, 32)
    for dims in ((8,), (4, 6, 8, 10)):
        net = rcn(3, size=32, dims=dims).eval()
        with torch.no_grad():
            side = 32 // 2 ** len(dims)
            assert net(clip).shape == (2, 3)
            assert net.forward_features(clip).shape == (2, dims[-1], 4, side, side)
    with pytest.raises(UserError, match=r"dims is \[\]"):
        rcn(3, dims=())


def test_rcn_layers_are_the_lectures_equation():
    net = rcn(3, size=16, dims=(4, 5)).eval()
    clip = torch.randn(1, 3, 3, 16, 16)
    below = list(clip[0].movedim(1, 0))  # frames
    for layer in net.layers:
        h, states = torch.zeros_like(layer.input(below[0])), []
        for x in below:
            h = torch.tanh(layer.hidden(h) + layer.input(x))
            states.append(h)
        below = states
    expected = net.classifier(below[-1].mean((1, 2)))
    torch.testing.assert_close(net(clip)[0], expected)


def test_rcn_on_a_backbones_map_is_causal():
    net = rcn(3, size=64, backbone="squeezenet1_1", dims=(6,), stride=1).eval()
    clip = torch.randn(1, 3, 5, 64, 64)
    changed = clip.clone()
    changed[:, :, 3:] += 1
    with torch.no_grad():
        before, after = net.forward_features(clip), net.forward_features(changed)
    torch.testing.assert_close(after[:, :, :3], before[:, :, :3], rtol=0, atol=1e-5)
    assert (after[:, :, 3:] - before[:, :, 3:]).abs().amax() > 1e-4


def test_rcn_parameters_and_multiply_adds():
    with torch.device("meta"):
        net = rcn(101).eval()
    rows = {row.name: row for row in layer_table(net, (3, 16, 112, 112))}
    assert rows["layers.2"].params == 221_312  # the lecture's 64 -> 128
    assert sum(row.params for row in rows.values()) == 299_813
    assert sum(row.macs for row in rows.values()) / 1e9 == pytest.approx(1.893, rel=1e-3)
