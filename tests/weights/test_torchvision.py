"""torchvision's weights: its own networks against ours with their state dicts."""

import named_net
import pytest
import torch
import torchvision.models as tv

from vidtrain.layers.image import TorchvisionNet
from vidtrain.models import fusion, slow
from vidtrain.models.cnn_lstm import cnn_lstm
from vidtrain.models.gru_rcn import gru_rcn
from vidtrain.models.i3d import i3d, i3d_two_stream
from vidtrain.models.resnet3d import mc3_18, r2plus1d_18, r3d_18
from vidtrain.models.s3d import s3d
from vidtrain.models.two_stream import two_stream
from vidtrain.types import UserError
from vidtrain.weights.load import fill, named, open_parts
from vidtrain.weights.torchvision import published

K = 5
VIDEO = {"r3d_18": r3d_18, "mc3_18": mc3_18, "r2plus1d_18": r2plus1d_18, "s3d": s3d}


def opened(tmp_path, network, layout, at=""):
    path = tmp_path / "w.pth"
    torch.save(network.state_dict(), path)
    (part,) = open_parts({"weights": {at: str(path)} if at else str(path)}, tmp_path, print)
    assert part.layout.name == layout
    return part


def reference(name, classes=K, **kwargs):
    network = tv.get_model(name, num_classes=classes, **kwargs).eval()
    named_net.randomise(network)
    return network


@pytest.mark.parametrize("name", VIDEO)
def test_video_networks_give_the_same_logits(tmp_path, name):
    theirs = reference(name)
    part = opened(tmp_path, theirs, "torchvision")
    ours = VIDEO[name](K).eval()
    line = fill(ours, part)
    assert line.endswith(f"{len(theirs.state_dict())} tensors")
    size = (16, 224) if name == "s3d" else (8, 32)  # torchvision's s3d has a window of 7 x 7
    clip = torch.rand(1, 3, size[0], size[1], size[1])
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), theirs(clip), rtol=1e-4, atol=1e-4)


def test_what_torchvision_publishes_has_address_colours_and_classes():
    for name in VIDEO:
        node = {"_target_": f"vidtrain.models.x.{name}"}
        item = named(node)["kinetics400"]
        entry = tv.get_model_weights(name).KINETICS400_V1
        assert item.address.url == entry.url
        assert item.address.url.endswith(f"-{item.address.sha256}.pth")
        assert item.facts.mean == (0.43216, 0.394666, 0.37645)
        assert item.facts.std == (0.22803, 0.22145, 0.216989)
        assert len(item.facts.labels) == 400 and not item.facts.bgr
    assert set(published("resnet50")) == {"imagenet", "imagenet1k_v1", "imagenet1k_v2"}
    assert published("resnet50")["imagenet"].weights == "IMAGENET1K_V2"
    assert published("googlenet")["imagenet"].facts.mean == (0.5, 0.5, 0.5)
    assert published("vgg16")["imagenet"].facts.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"_target_": "vidtrain.models.resnet3d.r3d_18"}, {"kinetics400": "r3d_18", "imagenet": "resnet18"}),
        ({"_target_": "vidtrain.models.resnet3d.r2plus1d_18"}, {"kinetics400": "r2plus1d_18"}),
        ({"_target_": "vidtrain.models.slow.c2d_r50_8x8"}, {"imagenet": "resnet50"}),
        ({"_target_": "vidtrain.models.i3d.i3d_flow"}, {"imagenet": "googlenet"}),
        ({"_target_": "vidtrain.models.slowfast.slowfast_r50_4x16"}, {}),
        ({"_target_": "vidtrain.models.fusion.single_frame", "backbone": "vgg16"}, {"imagenet": "vgg16"}),
        ({"_target_": "vidtrain.models.fusion.single_frame", "backbone": "karpathy"}, {}),
        ({"_target_": "mine.net"}, {}),
    ],
)  # fmt: skip
def test_which_names_a_model_has(node, expected):
    names = named(node)
    assert {
        name: item.model for name, item in names.items() if name in ("kinetics400", "imagenet")
    } == expected


def test_parts_have_names_of_their_own():
    node = {"_target_": "a.cnn_lstm", "backbone3d": {"_target_": "vidtrain.models.resnet3d.r3d_18"}}
    assert named(node, "backbone.net")["kinetics400"].model == "r3d_18"
    node = {"_target_": "a.two_stream", "backbone": "vgg16", "temporal_backbone": "resnet18"}
    assert named(node, "spatial")["imagenet"].model == "vgg16"
    assert named(node, "temporal")["imagenet"].model == "resnet18"


