"""Two-stream against the paper's numbers, and what it makes of frames, flow and scores."""

import pytest
import torch
from torch import nn

from vidtrain.layers.image import cross_modality
from vidtrain.models.two_stream import two_stream
from vidtrain.tasks.classification import Classification
from vidtrain.trace.table import Layer, layer_table
from vidtrain.types import UserError

OUTPUTS = {
    "conv1": [96, 109, 109], "pool1": [96, 54, 54], "conv2": [256, 26, 26], "pool2": [256, 13, 13],
    "conv3": [512, 13, 13], "conv4": [512, 13, 13], "conv5": [512, 13, 13], "pool5": [512, 6, 6],
    "full6": [4096], "full7": [2048], "classifier": [101],
}  # fmt: skip


def layers_of(*shapes, **kwargs) -> dict[str, Layer]:
    with torch.device("meta"):
        net = two_stream(num_classes=kwargs.pop("num_classes", 101), **kwargs)
    return {layer.name: layer for layer in layer_table(net, *shapes)}


@pytest.mark.parametrize(
    ("streams", "num_classes", "params", "gmacs"),
    [
        ("spatial", 101, 90_627_813, 1.664),
        ("temporal", 101, 90_707_781, 2.614),
        ("spatial", 1000, 92_469_864, None),
        ("both", 101, 90_627_813 + 90_707_781, 1.664 + 2.614),
    ],
)
def test_parameters_and_multiply_adds(streams, num_classes, params, gmacs):
    shapes = {"spatial": [(3, 10, 224, 224)], "temporal": [(2, 10, 224, 224)]}
    shapes["both"] = shapes["spatial"] + shapes["temporal"]
    layers = layers_of(*shapes[streams], streams=streams, num_classes=num_classes).values()
    assert sum(layer.params for layer in layers) == params
    if gmacs is not None:
        assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(gmacs, abs=1e-3)


@pytest.mark.parametrize(("streams", "channels"), [("spatial", 3), ("temporal", 2)])
def test_sizes_of_every_layer_need_windows_over_the_rest(streams, channels):
    layers = layers_of((channels, 10, 224, 224), streams=streams)
    for name, size in OUTPUTS.items():
        part = {"pool5": "neck.", "full6": "neck.", "full7": "neck.", "classifier": ""}
        path = f"{streams}.{part.get(name, 'body.')}{name}"
        assert layers[path].output == size, name


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.LocalResponseNorm) for module in net.modules())


def test_the_temporal_stream_has_one_norm_and_the_spatial_two():
    with torch.device("meta"):
        net = two_stream(num_classes=3)
    assert norms(net.spatial) == 2 and norms(net.temporal) == 1
    drops = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
    assert drops == [0.9] * 4


@pytest.mark.parametrize(
    ("frames", "fields", "channels"),
    [(10, "L", 20), (11, "T-1", 20), (5, "L", 10), (1, "L", 2), (2, "T-1", 2)],
)
def test_channels_of_the_first_convolution(frames, fields, channels):
    with torch.device("meta"):
        net = two_stream(num_classes=3, num_frames=frames, fields=fields)
    assert net.temporal.body.conv1.weight.shape == (96, channels, 7, 7)
    assert net.spatial.body.conv1.weight.shape == (96, 3, 7, 7)


@pytest.mark.parametrize(("fields", "used"), [("L", 4), ("T-1", 3)])
def test_fields_are_stacked_dx_and_dy_in_turn_and_in_pixels(fields, used):
    with torch.device("meta"):
        net = two_stream(num_classes=3, num_frames=4, fields=fields)
    flow = torch.empty(1, 2, 4, 1, 1)
    flow[0, 0, :, 0, 0] = torch.tensor([1.0, 2, 3, 4]) / 20  # dx of the fields, in pixels 1 to 4
    flow[0, 1, :, 0, 0] = torch.tensor([-1.0, -2, -3, -4]) / 20
    stacked = net.stack(flow)
    expected = [1.0, -1, 2, -2, 3, -3, 4, -4][: 2 * used]
    torch.testing.assert_close(stacked.flatten(), torch.tensor(expected))


def stacked_as(stacking: str, flow: torch.Tensor) -> torch.Tensor:
    """Stack a flow (B, 2, T, H, W), given in pixels: (B, T, 2, H, W)."""
    with torch.device("meta"):
        net = two_stream(num_classes=3, num_frames=flow.shape[2], stacking=stacking)
    return net.stack(flow / 20).unflatten(1, (-1, 2))


def test_where_all_moves_alike_trajectories_change_nothing():
    flow = torch.tensor([1.25, -0.5]).view(1, 2, 1, 1, 1) * torch.tensor([1.0, 2, -1]).view(3, 1, 1)
    flow = flow.expand(2, 2, 3, 8, 9)
    torch.testing.assert_close(stacked_as("trajectory", flow), stacked_as("flow", flow))


