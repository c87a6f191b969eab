"""I3D against the paper's sizes, and against its arithmetic written out from its weights' names."""

import pytest
import torch
import torch.nn.functional as F
from nets import shake_norms
from torch import Tensor

from vidtrain.models.i3d import i3d, i3d_flow, i3d_two_stream
from vidtrain.trace.table import layer_table

# What comes out of each stage, from 64 frames of 224 pixels.
STAGES = {
    "Conv3d_1a_7x7": [64, 32, 112, 112], "MaxPool3d_2a_3x3": [64, 32, 56, 56],
    "Conv3d_2b_1x1": [64, 32, 56, 56], "Conv3d_2c_3x3": [192, 32, 56, 56],
    "MaxPool3d_3a_3x3": [192, 32, 28, 28], "Mixed_3b": [256, 32, 28, 28],
    "Mixed_3c": [480, 32, 28, 28], "MaxPool3d_4a_3x3": [480, 16, 14, 14],
    "Mixed_4b": [512, 16, 14, 14], "Mixed_4c": [512, 16, 14, 14], "Mixed_4d": [512, 16, 14, 14],
    "Mixed_4e": [528, 16, 14, 14], "Mixed_4f": [832, 16, 14, 14],
    "MaxPool3d_5a_2x2": [832, 8, 7, 7], "Mixed_5b": [832, 8, 7, 7], "Mixed_5c": [1024, 8, 7, 7],
    "avg_pool3d": [1024, 7, 1, 1], "logits.conv3d": [400, 7, 1, 1],
}  # fmt: skip
UNITS = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"] + [
    f"Mixed_{name}.{branch}"
    for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
    for branch in ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
]
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class ByHand:
    """The network as arithmetic on its state dict; pools are padded with zeros, as in pytorch-i3d."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    @staticmethod
    def pad(x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
        ends: list[int] = []
        for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
            total = max(k - s if size % s == 0 else k - size % s, 0)
            ends += [total // 2, total - total // 2]
        return F.pad(x, ends)

    def unit(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = self.state[f"{name}.conv3d.weight"]
        x = F.conv3d(self.pad(x, [*kernel.shape[2:]], [stride] * 3), kernel, stride=stride)
        weight, bias, mean, var, _ = (self.state[f"{name}.bn.{key}"] for key in NORM)
        x = (x - mean.view(-1, 1, 1, 1)) / (var + 0.001).sqrt().view(-1, 1, 1, 1)
        return (x * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)).clamp(min=0)

    def pool(self, x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:
        return F.max_pool3d(self.pad(x, kernel, stride), kernel, stride)

    def mixed(self, x: Tensor, name: str) -> Tensor:
        one = self.unit(x, f"{name}.b0")
        two = self.unit(self.unit(x, f"{name}.b1a"), f"{name}.b1b")
        three = self.unit(self.unit(x, f"{name}.b2a"), f"{name}.b2b")
        four = self.unit(self.pool(x, [3, 3, 3], [1, 1, 1]), f"{name}.b3b")
        return torch.cat([one, two, three, four], 1)

    def steps(self, x: Tensor) -> Tensor:
        x = self.pool(self.unit(x, "Conv3d_1a_7x7", 2), [1, 3, 3], [1, 2, 2])
        x = self.unit(self.unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
        x = self.pool(x, [1, 3, 3], [1, 2, 2])
        x = self.mixed(self.mixed(x, "Mixed_3b"), "Mixed_3c")
        x = self.pool(x, [3, 3, 3], [2, 2, 2])
        for name in ("4b", "4c", "4d", "4e", "4f"):
            x = self.mixed(x, f"Mixed_{name}")
        x = self.pool(x, [2, 2, 2], [2, 2, 2])
        x = self.mixed(self.mixed(x, "Mixed_5b"), "Mixed_5c")
        x = F.avg_pool3d(x, [min(k, n) for k, n in zip((2, 7, 7), x.shape[2:], strict=True)], 1)
        x = F.conv3d(x, self.state["logits.conv3d.weight"], self.state["logits.conv3d.bias"])
        return x.mean((3, 4))


@pytest.mark.parametrize("shape", [(25, 65, 96), (16, 224, 224)], ids=["odd", "papers"])
def test_logits_are_those_by_hand(shape):
    torch.manual_seed(0)
    net = i3d(7).eval()
    shake_norms(net, variance=(0.2, 0.5))
    clip = torch.randn(1, 3, *shape)
    with torch.no_grad():
        steps = ByHand(net.state_dict()).steps(clip)
        assert steps.std() > 0.1
        torch.testing.assert_close(net.step_logits(clip), steps, rtol=0, atol=1e-4)
        torch.testing.assert_close(net(clip), steps.mean(2), rtol=0, atol=1e-4)
    assert steps.shape[2] == (3 if shape[0] == 25 else 1)  # 25, 13, 7, 4 frames, windows of 2


def test_logits_are_averaged_over_time():
    torch.manual_seed(0)
    net = i3d_flow(5).eval()
    shake_norms(net, variance=(0.2, 0.5))
    with torch.no_grad():
        clip = torch.rand(1, 2, 40, 32, 32) * 2 - 1
        steps = net.step_logits(clip)
        assert steps.shape == (1, 5, 4) and steps.std(2).min() > 1e-4
        torch.testing.assert_close(net(clip), steps.mean(2))


def test_names_are_pytorch_i3ds():
    with torch.device("meta"):
        names = set(i3d(400).state_dict())
    expected = {f"{unit}.conv3d.weight" for unit in UNITS}
    expected |= {f"{unit}.bn.{key}" for unit in UNITS for key in NORM}
    assert names == expected | {"logits.conv3d.weight", "logits.conv3d.bias"}
    with torch.device("meta"):
        streams = set(i3d_two_stream(400).state_dict())
    assert streams == {f"{stream}.{name}" for stream in ("rgb", "flow") for name in names}


@pytest.mark.parametrize(
    ("build", "channels", "frames", "params", "gmacs"),
    [
        (i3d, 3, 64, 12_697_264, 111.1531),
        (i3d_flow, 2, 64, 12_675_312, 102.3414),
        (i3d, 3, 16, 12_697_264, 27.788),
        (i3d, 3, 79, 12_697_264, 138.9415),
        (i3d_flow, 2, 79, 12_675_312, 127.9269),
    ],
)
def test_parameters_and_multiply_adds(build, channels, frames, params, gmacs):
    with torch.device("meta"):
        layers = layer_table(build(400), (channels, frames, 224, 224))
    assert sum(layer.params for layer in layers) == params
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gmacs, abs=1e-4)


def test_parameters_and_multiply_adds_of_both_streams():
    with torch.device("meta"):
        layers = layer_table(i3d_two_stream(400), (3, 64, 224, 224), (2, 64, 224, 224))
    assert sum(layer.params for layer in layers) == 12_697_264 + 12_675_312
    macs = sum(layer.macs for layer in layers) / 1e9
    assert macs == pytest.approx(111.1531 + 102.3414, abs=1e-3)


def test_sizes_of_every_stage():
    with torch.device("meta"):
        layers = layer_table(i3d(400), (3, 64, 224, 224))
    outputs: dict[str, list[int]] = {}
    for layer in layers:
        stage = layer.name if layer.name.startswith("logits") else layer.name.split(".")[0]
        outputs[stage] = layer.output
    assert {name: outputs[name] for name in STAGES} == STAGES


def test_any_clip_will_do():
    net = i3d(3).eval()
    with torch.no_grad():
        for shape, features in {(1, 1, 1): (1, 1, 1), (9, 33, 50): (2, 2, 2)}.items():
            clip = torch.randn(1, 3, *shape)
            assert net.forward_features(clip).shape == (1, 1024, *features)
            assert net(clip).shape == (1, 3)


def test_two_streams_are_summed():
    torch.manual_seed(0)
    net = i3d_two_stream(9).eval()
    shake_norms(net, variance=(0.2, 0.5))
    video, flow = torch.randn(3, 3, 9, 32, 32), torch.rand(3, 2, 9, 32, 32) * 2 - 1
    rgb_alone, flow_alone = i3d(9).eval(), i3d_flow(9).eval()
    rgb_alone.load_state_dict(net.rgb.state_dict())
    flow_alone.load_state_dict(net.flow.state_dict())
    assert net.inputs == ("video", "flow")
    assert (rgb_alone.inputs, flow_alone.inputs) == (("video",), ("flow",))
    with torch.no_grad():
        first, second = rgb_alone(video), flow_alone(flow)
        assert first.std() > 0.05 and second.std() > 0.05
        logits = net(video, flow)
        torch.testing.assert_close(logits, first + second)
        features = net.forward_features(video, flow)
        assert torch.equal(features[:, 1024:], flow_alone.forward_features(flow))
        assert features.shape == (3, net.num_features, 2, 1, 1)
        # scores of both, scaled alike, choose the same class
        for stream in (net.rgb, net.flow):
            stream.logits.conv3d.weight.mul_(3.0)
            stream.logits.conv3d.bias.mul_(3.0)
        assert torch.equal(net(video, flow).argmax(1), logits.argmax(1))


def test_two_streams_without_classifier_are_both_embeddings():
    net = i3d_two_stream(4).eval()
    net.reset_classifier(0)
    video, flow = torch.randn(2, 3, 8, 32, 32), torch.rand(2, 2, 8, 32, 32)
    with torch.no_grad():
        embedding = net(video, flow)
        torch.testing.assert_close(embedding, net.forward_features(video, flow).mean((2, 3, 4)))
    net.reset_classifier(6)
    with torch.no_grad():
        assert net(video, flow).shape == (2, 6)


def test_first_weights():
    torch.manual_seed(0)
    net = i3d(400)
    kernel = net.Mixed_4f.b1b.conv3d.weight
    limit = 2 / kernel[0].numel() ** 0.5
    assert kernel.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert kernel.std().item() == pytest.approx(0.88 * limit / 2, rel=0.01)
    assert not net.logits.conv3d.bias.any()
