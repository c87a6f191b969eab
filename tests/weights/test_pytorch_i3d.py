"""pytorch-i3d's layout: I3D written down by its names, against ours with its weights."""

import math

import named_net
import pytest
import torch
import torch.nn.functional as F

from vidtrain.models.i3d import i3d, i3d_flow, i3d_two_stream
from vidtrain.types import UserError
from vidtrain.weights.load import colours, fill, open_parts

K = 5
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64), "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


def same(x, kernel, stride):
    """Pad with zeros so that n places become ceil(n / stride)."""
    pads = []
    for n, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
        pads = [total // 2, math.ceil(total / 2), *pads]
    return F.pad(x, pads)


def unit(net, x, name, out, kernel=(1, 1, 1), stride=(1, 1, 1)):
    x = net.conv(same(x, kernel, stride), f"{name}.conv3d", out, kernel, stride, (0, 0, 0))
    return F.relu(net.norm(x, f"{name}.bn", eps=1e-3))


def pool(x, kernel, stride):
    return F.max_pool3d(same(x, kernel, stride), kernel, stride)


def inception(net, x):
    x = unit(net, x, "Conv3d_1a_7x7", 64, (7, 7, 7), (2, 2, 2))
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(net, x, "Conv3d_2b_1x1", 64)
    x = pool(unit(net, x, "Conv3d_2c_3x3", 192, (3, 3, 3)), (1, 3, 3), (1, 2, 2))
    for name, (b0, b1a, b1b, b2a, b2b, b3b) in MIXED.items():
        if name == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if name == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        at = f"Mixed_{name}"
        branches = [
            unit(net, x, f"{at}.b0", b0),
            unit(net, unit(net, x, f"{at}.b1a", b1a), f"{at}.b1b", b1b, (3, 3, 3)),
            unit(net, unit(net, x, f"{at}.b2a", b2a), f"{at}.b2b", b2b, (3, 3, 3)),
            unit(net, pool(x, (3, 3, 3), (1, 1, 1)), f"{at}.b3b", b3b),
        ]
        x = torch.cat(branches, 1)
    x = F.avg_pool3d(x, (2, x.shape[3], x.shape[4]), 1)
    return net.conv(x, "logits.conv3d", K, (1, 1, 1), bias=True).flatten(2).mean(2)


def opened(path, state, at=""):
    torch.save(state, path)
    weights = {at: str(path)} if at else str(path)
    (part,) = open_parts({"weights": weights}, path.parent, print)
    assert part.layout.name == "pytorch_i3d"
    return part


def test_frames_and_flow_and_both(tmp_path):
    frames = torch.rand(1, 3, 9, 38, 32) * 2 - 1
    flow = torch.rand(1, 2, 9, 38, 32) * 2 - 1
    rgb_net, flow_net = named_net.Net(1), named_net.Net(2)
    with torch.no_grad():
        expected = inception(rgb_net, frames), inception(flow_net, flow)
        seen = opened(tmp_path / "rgb.pt", rgb_net.state)
        moved = opened(tmp_path / "flow.pt", flow_net.state)
        for net, part, x, logits in (
            (i3d(K).eval(), seen, frames, expected[0]),
            (i3d_flow(K).eval(), moved, flow, expected[1]),
        ):
            assert fill(net, part).endswith(f"{len(rgb_net.state)} tensors")
            torch.testing.assert_close(net(x), logits, rtol=1e-4, atol=1e-4)

        both = i3d_two_stream(K).eval()
        parts = [seen._replace(at="rgb"), moved._replace(at="flow")]
        for part in parts:
            fill(both, part)
        torch.testing.assert_close(both(frames, flow), sum(expected), rtol=1e-4, atol=1e-4)
    assert colours(parts) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert seen.facts.mean == (0.5, 0.5, 0.5) and moved.facts.mean is None
    with pytest.raises(UserError, match="64 x 3 x 7 x 7 x 7 there and 64 x 2 x 7 x 7 x 7 here"):
        fill(i3d_flow(K), seen)
