"""CNN + LSTM: counts, which step knows what, pieces, frozen backbones and cached features."""

import copy

import pytest
import torch
from nets import shake_norms
from torch import nn

from vidtrain.models.c3d import c3d
from vidtrain.models.cnn_lstm import cnn_lstm
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError


def small(**kwargs) -> nn.Module:
    """A narrow one on frames of 64 pixels, whose LSTM does more than the paper's tiny first weights."""
    torch.manual_seed(0)
    net = cnn_lstm(3, **{"size": 64, "backbone": "squeezenet1_1", "hidden": 8} | kwargs).eval()
    for parameter in net.lstm.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(net.classifier.weight, std=0.5)
    return net


@pytest.mark.parametrize(
    ("kwargs", "lstm", "params", "gmacs"),
    [
        ({}, 4_458_496, 44_706_981, 11.206),
        ({"modality": "flow", "hidden": 1024}, 20_979_712, 61_298_021, 11.10),
        ({"features": 1024, "hidden": 512}, 3_149_824, 3_201_637, 0.0512),
    ],
)
def test_parameters_and_multiply_adds(kwargs, lstm, params, gmacs):
    with torch.device("meta"):
        net = cnn_lstm(101, **kwargs).eval()
    shape = {"video": (3, 16, 227, 227), "flow": (2, 16, 227, 227), "features": (1024, 16)}
    rows = layer_table(net, shape[net.inputs[0]])
    assert sum(row.params for row in rows if row.name == "lstm") == lstm
    assert sum(row.params for row in rows) == params
    assert sum(row.macs for row in rows) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_fc6_is_torchvisions():
    net = small(backbone="alexnet")
    alexnet = net.backbone.image.net
    clip = torch.randn(2, 3, 2, 64, 64)
    with torch.no_grad():
        features = net.forward_features(clip)
        assert features.shape == (2, 4096, 2, 1, 1)
        pooled = alexnet.avgpool(alexnet.features(clip[:, :, 1])).flatten(1)
        fc6 = torch.relu(alexnet.classifier[0](pooled))
    torch.testing.assert_close(features[:, :, 1, 0, 0], fc6)
    # torchvision's own weights go in by its own names
    import torchvision.models as tv

    with torch.device("meta"):
        theirs = tv.alexnet().state_dict()
    ours = alexnet.state_dict()
    assert all(theirs[key].shape == tensor.shape for key, tensor in ours.items())
    assert set(theirs) - set(ours) == {
        f"classifier.{i}.{p}" for i in (4, 6) for p in ("weight", "bias")
    }


def test_a_fully_connected_layer_sees_where_things_are():
    """The mean of a map says the same of two maps that are one another's mirror image."""
    means, places = small(backbone="small"), small(backbone="small", fc6=16)
    maps = torch.rand(2, 128, 4, 4)

    def steps(net, maps):
        net.backbone.image.to_map = lambda x: maps
        return net.forward_features(torch.zeros(2, 3, 1, 64, 64)).mean((3, 4))

    assert places.num_features == 16 and steps(places, maps).shape == (2, 16, 1)
    torch.testing.assert_close(steps(means, maps.flip(3)), steps(means, maps))
    assert (steps(places, maps.flip(3)) - steps(places, maps)).abs().amax() > 1e-3
    with pytest.raises(UserError, match="built for frames of 64 pixels and got 48 x 48"):
        places(torch.randn(1, 3, 2, 48, 48))


@pytest.mark.parametrize("layers", [1, 2])
def test_many_to_one_is_the_last_step_of_many_to_many(layers):
    """B5.1."""
    every = small(layers=layers)
    last = small(layers=layers, answers="last")
    last.load_state_dict(every.state_dict())
    clip = torch.randn(2, 3, 5, 64, 64)
    with torch.no_grad():
        answers = every(clip)
        assert answers.shape == (2, 5, 3) and last(clip).shape == (2, 3)
        torch.testing.assert_close(last(clip), answers[:, -1], rtol=0, atol=1e-6)
        assert not torch.allclose(answers[:, -1], answers[:, 0], atol=1e-3)


def test_a_step_knows_only_what_has_been():
    """B5.2."""
    net = small(features=6)
    x = torch.randn(2, 6, 16)
    before = net(x)
    x[:, :, 10:] += 1
    after = net(x)
    assert torch.equal(after[:, :10], before[:, :10])
    assert (after[:, 10:] - before[:, 10:]).abs().amin() > 1e-4


@pytest.mark.parametrize("kwargs", [{}, {"features": 6}, {"features": 6, "layers": 2}])
def test_a_long_video_in_pieces_is_the_whole(kwargs):
    """B5.3."""
    net = small(**kwargs)
    x = torch.randn(2, 6, 12) if kwargs else torch.randn(2, 3, 12, 64, 64)
    with torch.no_grad():
        whole, state, answers = net(x), None, []
        for first in range(0, 12, 5):
            answer, state = net.stream(x[:, :, first : first + 5], state)
            answers.append(answer)
    torch.testing.assert_close(torch.cat(answers, 1), whole, rtol=0, atol=1e-5)
    alone, _ = net.stream(x[:, :, 5:10])
    assert not torch.allclose(alone, whole[:, 5:10], atol=1e-3)  # the state matters


