"""R3D, MC3 and R(2+1)D against torchvision, and against the paper's sizes."""

import pytest
import torch
import torchvision.models.video as tv
from nets import compiled_for_gpu, shake_norms
from torch import nn

from vidtrain.models import resnet3d
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError

CLIP = (3, 16, 112, 112)
NAMES = ["r3d_18", "mc3_18", "r2plus1d_18"]


def pair(name: str, num_classes: int = 11) -> tuple[nn.Module, nn.Module]:
    """Make torchvision's network and ours with its weights."""
    torch.manual_seed(0)
    theirs = getattr(tv, name)(num_classes=num_classes)
    shake_norms(theirs)
    ours = getattr(resnet3d, name)(num_classes)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_torchvisions(name):
    theirs, ours = pair(name)
    clip = torch.randn(2, 3, 8, 40, 56)
    with torch.no_grad():
        expected = theirs.eval()(clip)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours.eval()(clip), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiler_is_given_what_torchvisions_gives_it(name):
    """Same operations, shapes and memory orders: neither can become faster code than the other."""
    clips = (8, *CLIP)
    ours = compiled_for_gpu(lambda: getattr(resnet3d, name)(11), clips)
    assert sum(count for op, count in ours.items() if op.startswith("aten.convolution")) >= 20
    assert ours == compiled_for_gpu(lambda: getattr(tv, name)(num_classes=11), clips)


def test_a_training_step_is_torchvisions():
    theirs, ours = pair("r2plus1d_18")
    clip, labels = torch.randn(2, 3, 4, 32, 32), torch.tensor([3, 10])
    for net in (theirs, ours):
        nn.functional.cross_entropy(net.train()(clip), labels).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
    for name, buffer in theirs.named_buffers():  # the norms' statistics move alike
        torch.testing.assert_close(ours.get_buffer(name), buffer)


@pytest.mark.parametrize(
    ("name", "params", "gmacs", "frames"),
    [
        ("r3d_18", 33_371_472, 40.6966, [16, 8, 4, 2]),
        ("mc3_18", 11_695_440, 43.3426, [16, 16, 16, 16]),
        ("r2plus1d_18", 31_505_325, 40.5191, [16, 8, 4, 2]),
    ],
)
def test_parameters_multiply_adds_and_sizes(name, params, gmacs, frames):
    with torch.device("meta"):
        layers = layer_table(getattr(resnet3d, name)(400), CLIP)
    assert sum(layer.params for layer in layers) == params
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gmacs, abs=1e-4)
    outputs = {layer.name: layer.output for layer in layers}
    assert [layer.output for layer in layers if layer.name.startswith("stem.")][-1] == [
        64,
        16,
        56,
        56,
    ]
    for stage, t in enumerate(frames):
        side = 56 >> stage
        assert outputs[f"layer{stage + 1}.1.relu"] == [64 << stage, t, side, side]


def test_channels_inside_a_2plus1d_convolution():
    with torch.device("meta"):
        net = resnet3d.r2plus1d_18(5)
    inside = {
        f"{stage}.{block}": [
            getattr(net.get_submodule(f"layer{stage}.{block}"), conv)[0][0].out_channels
            for conv in ("conv1", "conv2")
        ]
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
    }
    assert net.stem[0].out_channels == 45
    assert inside == {
        "1.0": [144, 144], "1.1": [144, 144], "2.0": [230, 230], "2.1": [288, 288],
        "3.0": [460, 460], "3.1": [576, 576], "4.0": [921, 921], "4.1": [1152, 1152],
    }  # fmt: skip
    first, second = net.layer2[0].conv1[0][0], net.layer2[0].conv1[0][3]
    assert first.stride == (1, 2, 2) and second.stride == (2, 1, 1)


def test_a_2plus1d_block_is_about_as_large_as_a_3d_one():
    with torch.device("meta"):
        nets = resnet3d.r3d_18(5), resnet3d.r2plus1d_18(5)
    sizes = [
        sum(m.weight.numel() for m in net.layer1.modules() if isinstance(m, nn.Conv3d))
        for net in nets
    ]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_mc3_mixes_frames_in_stem_and_first_stage_alone():
    with torch.device("meta"):
        net = resnet3d.mc3_18(5)
    extents = {
        name: module.kernel_size[0]
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv3d) and "downsample" not in name
    }
    spanning = {name for name, extent in extents.items() if extent == 3}
    assert spanning == {name for name in extents if name.startswith(("stem", "layer1"))}


@pytest.mark.parametrize("name", NAMES)
def test_narrow(name):
    build = getattr(resnet3d, name)
    net = build(5, width=8)
    wide = sum(p.numel() for p in tv.__dict__[name](num_classes=5).parameters())
    assert sum(p.numel() for p in net.parameters()) < wide / 50
    with torch.no_grad():
        assert net.eval().forward_features(torch.randn(1, 3, 5, 33, 17)).shape[:2] == (1, 64)
        assert net(torch.randn(1, 3, 1, 16, 16)).shape == (1, 5)  # down to one frame


def test_first_weights():
    torch.manual_seed(0)
    net = resnet3d.r3d_18(100)
    weight = net.layer3[1].conv2[0].weight
    assert weight.std().item() == pytest.approx((2 / (256 * 27)) ** 0.5, rel=0.01)
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.02) and not net.fc.bias.any()


@pytest.mark.parametrize("name", NAMES)
def test_non_local_blocks_begin_as_nothing_and_leave_the_names_alone(name):
    torch.manual_seed(0)
    build = getattr(resnet3d, name)
    plain, net = build(5, width=8), build(5, width=8, non_local="embedded_gaussian")
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    assert {key.rsplit(".", 2)[0] for key in missing} == {"layer2.after1", "layer3.after1"}
    assert not unexpected
    clip = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        before = plain.eval()(clip)
        assert torch.equal(net.eval()(clip), before)
        net.layer3.after1.norm.weight.fill_(100.0)
        assert (net(clip) - before).abs().max() > 1e-3


def test_an_unknown_pairwise_function_is_named():
    with torch.device("meta"), pytest.raises(UserError, match="'sum'"):
        resnet3d.r3d_18(5, non_local="sum")