# -- image networks, frame by frame


def test_single_frame_is_the_image_network(tmp_path):
    theirs = reference("resnet18")
    ours = fusion.single_frame(K, size=64, backbone="resnet18").eval()
    fill(ours, opened(tmp_path, theirs, "image"))
    clip = torch.rand(2, 3, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(clip), theirs(clip[:, :, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_0",
        "googlenet",
        "densenet121",
        "mobilenet_v3_small",
        pytest.param("vit_b_32", marks=pytest.mark.slow),
        pytest.param("convnext_tiny", marks=pytest.mark.slow),
        pytest.param("swin_t", marks=pytest.mark.slow),
    ],
)
def test_maps_of_any_image_network(tmp_path, name):
    extra = {"init_weights": False} if name == "googlenet" else {}
    theirs = reference(name, 1000, **extra)  # googlenet's has auxiliary classifiers
    part = opened(tmp_path, theirs, "vit" if name.startswith("vit") else "image")
    size = 224 if name.startswith("vit") else 64
    ours = fusion.late_fusion_pool(K, size=size, backbone=name).eval()
    before = ours.classifier.weight.clone()
    line = fill(ours, part)
    assert "new here: classifier" in line and "not used: " in line and "its classifier" in line
    assert ("auxiliary classifiers" in line) == (name == "googlenet")
    assert torch.equal(ours.classifier.weight, before)
    inner = TorchvisionNet(name, 1000, size).eval()
    inner.net.load_state_dict(theirs.state_dict(), strict=False)
    frame = torch.rand(1, 3, size, size)
    with torch.no_grad():
        x = frame
        for stage in inner.stages():
            x = stage(x)
        torch.testing.assert_close(
            ours.forward_features(frame[:, :, None])[:, :, 0], inner.to_map(x)
        )
    assert part.facts.mean == ((0.5, 0.5, 0.5) if name == "googlenet" else (0.485, 0.456, 0.406))
    if name == "googlenet":
        assert len(part.facts.labels) == 1000


def test_early_fusion_divides_the_first_kernel_among_frames(tmp_path):
    theirs = reference("resnet18")
    ours = fusion.early_fusion(K, num_frames=4, size=64, backbone="resnet18").eval()
    fill(ours, opened(tmp_path, theirs, "image"))
    frame = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        still = frame[:, :, None].expand(-1, -1, 4, -1, -1)
        torch.testing.assert_close(ours(still), theirs(frame), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_slow_fusion_inflates_the_kernels_that_span_frames(tmp_path):
    theirs = reference("alexnet")
    ours = fusion.slow_fusion(K, num_frames=10, size=96, backbone="alexnet").eval()
    line = fill(ours, opened(tmp_path, theirs, "image"))
    assert "new here" not in line  # all three convolutions that fuse are alexnet's own
    frame = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        still = frame[:, :, None].expand(-1, -1, 10, -1, -1)
        torch.testing.assert_close(ours(still), theirs(frame), rtol=1e-4, atol=1e-4)


def test_convolutions_over_time_between_the_stages_are_new(tmp_path):
    theirs = reference("resnet18")
    ours = fusion.slow_fusion(K, num_frames=10, size=64, backbone="resnet18")
    assert "new here: between" in fill(ours, opened(tmp_path, theirs, "image"))
    torch.testing.assert_close(ours.backbone.net.conv1.weight.sum(2), theirs.conv1.weight)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gru_rcn", "resnet18"),
        pytest.param("cnn_lstm", "alexnet", marks=pytest.mark.slow),
    ],
)
def test_recurrent_networks_take_the_image_network_inside(tmp_path, model, name):
    theirs = reference(name, 1000)
    part = opened(tmp_path, theirs, "image")
    if model == "cnn_lstm":
        ours = cnn_lstm(K, num_frames=2, size=64, backbone=name, hidden=8)
    else:
        ours = gru_rcn(K, size=64, backbone=name)
    line = fill(ours, part)
    assert "not used: its classifier" in line and "new here" in line
    (inside,) = (m for m in ours.modules() if isinstance(m, TorchvisionNet))
    given, kept = theirs.state_dict(), inside.net.state_dict()
    assert len(kept) >= 12
    assert all(torch.equal(tensor, given[key]) for key, tensor in kept.items())