def test_cached_features_of_a_frozen_backbone_give_the_same():
    """B5.4: no gradient, no change, nothing for the optimizer, the same logits from a file."""
    net = small(backbone="resnet18", dropout_features=0.0, dropout=0.0)
    shake_norms(net)
    net.backbone.requires_grad_(False)
    before = copy.deepcopy(net.backbone.state_dict())
    head = small(features=512, dropout_features=0.0, dropout=0.0)
    head.load_state_dict(
        {key: value for key, value in net.state_dict().items() if not key.startswith("backbone.")}
    )
    clip, label = torch.randn(2, 3, 4, 64, 64), torch.tensor([0, 2])
    with torch.no_grad():
        cached = net.forward_features(clip).mean((3, 4))
    assert cached.shape == (2, 512, 4)

    for one in (net, head):
        one.train()
    net.backbone.eval()
    optimizers = [
        torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.5)
        for one in (net, head)
    ]
    assert [len(o.param_groups[0]["params"]) for o in optimizers] == [6, 6]
    for _ in range(3):
        logits = [net(clip), head(cached)]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
        for answer, optimizer in zip(logits, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(answer[:, -1], label).backward()
            optimizer.step()
    assert all(parameter.grad is None for parameter in net.backbone.parameters())
    for key, value in net.backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_scores_of_all_steps_or_the_last():
    scores = torch.randn(2, 4, 3).softmax(-1)
    torch.testing.assert_close(small(features=6).fuse(scores), scores.mean(1))
    torch.testing.assert_close(small(features=6, score="last").fuse(scores), scores[:, 3])


def test_a_3d_backbone_in_parts_of_a_clip():
    def backbone() -> nn.Module:
        torch.manual_seed(1)
        return c3d(0, num_frames=16, size=32)

    net = small(num_frames=32, size=32, backbone3d=backbone(), segments=2)
    assert net.inputs == ("video",) and net.num_features == 512
    clip = torch.randn(1, 3, 32, 32, 32) * 50
    with torch.no_grad():
        features = net.forward_features(clip)
        assert features.shape == (1, 512, 4, 2, 2)
        alone = backbone().forward_features(clip[:, :, 16:])
        torch.testing.assert_close(features[:, :, 2:], alone)
        assert net(clip).shape == (1, 4, 3)
    # what the map does not need is not there: C3D's fully connected layers are 50 of 78 million
    left = {name.split(".")[2] for name, _ in net.backbone.named_parameters() if "net" in name}
    names = {name.split(".")[1] for name, _ in net.backbone.named_parameters()}
    assert "conv5b" in names and not {"fc6", "fc7"} & names, left


def test_a_3d_backbone_by_the_config(compose):
    from vidtrain import build

    node = "model.backbone3d={_target_: vidtrain.models.small_3d_cnn.small_3d_cnn, num_classes: 0}"
    cfg = compose("train", "model=cnn_lstm", "clip.size=64", node)
    with torch.device("meta"):
        net = build.model(cfg).eval()
        assert net(torch.empty(1, 3, 16, 64, 64)).shape[2] == 8
        assert not any("image" in name for name, _ in net.named_modules())


def test_first_weights_are_the_papers():
    net = cnn_lstm(50, features=64)
    weights = torch.cat(
        [p.flatten() for name, p in net.lstm.named_parameters() if "weight" in name]
    )
    assert 0.0099 < weights.abs().max() <= 0.01
    assert weights.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.02)
    assert not any(p.any() for name, p in net.lstm.named_parameters() if "bias" in name)
    assert net.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"answers": "first"}, "model.answers is 'first'"),
        ({"score": "max"}, "model.score is 'max'"),
        ({"modality": "sound"}, "model.modality is 'sound'"),
        ({"fc6": 8}, "model.fc6 is 8, but alexnet has its own"),
        ({"fc6": 0, "backbone": "small"}, "model.fc6 is 0; it must be at least 1"),
        ({"fc6": 8, "features": 6}, "only a 2D backbone takes one"),
        ({"backbone": "alexnt"}, "did you mean 'alexnet'"),
        ({"backbone3d": nn.Linear(1, 1)}, "model.backbone3d must be one of vidtrain's"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        cnn_lstm(3, **kwargs)


def test_clips_and_features_that_do_not_fit_are_named():
    with torch.device("meta"):
        net = c3d(0, num_frames=16, size=32)
        with pytest.raises(UserError, match=r"segments is 3; it must divide clip\.num_frames, 16"):
            cnn_lstm(3, size=32, backbone3d=net, segments=3)
        with pytest.raises(UserError, match="does not take 1 frames of 32 pixels"):
            cnn_lstm(3, size=32, backbone3d=net, segments=16)
        with pytest.raises(UserError, match=r"set model\.features=512"):
            cnn_lstm(3, features=256)(torch.empty(1, 512, 8))


def test_first_weights():
    torch.manual_seed(0)
    paper, scratch = (
        cnn_lstm(3, features=6, hidden=16, **kwargs) for kwargs in ({}, {"init": None})
    )
    assert max(p.abs().max() for p in paper.lstm.parameters()) <= 0.01
    assert 0.005 < paper.classifier.weight.std() < 0.02 and not paper.classifier.bias.any()
    weights = torch.cat([p.flatten() for p in scratch.lstm.parameters() if p.ndim == 2])
    assert 0.2 < weights.abs().max() <= 0.25
    with (
        torch.no_grad()
    ):  # with no input, and none of its own, half the state would be lost at each step
        state = tuple(torch.ones(1, 1, 16) for _ in range(2))
        for net, kept in ((paper, 0.5), (scratch, 0.731)):
            for parameter in net.lstm.parameters():
                if parameter.ndim == 2:
                    parameter.zero_()
            _, (_, cell) = net.lstm(torch.zeros(1, 1, 6), state)
            torch.testing.assert_close(cell, torch.full_like(cell, kept), atol=1e-3, rtol=0)
