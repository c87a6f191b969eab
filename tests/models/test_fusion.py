"""The five fusions: the paper's counts, and how each sees the order of frames."""

import pytest
import torch
import torchvision
from nets import shake_norms
from torch import nn

from vidtrain.layers.conv import FoldedConv3d
from vidtrain.layers.image import torchvision_names
from vidtrain.models import fusion
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError

ALL = ("single_frame", "early_fusion", "late_fusion", "late_fusion_pool", "slow_fusion")
FIXED_LENGTH = ("early_fusion", "late_fusion", "slow_fusion")


def build(name, num_classes=7, num_frames=8, size=32, backbone="small"):
    length = {"num_frames": num_frames} if name in FIXED_LENGTH else {}
    return getattr(fusion, name)(num_classes=num_classes, size=size, backbone=backbone, **length)


def ready(name, **kwargs):
    """In eval mode, with batch norms that have seen data."""
    torch.manual_seed(0)
    return shake_norms(build(name, **kwargs))


@pytest.fixture
def clip():
    return torch.rand(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))


# the paper's network


@pytest.mark.parametrize(
    ("name", "num_frames", "params", "gmacs"),
    [
        ("single_frame", 1, 60_276_583, 1.129),
        ("early_fusion", 10, 60_590_215, 2.044),
        ("late_fusion", 2, 98_025_319, 2.240),
        ("slow_fusion", 10, 61_880_263, 4.147),
    ],
)
def test_counts_of_the_papers_networks(name, num_frames, params, gmacs):
    with torch.device("meta"):
        net = build(name, num_classes=487, num_frames=num_frames, size=170, backbone="karpathy")
    layers = layer_table(net, (3, num_frames, 170, 170))
    assert sum(layer.params for layer in layers) == params
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_slow_fusion_fuses_time_in_three_steps():
    with torch.device("meta"):
        net = build("slow_fusion", num_frames=10, size=170, backbone="karpathy")
    layers = {layer.name: layer for layer in layer_table(net, (3, 10, 170, 170))}
    sizes = [layers[f"backbone.body.conv{i}"].output for i in range(1, 6)]
    assert sizes == [
        [96, 4, 54, 54], [256, 2, 27, 27], [384, 1, 13, 13], [384, 1, 13, 13], [256, 1, 13, 13],
    ]  # fmt: skip
    seen = [layers[f"backbone.body.conv{i}"].receptive_field[0] for i in range(1, 4)]
    assert seen == [4, 6, 10]


def test_normalisation_is_that_of_krizhevsky():
    norm = fusion._karpathy_net(2, 32).body.norm1
    x = torch.rand(1, 9, 2, 2) * 50
    squares = nn.functional.pad(x.pow(2), (0, 0, 0, 0, 2, 2))
    sums = sum(squares[:, i : i + 9] for i in range(5))
    torch.testing.assert_close(norm(x), x / (2 + 1e-4 * sums).sqrt())


def test_frames_too_small_for_the_papers_network():
    with pytest.raises(UserError, match="at least 32 pixels"):
        build("single_frame", size=31, backbone="karpathy")


# the order of frames


@pytest.mark.parametrize(("name", "blind"), [
    ("single_frame", True), ("late_fusion_pool", True), ("late_fusion", False),
    ("early_fusion", False), ("slow_fusion", False),
])  # fmt: skip
def test_who_sees_the_order_of_frames(name, blind, clip):
    net = ready(name)
    with torch.no_grad():
        change = (net(clip) - net(clip.flip(2))).abs().max()
    assert (change < 1e-5) == blind
    assert blind or change > 1e-3


def test_single_frame_averages_probabilities(clip):
    net = ready("single_frame")
    with torch.no_grad():
        frames = torch.stack([net(clip[:, :, t : t + 1]) for t in range(8)])
        torch.testing.assert_close(net(clip).softmax(-1), frames.softmax(-1).mean(0))
        torch.testing.assert_close(
            net(clip[:, :, :1]), net.backbone(clip[:, :, 0])
        )  # logits as they are


def test_pooled_late_fusion_averages_logits_and_not_probabilities(clip):
    net = ready("late_fusion_pool")
    net.classifier.weight.data.mul_(3)  # far from where the softmax is linear
    clip = clip * torch.linspace(0, 2, 8).view(8, 1, 1)
    with torch.no_grad():
        frames = torch.stack([net(clip[:, :, t : t + 1]) for t in range(8)])
        torch.testing.assert_close(net(clip), frames.mean(0), rtol=1e-4, atol=1e-4)
        gap = net(clip).softmax(-1) - frames.softmax(-1).mean(0)
    assert gap.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["single_frame", "late_fusion_pool"])
def test_any_length_and_repeated_frames(name, clip):
    net = ready(name)
    with torch.no_grad():
        for num_frames in (1, 3, 8):
            assert net(clip[:, :, :num_frames]).shape == (2, 7)
        torch.testing.assert_close(net(clip), net(clip.repeat_interleave(2, dim=2)))


@pytest.mark.parametrize("name", FIXED_LENGTH)
def test_another_length_is_refused(name, clip):
    with pytest.raises(UserError, match="8 frames and got 6"):
        ready(name)(clip[:, :, :6])