def test_two_streams_start_from_one_image_network(tmp_path):
    theirs = reference("resnet18", 1000)
    part = opened(tmp_path, theirs, "image")
    ours = two_stream(K, num_frames=6, size=64, backbone="resnet18")
    line = fill(ours, part)
    assert "its classifier has 1000 classes, the data 5" in line
    kernel = theirs.conv1.weight
    assert torch.equal(ours.spatial.net.conv1.weight, kernel)
    flow = ours.temporal.net.conv1.weight
    assert flow.shape[1] == 12
    for channel in range(12):  # of the paper's 2L; not a twelfth of it
        torch.testing.assert_close(flow[:, channel], kernel.mean(1))
    torch.testing.assert_close(
        ours.temporal.net.layer1[0].conv1.weight, theirs.layer1[0].conv1.weight
    )
    one = two_stream(K, num_frames=6, size=64, backbone="resnet18")
    before = one.spatial.net.conv1.weight.clone()
    assert "weights for temporal" in fill(one, part._replace(at="temporal"))
    assert torch.equal(one.spatial.net.conv1.weight, before)
    torch.testing.assert_close(one.temporal.net.conv1.weight, flow)


# -- inflated


def test_c2d_of_a_still_video_is_the_image_network(tmp_path):
    theirs = reference("resnet50")
    ours = slow.c2d_r50_8x8(K).eval()
    line = fill(ours, opened(tmp_path, theirs, "image"))
    assert line.endswith(f"{len(theirs.state_dict())} tensors")
    frame = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        still = frame[:, :, None].expand(-1, -1, 4, -1, -1)
        torch.testing.assert_close(ours(still), theirs(frame), rtol=1e-4, atol=1e-4)


def test_i3d_has_each_kernel_divided_over_time(tmp_path):
    theirs = reference("resnet50")
    ours = slow.i3d_r50_nl_8x8(K).eval()
    line = fill(ours, opened(tmp_path, theirs, "image"))
    assert "new here: res3.after1, res3.after3, res4.after1, res4.after3, res4.after5" in line
    kernel, flat = ours.res2[0].conv_a.weight, theirs.layer1[0].conv1.weight
    assert kernel.shape[2] == 3
    for tap in range(3):
        torch.testing.assert_close(kernel[:, :, tap] * 3, flat)
    torch.testing.assert_close(ours.stem.conv.weight.sum(2), theirs.conv1.weight)


def test_r3d_and_mc3_come_from_resnet18(tmp_path):
    theirs = reference("resnet18")
    part = opened(tmp_path, theirs, "image")
    for build in (r3d_18, mc3_18):
        ours = build(K)
        fill(ours, part)
        torch.testing.assert_close(ours.stem[0].weight.sum(2), theirs.conv1.weight)
        torch.testing.assert_close(
            ours.layer4[1].conv2[0].weight.sum(2), theirs.layer4[1].conv2.weight
        )
        assert torch.equal(
            ours.layer2[0].downsample[1].running_var, theirs.layer2[0].downsample[1].running_var
        )
        assert torch.equal(ours.fc.weight, theirs.fc.weight)
    with pytest.raises(UserError, match="does not fit"):
        fill(r2plus1d_18(K), part)
    with pytest.raises(UserError, match="holds no image network"):
        fill(s3d(K), part)


def test_inception_comes_from_googlenet(tmp_path):
    theirs = reference("googlenet", 1000, init_weights=False)
    part = opened(tmp_path, theirs, "image")
    ours = i3d(K)
    line = fill(ours, part)
    assert "its classifier has 1000 classes, the data 5" in line and "new here: logits" in line
    torch.testing.assert_close(ours.Conv3d_1a_7x7.conv3d.weight.sum(2), theirs.conv1.conv.weight)
    unit = theirs.inception5b.branch3[1]
    torch.testing.assert_close(ours.Mixed_5c.b2b.conv3d.weight.sum(2), unit.conv.weight)
    assert torch.equal(ours.Mixed_5c.b2b.bn.running_mean, unit.bn.running_mean)
    assert torch.equal(ours.Mixed_4e.b3b.bn.weight, theirs.inception4d.branch4[1].bn.weight)
    both = i3d_two_stream(K)
    fill(both, part)
    mean = theirs.conv1.conv.weight.mean(1)
    for channel in range(2):
        torch.testing.assert_close(both.flow.Conv3d_1a_7x7.conv3d.weight[:, channel].sum(1), mean)
    torch.testing.assert_close(
        both.rgb.Conv3d_1a_7x7.conv3d.weight, ours.Conv3d_1a_7x7.conv3d.weight
    )
