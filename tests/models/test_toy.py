"""The lecture's table: sizes and receptive fields, by the tracer and by gradients."""

import pytest
import torch
from torch import nn

from vidtrain.models import toy
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError

CLIP = (3, 20, 64, 64)

# conv1, pool1, conv2, global pool: size and receptive field (slides 24-31).
TABLE = {
    "toy_late_fusion": [
        ([12, 20, 64, 64], [1, 3, 3]),
        ([12, 20, 16, 16], [1, 6, 6]),
        ([24, 20, 16, 16], [1, 14, 14]),
        ([24, 1, 1, 1], [20, 64, 64]),
    ],
    "toy_early_fusion": [
        ([12, 64, 64], [20, 3, 3]),
        ([12, 16, 16], [20, 6, 6]),
        ([24, 16, 16], [20, 14, 14]),
        ([24, 1, 1], [20, 64, 64]),
    ],
    "toy_3d_cnn": [
        ([12, 20, 64, 64], [3, 3, 3]),
        ([12, 5, 16, 16], [6, 6, 6]),
        ([24, 5, 16, 16], [14, 14, 14]),
        ([24, 1, 1], [20, 64, 64]),
    ],
}
COUNTS = {
    "toy_late_fusion": (3202, 0.0398),
    "toy_early_fusion": (9358, 0.0272),
    "toy_3d_cnn": (9034, 0.0896),
}


def build(name: str, num_classes: int = 10) -> nn.Module:
    kwargs = {"num_frames": 20} if name == "toy_early_fusion" else {}
    return getattr(toy, name)(num_classes=num_classes, **kwargs)


@pytest.mark.parametrize("name", TABLE)
def test_the_lectures_table(name):
    layers = layer_table(build(name), CLIP)
    rows = [(layer.output, layer.receptive_field) for layer in layers]
    assert rows[:4] == TABLE[name]
    assert rows[4:] == [([10], [20, 64, 64])]  # the classifier


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_multiply_adds(name):
    params, gmacs = COUNTS[name]
    net = build(name)
    layers = layer_table(net, CLIP)
    assert sum(p.numel() for p in net.parameters()) == params
    assert sum(layer.params for layer in layers) == params
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gmacs, abs=5e-5)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("row", range(4))
def test_gradients_reach_as_far_as_the_table_says(name, row):
    net = build(name).double()
    if name == "toy_3d_cnn":  # averages, so that every pixel of a window counts
        net.pool1 = nn.AvgPool3d(4)
    else:
        net.pool1 = nn.AvgPool2d(4)
    for parameter in net.parameters():
        parameter.data.abs_()
    seen = []
    layer = list(net.children())[row]
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    clip = torch.rand(1, *CLIP, dtype=torch.double, requires_grad=True)
    net(clip)
    unit = tuple(size // 2 for size in seen[0].shape)  # in late fusion, frame 10 of the batch
    (gradient,) = torch.autograd.grad(seen[0][unit], clip)
    reached = [
        int((gradient.abs().sum(axes) > 0).sum())
        for axes in ((0, 1, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3))
    ]
    assert reached == TABLE[name][row][1]


def test_first_weights_of_early_fusion_and_3d():
    assert build("toy_early_fusion").conv1.weight.shape == (12, 60, 3, 3)
    assert build("toy_3d_cnn").conv1.weight.shape == (12, 3, 3, 3, 3)


def test_a_shift_in_time_moves_3d_features_and_changes_early_fusion():
    torch.manual_seed(0)
    clip = torch.zeros(1, *CLIP)
    clip[:, :, 8:12] = torch.rand(1, 3, 4, 64, 64)
    later = clip.roll(2, dims=2)
    cnn, early = build("toy_3d_cnn").eval(), build("toy_early_fusion").eval()
    with torch.no_grad():
        torch.testing.assert_close(cnn.conv1(later)[:, :, 2:], cnn.conv1(clip)[:, :, :-2])
        pooled = [cnn.conv1(x).amax(2) for x in (clip, later)]
        assert torch.equal(*pooled)
        assert (early(clip) - early(later)).abs().max() > 1e-3


def test_early_fusion_refuses_another_length():
    with pytest.raises(UserError, match="20 frames and got 16"):
        build("toy_early_fusion")(torch.rand(1, 3, 16, 64, 64))
