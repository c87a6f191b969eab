"""The rows of the table: what counts as a layer, and that the columns add up."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vidtrain.trace.table import layer_table

VIDEO = torchvision.models.video


def totals(net: nn.Module, shape: tuple[int, ...]) -> None:
    """The table's sums are the parameters, and half of what torch's own counter counts."""
    rows = layer_table(net, shape)
    device = next(net.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, *shape, device=device))
    assert sum(row.macs for row in rows) * 2 == counter.get_total_flops()
    assert sum(row.params for row in rows) == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("build", "params", "gmacs", "size"),
    [
        (VIDEO.r3d_18, 33_371_472, 40.6966, 112),
        (VIDEO.r2plus1d_18, 31_505_325, 40.5191, 112),
        (VIDEO.s3d, 8_320_048, 17.9788, 224),
        (VIDEO.swin3d_t, 28_158_070, 43.8822, 224),
        (VIDEO.mvit_v2_s, 34_537_744, 64.2238, 224),
    ],
    ids=["r3d", "r2plus1d", "s3d", "swin3d", "mvit"],
)
def test_published_networks(build, params, gmacs, size):
    with torch.device("meta"):
        net = build()
        totals(net, (3, 16, size, size))
        rows = layer_table(net, (3, 16, size, size))
    assert sum(row.params for row in rows) == params
    assert sum(row.macs for row in rows) / 1e9 == pytest.approx(gmacs, rel=1e-4)
    assert [row for row in rows if any(row.receptive_field)][-1].receptive_field == [16, size, size]
    assert len({row.name for row in rows}) == len(rows)


def test_receptive_field_of_r3d_is_the_textbooks():
    with torch.device("meta"):
        rows = {row.name: row for row in layer_table(VIDEO.r3d_18(), (3, 16, 224, 224))}
    # Stem 7 x 7 stride 2, then 3 x 3 twice a block, two blocks a stage, stride 2 at each new stage.
    rf, jump = 7, 2
    for stage in range(1, 5):
        for block in range(2):
            for step in (2 if stage > 1 and block == 0 else 1, 1):
                rf, jump = rf + 2 * jump, jump * step
        assert rows[f"layer{stage}.1.add"].receptive_field[1] == min(rf, 224)


def test_a_module_called_twice_is_one_row():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(3, 3, 3, padding=1)
            self.tied = nn.Conv3d(3, 3, 3, padding=1)
            self.tied.weight = self.conv.weight

        def forward(self, x):
            return self.tied(self.conv(self.conv(x)))

    net = Twice()
    conv, tied = layer_table(net, (3, 8, 16, 16))
    once = 3 * 81 * 8 * 16 * 16
    assert (conv.name, conv.macs, conv.params) == ("conv", 2 * once, 3 * 81 + 3)
    assert conv.receptive_field == [5, 5, 5]
    assert (tied.macs, tied.params) == (once, 3)  # the shared weight is listed once
    totals(net, (3, 8, 16, 16))


def test_operations_without_a_module_have_rows_and_names():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 4, 1, 1, 1))
            self.conv = nn.Conv3d(3, 4, 1)
            self.unused = nn.Linear(2, 3)
            self.borrowed = nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x)
            x = x + torch.relu(x)
            x = nn.functional.max_pool3d(x + self.token, 2)
            x = torch.cat([x, x * x.mean((2, 3, 4), keepdim=True)], 1)
            x = x[:, :4].mean((2, 3, 4))
            return nn.functional.linear(x, self.borrowed.weight, self.borrowed.bias)

    rows = layer_table(Functional(), (3, 4, 8, 8))
    assert [(row.name, row.type, row.params) for row in rows] == [
        ("token", "Parameter", 4),
        ("conv", "Conv3d", 16),
        ("add", "add", 0),
        ("max_pool3d", "max_pool3d", 0),
        ("mean", "mean", 0),
        ("mul", "mul", 0),
        ("cat", "cat", 0),
        ("mean_2", "mean", 0),
        ("borrowed", "Linear", 25),
        ("unused.weight", "Parameter", 6),
        ("unused.bias", "Parameter", 3),
    ]
    by_name = {row.name: row for row in rows}
    assert by_name["token"].receptive_field == [0, 0, 0]
    assert by_name["mean"].output == [4, 1, 1, 1]
    assert by_name["borrowed"].output == [5] and by_name["borrowed"].macs == 20


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.Dropout()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layer_table(net, (3, 8, 16, 16))
    assert net.training and all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(before[n], tensor) for n, tensor in net.state_dict().items())
    assert next(net.parameters()).device.type == "cpu"
    net(torch.rand(2, 3, 8, 16, 16)).sum().backward()  # and it still learns


def test_two_inputs():
    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.video, self.flow = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(2, 4, 1)

        def forward(self, video, flow):
            return self.video(video) + self.flow(flow)

    video, flow, add = layer_table(Streams(), (3, 8, 16, 16), (2, 8, 16, 16))
    assert video.receptive_field == add.receptive_field == [3, 3, 3]
    assert flow.receptive_field == [1, 1, 1]
    assert add.output == [4, 8, 16, 16]


def test_images_and_sequences_have_fewer_axes():
    (image,) = layer_table(nn.Conv2d(3, 4, 3), (3, 16, 20))
    assert (image.output, image.receptive_field) == ([4, 14, 18], [1, 3, 3])
    (sequence,) = layer_table(nn.Conv1d(5, 4, 3), (5, 16))
    assert (sequence.output, sequence.receptive_field) == ([4, 14], [3, 1, 1])


def test_a_single_layer_is_a_network():
    (row,) = layer_table(nn.Conv3d(3, 4, 3), (3, 8, 16, 16))
    assert (row.name, row.output, row.params) == ("Conv3d", [4, 6, 14, 14], 328)
