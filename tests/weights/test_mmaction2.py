"""MMAction2's layout: networks written down by its names, against ours with its weights."""

import named_net
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet50

from vidtrain.models.c3d import c3d
from vidtrain.models.fusion import single_frame
from vidtrain.models.slow import c2d_r50_8x8, i3d_r50_8x8, slow_r50_4x16
from vidtrain.models.slowfast import slowfast_r50_4x16
from vidtrain.types import UserError
from vidtrain.weights.load import fill, open_parts

K = 5


def unit(net, x, name, out, kernel, stride=(1, 1, 1)):
    return net.norm(net.conv(x, f"{name}.conv", out, kernel, stride), f"{name}.bn")


def slow_only(net, x, width):
    x = F.relu(unit(net, x, "backbone.conv1", width, (1, 7, 7), (1, 2, 2)))
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for number, blocks in enumerate((3, 4, 6, 3), start=1):
        inner = width << number - 1
        for i in range(blocks):
            name = f"backbone.layer{number}.{i}"
            stride = (1, 2, 2) if i == 0 and number > 1 else (1, 1, 1)
            frames = 3 if number > 2 else 1
            y = F.relu(unit(net, x, f"{name}.conv1", inner, (frames, 1, 1)))
            y = F.relu(unit(net, y, f"{name}.conv2", inner, (1, 3, 3), stride))
            y = unit(net, y, f"{name}.conv3", 4 * inner, (1, 1, 1))
            if i == 0:
                x = unit(net, x, f"{name}.downsample", 4 * inner, (1, 1, 1), stride)
            x = F.relu(x + y)
    return net.linear(x.mean((2, 3, 4)), "cls_head.fc_cls", K)


def c3d_padded(net, x):
    dims = {"1a": 64, "2a": 128, "3a": 256, "3b": 256, "4a": 512, "4b": 512, "5a": 512, "5b": 512}
    for name, dim in dims.items():
        x = F.relu(net.conv(x, f"backbone.conv{name}.conv", dim, (3, 3, 3), bias=True))
        if name == "1a":
            x = F.max_pool3d(x, (1, 2, 2))
        elif name in ("2a", "3b", "4b"):
            x = F.max_pool3d(x, 2)
    x = F.max_pool3d(x, 2, padding=(0, 1, 1)).flatten(1)
    x = F.relu(net.linear(x, "backbone.fc6", 4096))
    x = F.relu(net.linear(x, "backbone.fc7", 4096))
    return net.linear(x, "cls_head.fc_cls", K)


def opened(tmp_path, state):
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "w.pth")
    (part,) = open_parts({"weights": str(tmp_path / "w.pth")}, tmp_path, print)
    assert part.layout.name == "mmaction2"
    return part


def test_slow(tmp_path):
    clip = torch.rand(2, 3, 4, 32, 32)
    net = named_net.Net()
    with torch.no_grad():
        expected = slow_only(net, clip, 8)
        part = opened(tmp_path, net.state)
        ours = slow_r50_4x16(K, width=8).eval()
        assert fill(ours, part).endswith(f"{len(net.state)} tensors")
        torch.testing.assert_close(ours(clip), expected, rtol=1e-4, atol=1e-4)
    assert part.facts.mean == pytest.approx((0.485, 0.456, 0.406), abs=1e-6)
    assert part.facts.std == pytest.approx((0.229, 0.224, 0.225), abs=1e-6)
    with pytest.raises(UserError, match="is none of them"):
        from vidtrain.models.resnet3d import r3d_18

        fill(r3d_18(K, width=8), part)


def test_c3d_pads_before_its_last_pool(tmp_path):
    clip = torch.randint(-100, 100, (1, 3, 16, 32, 32)).float()
    net = named_net.Net()
    with torch.no_grad():
        expected = c3d_padded(net, clip)
        part = opened(tmp_path, net.state)
        ours = c3d(K, size=32, pool5="pad").eval()
        assert fill(ours, part).endswith(f"{len(net.state)} tensors")
        torch.testing.assert_close(ours(clip), expected, rtol=1e-4, atol=1e-4)
    assert part.facts.mean == pytest.approx((104 / 255, 117 / 255, 128 / 255))
    assert part.facts.std == pytest.approx((1 / 255,) * 3) and not part.facts.bgr
    with pytest.raises(UserError, match=r"add model\.pool5=pad"):
        fill(c3d(K, size=32), part)


def as_tsn(state):
    """Call an image ResNet's tensors as MMAction2's modules of convolution and norm do."""
    words = {"conv": "conv", "bn": "bn"}
    named = {}
    for key, tensor in state.items():
        parts = key.split(".")
        leaf = parts[-1]
        if parts[0] == "fc":
            named[f"cls_head.fc_cls.{leaf}"] = tensor
        elif "downsample" in parts:
            named[".".join(["backbone", *parts[:3], {"0": "conv", "1": "bn"}[parts[3]], leaf])] = (
                tensor
            )
        else:
            word, number = parts[-2][:-1], parts[-2][-1]
            named[".".join(["backbone", *parts[:-2], f"conv{number}", words[word], leaf])] = tensor
    return named


def test_image_networks_go_into_frames_and_into_c2d(tmp_path):
    theirs = resnet50(num_classes=K).eval()
    named_net.randomise(theirs)
    part = opened(tmp_path, as_tsn(theirs.state_dict()))
    clip = torch.rand(1, 3, 2, 64, 64)
    with torch.no_grad():
        ours = single_frame(K, size=64, backbone="resnet50").eval()
        assert "not used" not in fill(ours, part)
        expected = theirs(clip[0].transpose(0, 1)).softmax(1).mean(0, keepdim=True)
        torch.testing.assert_close(ours(clip).softmax(1), expected, rtol=1e-4, atol=1e-5)

        frame = torch.rand(1, 3, 1, 64, 64)
        c2d = c2d_r50_8x8(K).eval()
        fill(c2d, part)
        still = c2d(frame.expand(-1, -1, 4, -1, -1))
        torch.testing.assert_close(still, theirs(frame[:, :, 0]), rtol=1e-4, atol=1e-4)


def test_networks_that_compute_something_else_are_refused(tmp_path):
    stem = {"backbone.conv1.conv.weight": torch.zeros(64, 3, 5, 7, 7)}
    with pytest.raises(UserError, match="MMAction2's I3D, which halves time"):
        fill(i3d_r50_8x8(K, width=8), opened(tmp_path, stem))
    stem = {"backbone.slow_path.conv1.conv.weight": torch.zeros(64, 3, 1, 7, 7)}
    with pytest.raises(UserError, match="neither norm nor ReLU"):
        fill(slowfast_r50_4x16(K, width=16), opened(tmp_path, stem))
