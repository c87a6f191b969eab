"""C2D, I3D-ResNet and Slow: counts, what they see of time, and the same logits as others' code."""

import re

import pytest
import torch
import torchvision
from nets import counts, shake_norms
from torch import nn

from vidtrain.models import slow
from vidtrain.models.slow import C2D, I3D, SLOW, ResNet3d
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError


@pytest.mark.parametrize(
    ("name", "frames", "params", "at_224", "at_256"),
    [
        ("c2d_r50_8x8", 8, 24_327_632, 19.4932, 25.4602),
        ("i3d_r50_8x8", 8, 28_043_472, 28.4077, 37.1036),
        ("i3d_r50_nl_8x8", 8, 35_401_936, 36.5354, 48.9148),
        ("slow_r50_4x16", 4, 32_454_096, 20.8708, 27.2596),
        ("slow_r50_8x8", 8, 32_454_096, 41.7408, 54.5184),
    ],
)
def test_parameters_and_multiply_adds(name, frames, params, at_224, at_256):
    with torch.device("meta"):
        net = getattr(slow, name)(400)
    assert counts(net, frames, 224) == (params, pytest.approx(at_224, abs=1e-3))
    assert counts(net, frames, 256) == (params, pytest.approx(at_256, abs=1e-3))


@pytest.mark.parametrize(
    ("depth", "kernels", "pool", "attend", "at", "params", "gmacs"),
    [
        (50, C2D, True, "embedded_gaussian", ((), (1, 3), (1, 3, 5), ()), 31_686_096, 27.6209),
        (50, SLOW, False, "embedded_gaussian", ((), (1, 3), (1, 3, 5), ()), 39_812_560, 63.9756),
        (101, I3D, True, None, ((), (), (), ()), 51_754_192, 46.9559),
        (101, I3D, True, "embedded_gaussian", ((), (1, 3), (6, 13, 20), ()), 59_112_656, 55.0836),
    ],
)
def test_other_depths_and_places(depth, kernels, pool, attend, at, params, gmacs):
    with torch.device("meta"):
        net = ResNet3d(400, depth, kernels, pool, attend, at)
    assert counts(net, 8, 224) == (params, pytest.approx(gmacs, abs=1e-3))


def test_non_local_blocks_are_an_argument_of_all():
    for name in ("c2d_r50_8x8", "i3d_r50_8x8", "slow_r50_4x16", "slow_r50_8x8"):
        with torch.device("meta"):
            build = getattr(slow, name)
            plain, attending = build(400), build(400, non_local="dot_product")
        extra = counts(attending, 8, 64)[0] - counts(plain, 8, 64)[0]
        assert extra == 7_358_464 == 2 * 526_592 + 3 * 2_101_760
        blocks = [key for key, _ in attending.named_modules() if re.search(r"after\d$", key)]
        assert blocks == ["res3.after1", "res3.after3", "res4.after1", "res4.after3", "res4.after5"]


@pytest.mark.parametrize(
    ("name", "stem", "stages", "frames_out"),
    [
        ("c2d_r50_8x8", 1, [[1] * 3, [1] * 4, [1] * 6, [1] * 3], 4),
        ("i3d_r50_8x8", 5, [[3] * 3, [3, 1, 3, 1], [3, 1] * 3, [1, 3, 1]], 4),
        ("slow_r50_8x8", 1, [[1] * 3, [1] * 4, [3] * 6, [3] * 3], 8),
    ],
)
def test_temporal_kernels_and_sizes(name, stem, stages, frames_out):
    with torch.device("meta"):
        net = getattr(slow, name)(400)
    assert net.stem.conv.kernel_size == (stem, 7, 7)
    for number, spans in enumerate(stages, 2):
        convs = [block.conv_a.kernel_size for block in getattr(net, f"res{number}")]
        assert convs == [(span, 1, 1) for span in spans]
    layers = {layer.name: layer.output for layer in layer_table(net, (3, 8, 224, 224))}
    assert layers["stem.pool"] == [64, 8, 56, 56]
    assert layers["res2.2.norm_c"] == [256, 8, 56, 56]
    assert layers["res3.3.norm_c"] == [512, frames_out, 28, 28]
    assert layers["res4.5.norm_c"] == [1024, frames_out, 14, 14]
    assert layers["res5.2.norm_c"] == [2048, frames_out, 7, 7]


def to_torchvision(key: str) -> str:
    """Name of one of our tensors in torchvision's 2D ResNet."""
    if key.startswith("stem."):
        return key.replace("stem.conv", "conv1").replace("stem.norm", "bn1")
    if key.startswith("head."):
        return key.replace("head.proj", "fc")
    stage, block, layer, kind = key.split(".")
    names = {
        "conv_a": "conv1", "conv_b": "conv2", "conv_c": "conv3", "shortcut_conv": "downsample.0",
        "norm_a": "bn1", "norm_b": "bn2", "norm_c": "bn3", "shortcut_norm": "downsample.1",
    }  # fmt: skip
    return f"layer{int(stage[3:]) - 1}.{block}.{names[layer]}.{kind}"


def test_c2d_on_a_still_is_the_2d_network():
    net = shake_norms(slow.c2d_r50_8x8(10), last="norm_c")
    flat = torchvision.models.resnet50(num_classes=10).eval()
    wanted = flat.state_dict()
    state = {to_torchvision(key): tensor for key, tensor in net.state_dict().items()}
    assert state.keys() == wanted.keys()
    state = {
        key: tensor.squeeze(2) if tensor.ndim == 5 else tensor for key, tensor in state.items()
    }
    assert {key: t.shape for key, t in state.items()} == {k: t.shape for k, t in wanted.items()}
    flat.load_state_dict(state)
    frames = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        still = frames.unsqueeze(2).expand(-1, -1, 8, -1, -1)
        logits = flat(frames)
        torch.testing.assert_close(net(still), logits, rtol=1e-5, atol=1e-4)
        assert logits.std() > 0.1