def test_a_trajectory_follows_what_moves():
    flow = torch.zeros(1, 2, 3, 6, 7)
    # A blob of one pixel at (x, y) = (1, 2) goes right by 2, then down by 1, then left by 1.
    flow[0, 0, 0, 2, 1] = 2.0
    flow[0, 1, 1, 2, 3] = 1.0
    flow[0, 0, 2, 3, 3] = -1.0
    along = stacked_as("trajectory", flow)[0]  # (L, 2, H, W)
    assert along[:, :, 2, 1].tolist() == [[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]
    assert along[:, :, 2, 3].tolist() == [[0.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]  # it began later
    assert stacked_as("flow", flow)[0][:, :, 2, 1].tolist() == [[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_a_trajectory_between_pixels_is_interpolated_and_ends_at_the_border():
    flow = torch.zeros(1, 2, 2, 3, 4)
    flow[0, 0, 0] = 0.5
    flow[0, 1, 0, 2] = 9.0  # out of the frame, below
    flow[0, 0, 1] = torch.arange(4.0) ** 2  # 0 1 4 9 from left to right
    along = stacked_as("trajectory", flow)[0, 1, 0]
    torch.testing.assert_close(along, torch.tensor([0.5, 2.5, 6.5, 9.0]).expand(3, 4))


def small(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return two_stream(num_classes=5, num_frames=4, size=48, **kwargs).eval()


def clips(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 4, 48, 48), torch.rand(batch, 2, 4, 48, 48) * 2 - 1


def changed(net, inputs, which, frame) -> bool:
    """Say whether the answers hang on a frame of an input."""
    other = [x.clone() for x in inputs]
    other[which][:, :, frame] += 0.5
    with torch.no_grad():
        return not torch.equal(net(*inputs), net(*other))


def test_the_spatial_stream_sees_the_middle_frame_alone():
    video, _ = clips()
    net = small(streams="spatial")
    assert [changed(net, [video], 0, t) for t in range(4)] == [False, False, True, False]


@pytest.mark.parametrize(("fields", "last"), [("L", True), ("T-1", False)])
def test_the_temporal_stream_sees_every_field_but_perhaps_the_last(fields, last):
    _, flow = clips()
    net = small(streams="temporal", fields=fields)
    assert [changed(net, [flow], 0, t) for t in range(4)] == [True, True, True, last]


def test_both_streams_answer_for_themselves():
    video, flow = clips()
    net = small()
    with torch.no_grad():
        answers = net(video, flow)
        assert answers.shape == (2, 2, 5)
        torch.testing.assert_close(answers[:, 0], net.spatial(video[:, :, 2]))
        torch.testing.assert_close(answers[:, 1], net.temporal(net.stack(flow)))
        for which, name in enumerate(("spatial", "temporal")):
            alone = small(streams=name)
            assert alone.inputs == (("video",), ("flow",))[which]
            alone.load_state_dict({k: v for k, v in net.state_dict().items() if k.startswith(name)})
            torch.testing.assert_close(alone((video, flow)[which]), answers[:, which])
    net.reset_classifier(0)
    assert net(video, flow).shape == (2, 2 * 2048)
    assert net.forward_features(video, flow).shape == (2, 1024, 1, 2, 2)


def test_maps_of_streams_that_differ_meet_at_the_smaller_size():
    video, flow = clips()
    net = small(backbone="resnet18", temporal_backbone="squeezenet1_1")
    with torch.no_grad():
        maps = net.forward_features(video, flow)
        frame = net.spatial(video[:, :, 2])
        torch.testing.assert_close(net(video, flow)[:, 0], frame)
    assert maps.shape == (2, 512 + 512, 1, 2, 2)


def test_each_stream_learns_from_its_own_answer():
    video, flow = clips()
    net = small().train()
    for stream, other, which in (("spatial", "temporal", 0), ("temporal", "spatial", 1)):
        net.zero_grad()
        net(video, flow)[:, which].logsumexp(-1).sum().backward()
        assert getattr(net, stream).body.conv1.weight.grad.any()
        assert not getattr(net, other).body.conv1.weight.grad.any()


SCORES = torch.rand(6, 2, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)


def test_fusion_by_average_is_the_mean_of_the_softmax_scores():
    video, flow = clips()
    net = small()
    torch.testing.assert_close(net.fuse(SCORES), (SCORES[:, 0] + SCORES[:, 1]) / 2)
    task = Classification(5)
    task.model = net
    label = torch.tensor([0, 3])
    output = task.eval().step({"video": video[:, None], "flow": flow[:, None], "label": label})
    with torch.no_grad():
        answers = net(video, flow)
    torch.testing.assert_close(output.scores, answers.softmax(-1).mean(1))
    each = [nn.functional.cross_entropy(answers[:, s], label) for s in range(2)]
    torch.testing.assert_close(output.loss.detach(), (each[0] + each[1]) / 2)


def test_the_svm_sees_each_streams_scores_at_unit_length():
    svm = small(fusion="svm").svm
    features = svm.features(SCORES)
    assert features.shape == (6, 10)
    norms = features.unflatten(1, (2, 5)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(6, 2))
    torch.testing.assert_close(features[:, :5], SCORES[:, 0] / SCORES[:, 0].norm(dim=-1)[:, None])
    weight, bias = torch.randn(5, 10), torch.randn(5)
    svm.set(weight, bias)
    torch.testing.assert_close(svm(SCORES), (features @ weight.T + bias).softmax(-1))


def test_an_svm_that_was_never_fitted_is_an_error_but_in_training():
    net = small(fusion="svm")
    with pytest.raises(UserError, match="the SVM is fitted when training ends"):
        net.fuse(SCORES)
    torch.testing.assert_close(net.train().fuse(SCORES), SCORES.mean(1))
    net.eval().svm.pending = True  # validation while training is under way
    torch.testing.assert_close(net.fuse(SCORES), SCORES.mean(1))


def test_a_fitted_svm_travels_in_the_state():
    net, other = small(fusion="svm"), small(fusion="svm")
    net.svm.set(torch.randn(5, 10), torch.randn(5))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.fuse(SCORES), net.fuse(SCORES))
    other.reset_classifier(7)  # other classes: what was fitted is worth nothing
    assert other.svm.weight.shape == (7, 14) and not other.svm.fitted


def test_250_views_each_go_through_once_and_their_order_does_not_matter():
    class Counting(nn.Module):
        inputs = ("video",)
        seen = 0

        def forward(self, x):
            self.seen += len(x)
            return x.mean((2, 3, 4))

    torch.manual_seed(0)
    video = torch.randn(1, 250, 3, 1, 2, 2)  # 25 frames x 10 crops
    task = Classification(3)
    task.model = Counting()
    batch = {"video": video, "label": torch.tensor([1])}
    scores = task.eval().step(batch).scores
    assert task.model.seen == 250
    shuffled = task.step({**batch, "video": video[:, torch.randperm(250)]}).scores
    torch.testing.assert_close(shuffled, scores)


def test_cross_modality_keeps_the_response_to_grey():
    kernel = torch.randn(4, 3, 7, 7)
    spread = cross_modality(kernel, 20)
    assert spread.shape == (4, 20, 7, 7)
    grey = torch.rand(1, 1, 9, 9)
    ours = nn.functional.conv2d(grey.expand(1, 20, 9, 9) / 20, spread)
    theirs = nn.functional.conv2d(grey.expand(1, 3, 9, 9) / 3, kernel)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"streams": "all"}, "model.streams is 'all'; it must be one of both, spatial, temporal"),
        ({"fields": "T"}, "model.fields is 'T'"),
        ({"stacking": "path"}, "model.stacking is 'path'"),
        ({"fusion": "max"}, "model.fusion is 'max'"),
        ({"fusion": "svm", "streams": "spatial"}, "needs two streams"),
        ({"fields": "T-1", "num_frames": 1}, "leaves out the last flow field"),
        ({"backbone": "resnet81"}, "did you mean 'resnet18'"),
        ({"temporal_backbone": "cnn_m"}, "did you mean 'cnn_m_2048'"),
        ({"size": 40}, "at least 41 pixels, not 40"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        two_stream(num_classes=3, **kwargs)


def test_a_clip_of_another_shape_is_named():
    with torch.device("meta"):
        net = two_stream(num_classes=3, num_frames=4, size=48)
        video, flow = torch.empty(1, 3, 4, 48, 48), torch.empty(1, 2, 4, 48, 48)
        with pytest.raises(UserError, match="4 frames and got 3"):
            net(video, flow[:, :, :3])
        with pytest.raises(UserError, match="48 x 48 pixels and got 64 x 64"):
            net(torch.empty(1, 3, 4, 64, 64), flow)


@pytest.mark.parametrize("size", [41, 47, 48, 63, 64, 112, 170, 224, 225])
def test_other_frame_sizes(size):
    with torch.device("meta"):
        net = two_stream(num_classes=3, num_frames=2, size=size).eval()
        video, flow = torch.empty(1, 3, 2, size, size), torch.empty(1, 2, 2, size, size)
        assert net(video, flow).shape == (1, 2, 3)
