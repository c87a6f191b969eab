"""C3D against the paper and Caffe, and against the lecture's slide where that is wrong."""

import pytest
import torch
from torch import nn

from vidtrain.models.c3d import c3d
from vidtrain.trace.table import Layer, layer_table
from vidtrain.types import UserError

CLIP = (3, 16, 112, 112)
GMACS = {
    "conv1": 1.0404, "conv2": 11.0981, "conv3a": 5.5491, "conv3b": 11.0981, "conv4a": 2.7745,
    "conv4b": 5.5491, "conv5a": 0.6936, "conv5b": 0.6936, "fc6": 0.03355, "fc7": 0.01678,
    "fc8": 0.00199,
}  # fmt: skip
SLIDE_FC = {"fc6": 0.51, "fc7": 0.45, "fc8": 0.05}
OUTPUTS = {
    "conv1": [64, 16, 112, 112], "pool1": [64, 16, 56, 56], "conv2": [128, 16, 56, 56],
    "pool2": [128, 8, 28, 28], "conv3a": [256, 8, 28, 28], "conv3b": [256, 8, 28, 28],
    "pool3": [256, 4, 14, 14], "conv4a": [512, 4, 14, 14], "conv4b": [512, 4, 14, 14],
    "pool4": [512, 2, 7, 7], "conv5a": [512, 2, 7, 7], "conv5b": [512, 2, 7, 7],
    "fc6": [4096], "fc7": [4096], "fc8": [487],
}  # fmt: skip


def layers_of(**kwargs) -> dict[str, Layer]:
    with torch.device("meta"):
        net = c3d(**kwargs)
    return {layer.name: layer for layer in layer_table(net, CLIP)}


@pytest.mark.parametrize(
    ("kwargs", "params", "gmacs"),
    [
        ({"num_classes": 487}, 79_991_015, 38.549),
        ({"num_classes": 487, "pool5": "floor"}, 65_310_951, 38.534),
        ({"num_classes": 101}, 78_409_573, 38.547),
    ],
)
def test_parameters_and_multiply_adds(kwargs, params, gmacs):
    layers = layers_of(**kwargs).values()
    assert sum(layer.params for layer in layers) == params
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gmacs, abs=1e-3)


def test_sizes_and_multiply_adds_of_every_layer():
    layers = layers_of(num_classes=487)
    for name, size in OUTPUTS.items():
        assert layers[name].output == size, name
    for name, gmacs in GMACS.items():
        assert layers[name].macs / 1e9 == pytest.approx(gmacs, abs=6e-5), name


def test_the_slides_fully_connected_rows_are_27_times_too_large():
    layers = layers_of(num_classes=487, pool5="floor")  # 4608 values into fc6, as on the slide
    for name, wrong in SLIDE_FC.items():
        gmacs = layers[name].macs / 1e9
        assert gmacs != pytest.approx(wrong, rel=0.5)
        assert gmacs * 27 == pytest.approx(wrong, abs=0.005)


@pytest.mark.parametrize(("pool5", "side"), [("ceil", 4), ("floor", 3), ("pad", 4)])
def test_pool5(pool5, side):
    assert layers_of(num_classes=487, pool5=pool5)["pool5"].output == [512, 1, side, side]


def test_pool5_has_caffes_windows_and_not_those_of_padding():
    ramp = torch.arange(49.0).view(1, 1, 1, 7, 7).expand(1, 1, 2, 7, 7)
    with torch.device("meta"):
        pool5, padded = c3d(num_classes=2).pool5, c3d(num_classes=2, pool5="pad").pool5
    assert pool5(ramp)[0, 0, 0, 0].tolist() == [8, 10, 12, 13]
    assert padded(ramp)[0, 0, 0, 0].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("size", [32, 48, 112])
def test_any_size_can_be_padded(size):
    with torch.device("meta"):
        net = c3d(num_classes=2, size=size, pool5="pad")
        assert net(torch.empty(1, 3, 16, size, size)).shape == (1, 2)


def test_receptive_field_of_the_front_layers_by_gradient():
    net = c3d(num_classes=2, num_frames=16, size=48)
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data.abs_()
            module.bias.data.zero_()
    for name in ("pool1", "pool2"):
        pool = getattr(net, name)
        setattr(net, name, nn.AvgPool3d(pool.kernel_size))
    expected = {layer.name: layer.receptive_field for layer in layer_table(net, (3, 16, 48, 48))}
    clip = torch.rand(1, 3, 16, 48, 48, requires_grad=True)
    x = clip
    for name in ("conv1", "pool1", "conv2", "pool2", "conv3a"):
        x = getattr(net, name)(x)
        unit = x[(0, 0, *(size // 2 for size in x.shape[2:]))]
        (gradient,) = torch.autograd.grad(unit, clip, retain_graph=True)
        seen = gradient[0].sum(0).nonzero()
        assert (seen.amax(0) - seen.amin(0) + 1).tolist() == expected[name], name


def test_first_weights_are_the_papers():
    torch.manual_seed(0)
    net = c3d(num_classes=5, num_frames=8, size=32)
    assert net.conv3b.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert net.fc7.weight.std().item() == pytest.approx(0.005, rel=0.02)
    biases = {
        name: m.bias.unique().tolist() for name, m in net.named_children() if hasattr(m, "bias")
    }
    assert biases.pop("conv1") == [0.0] and biases.pop("fc8") == [0.0]
    assert all(values == [1.0] for values in biases.values()) and len(biases) == 9


def test_bad_arguments_are_named():
    with torch.device("meta"):
        with pytest.raises(UserError, match="pool5 is 'round'"):
            c3d(num_classes=2, pool5="round")
        with pytest.raises(UserError, match="4 frames"):
            c3d(num_classes=2, num_frames=4)
        with pytest.raises(UserError, match="112 x 112 pixels and got 96 x 96"):
            c3d(num_classes=2)(torch.empty(1, 3, 16, 96, 96))