def test_another_size_is_refused_where_weights_depend_on_it():
    clip = torch.empty(1, 3, 8, 48, 48, device="meta")
    bound = [
        ("single_frame", "karpathy"), ("early_fusion", "karpathy"), ("slow_fusion", "karpathy"),
        ("late_fusion", "small"),
    ]  # fmt: skip
    with torch.device("meta"):
        for name, backbone in bound:
            with pytest.raises(UserError, match="40 x 40 pixels and got 48 x 48"):
                build(name, size=40, backbone=backbone)(clip)
        with pytest.raises(UserError, match="64 x 64 pixels and got 48 x 48"):
            build("late_fusion_pool", size=64, backbone="vit_b_32")(clip)
        for name in ("single_frame", "early_fusion", "late_fusion_pool", "slow_fusion"):
            assert build(name, size=40).eval()(clip).shape == (1, 7)


def test_early_fusion_keeps_the_channels_of_a_frame_together(clip):
    net = ready("early_fusion")
    weight = net.backbone.body.conv1.weight
    assert weight.shape == (16, 24, 3, 3)
    seen = []
    net.backbone.body.conv1.register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    with torch.no_grad():
        net(clip)
        per_frame = [
            nn.functional.conv2d(clip[:, :, t], weight[:, 3 * t : 3 * t + 3], padding=1)
            for t in range(8)
        ]
    torch.testing.assert_close(seen[0], sum(per_frame), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 10, 16])
@pytest.mark.parametrize("backbone", ["small", "resnet18"])
def test_slow_fusion_takes_any_number_of_frames_that_it_is_built_for(num_frames, backbone):
    with torch.device("meta"):
        net = build("slow_fusion", num_frames=num_frames, backbone=backbone).eval()
        clip = torch.empty(2, 3, num_frames, 32, 32)
        assert net(clip).shape == (2, 7)
        assert net.forward_features(clip).shape[:2] == (2, net.num_features)


def test_slow_fusion_keeps_the_clips_of_a_batch_apart():
    net = ready("slow_fusion", num_frames=16)  # 16 -> 7 -> 3 -> 1
    clips = torch.rand(3, 3, 16, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(clips)[1:2], net(clips[1:2]))


# backbones of torchvision

FAMILIES = (
    ("alexnet", 64), ("convnext_tiny", 32), ("densenet121", 32), ("efficientnet_b0", 32),
    ("googlenet", 32), ("mnasnet0_5", 32), ("mobilenet_v2", 32),
    ("mobilenet_v3_small", 32), ("regnet_x_400mf", 32), ("resnet18", 32), ("swin_t", 32),
    ("shufflenet_v2_x0_5", 32), ("squeezenet1_1", 32), ("vgg11", 32), ("vit_b_32", 64),
    ("inception_v3", 75),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "params"),
    [("resnet18", 11_381_712), ("resnet50", 24_327_632)],
)
def test_a_single_frame_backbone_has_torchvisions_parameters(name, params):
    with torch.device("meta"):
        net = build("single_frame", num_classes=400, size=224, backbone=name)
        theirs = torchvision.models.get_model(name, weights=None, num_classes=400)
    assert sum(p.numel() for p in net.parameters()) == params
    assert (
        net.backbone.net.state_dict().keys() == theirs.state_dict().keys()
    )  # its weights would load


@pytest.mark.parametrize(
    ("name", "size"), [*FAMILIES, pytest.param("maxvit_t", 224, marks=pytest.mark.slow)]
)
def test_every_fusion_takes_every_family_of_torchvision(name, size):
    clip = torch.empty(2, 3, 10, size, size, device="meta")
    with torch.device("meta"):
        for which in ("early_fusion", "late_fusion_pool", "slow_fusion"):
            net = build(which, num_frames=10, size=size, backbone=name).eval()
            features = net.forward_features(clip)
            assert net(clip).shape == (2, 7)
            assert features.ndim == 5 and features.shape[:2] == (2, net.num_features)
    assert sum(isinstance(m, FoldedConv3d) for m in net.modules()) + len(net.between) == 3
    assert features.shape[2] == 1  # 10 frames -> 4 -> 2 -> 1


def test_slow_fusion_on_a_residual_backbone_sees_every_frame():
    net = ready("slow_fusion", num_frames=10, backbone="resnet18")
    clip = torch.rand(1, 3, 10, 32, 32, requires_grad=True)
    net(clip)[0, 0].backward()
    assert (clip.grad.abs().sum((0, 1, 3, 4)) > 0).all()


def test_a_backbone_that_does_not_exist_is_named_with_the_nearest():
    with pytest.raises(UserError, match="no 'resnet-18'; did you mean 'resnet18'"):
        build("slow_fusion", backbone="resnet-18")
    with pytest.raises(UserError, match="did you mean 'karpathy'"):
        build("slow_fusion", backbone="karpathi")


def test_a_backbone_that_cannot_take_the_frames_says_so():
    with pytest.raises(UserError, match="vit_b_32 does not take frames of 100 pixels"):
        build("single_frame", size=100, backbone="vit_b_32")


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision_names())
def test_every_backbone_of_torchvision(name):
    clip = torch.empty(1, 3, 10, 224, 224, device="meta")
    with torch.device("meta"):
        for which in ALL:
            net = build(which, num_frames=10, size=224, backbone=name).eval()
            assert net(clip).shape == (1, 7)
            assert net.forward_features(clip).shape[:2] == (1, net.num_features)