def test_what_each_sees_of_the_order_of_frames():
    clip = torch.randn(1, 3, 8, 32, 32)
    pairs = clip[:, :, [1, 0, 3, 2, 5, 4, 7, 6]]
    orders = {
        "c2d_r50_8x8": (False, False),  # a max over pairs, then a mean: no order at all
        "i3d_r50_8x8": (True, True),
        "slow_r50_8x8": (True, True),
        "slow_r50_4x16": (True, True),
    }
    for name, (of_pairs, backwards) in orders.items():
        net = shake_norms(getattr(slow, name)(5, width=8), last="norm_c")
        with torch.no_grad():
            logits = net(clip)
            assert torch.allclose(net(pairs), logits, atol=1e-4) != of_pairs, name
            assert torch.allclose(net(clip.flip(2)), logits, atol=1e-4) != backwards, name


def test_slow_is_shared_by_its_two_clips():
    with torch.device("meta"):
        four, eight = slow.slow_r50_4x16(7), slow.slow_r50_8x8(7)
    assert [(k, t.shape) for k, t in four.state_dict().items()] == [
        (k, t.shape) for k, t in eight.state_dict().items()
    ]


def test_blocks_that_start_as_their_shortcut():
    torch.manual_seed(0)
    net = slow.i3d_r50_nl_8x8(5, width=8)
    closed = [key for key, p in net.named_parameters() if p.ndim == 1 and not p.any()]
    closed = [key for key in closed if key.endswith("weight")]
    assert len(closed) == 16 + 5
    assert all(re.search(r"(norm_c|after\d\.norm)\.weight$", key) for key in closed)
    plain = slow.i3d_r50_8x8(5, width=8)
    plain.load_state_dict(net.state_dict(), strict=False)
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():  # a non-local block begins as nothing at all
        assert torch.equal(net.eval()(clip), plain.eval()(clip))
    open_net = slow.i3d_r50_8x8(5, width=8, zero_init=False)
    assert all(p.any() for key, p in open_net.named_parameters() if key.endswith("norm_c.weight"))


def test_first_weights_of_the_classifier():
    torch.manual_seed(0)
    proj = slow.slow_r50_8x8(400, width=16).head.proj
    assert proj.weight.std().item() == pytest.approx(0.01, rel=0.02) and not proj.bias.any()


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 32, 32), (5, 48, 80), (16, 33, 47)])
def test_any_clip(frames, height, width):
    clip = torch.randn(1, 3, frames, height, width)
    for name in ("i3d_r50_nl_8x8", "slow_r50_8x8"):
        net = shake_norms(getattr(slow, name)(5, width=8), last="norm_c")
        with torch.no_grad():
            logits = net(clip)
            features = net.forward_features(clip)
            assert logits.shape == (1, 5) and logits.isfinite().all()
            t = frames // 2 if name.startswith("i3d") else frames
            assert features.shape == (1, 256, t, -(-height // 32), -(-width // 32))
            net.reset_classifier(0)
            torch.testing.assert_close(net(clip), features.mean((2, 3, 4)))


def test_bad_arguments_are_named():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"model\.non_local is 'softmax'"):
            slow.c2d_r50_8x8(5, non_local="softmax")
        with pytest.raises(UserError, match=r"model\.depth is 34"):
            ResNet3d(5, 34, C2D, True)
        with pytest.raises(UserError, match=r"one frame; clip\.num_frames=2 or more"):
            slow.c2d_r50_8x8(5)(torch.empty(1, 3, 1, 64, 64))
        assert slow.slow_r50_4x16(5)(torch.empty(1, 3, 1, 64, 64)).shape == (1, 5)


def from_pytorchvideo(key: str, pooled: bool) -> str:
    """Name in our networks of one of PyTorchVideo's tensors."""
    block = int(key.split(".")[1])
    if block == 0:
        return re.sub(r"^blocks\.0\.", "stem.", key)
    if key.startswith(f"blocks.{block}.proj"):
        return re.sub(r"^blocks\.\d\.", "head.", key)
    stage = block + 1 - (pooled and block > 1)  # the pool behind res2 is a block as well
    key = re.sub(r"^blocks\.\d\.res_blocks\.", f"res{stage}.", key)
    return key.replace("branch1_", "shortcut_").replace("branch2.", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "frames"),
    [
        ("c2d_r50_8x8", "c2d_r50", 8),
        ("i3d_r50_8x8", "i3d_r50", 8),
        ("slow_r50_8x8", "slow_r50", 8),
        ("slow_r50_4x16", "slow_r50", 4),
    ],
)
def test_same_logits_as_pytorchvideo(name, theirs, frames):
    hub = pytest.importorskip("pytorchvideo.models.hub")
    other = shake_norms(getattr(hub, theirs)(pretrained=False), last="norm_c")
    if frames == 4:
        other.blocks[-1].pool = nn.AvgPool3d((4, 7, 7), stride=1)
    net = getattr(slow, name)(400).eval()
    pooled = not name.startswith("slow")
    state = {from_pytorchvideo(key, pooled): t for key, t in other.state_dict().items()}
    net.load_state_dict(state)
    clip = torch.randn(1, 3, frames, 224, 224)
    with torch.no_grad():
        logits = other(clip)
        torch.testing.assert_close(net(clip), logits, rtol=0, atol=1e-4)
        assert logits.std() > 0.1
