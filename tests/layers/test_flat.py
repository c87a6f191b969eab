"""Flat and depthwise convolutions against `nn.Conv3d`, value by value and gradient by gradient."""

import pytest
import torch
from torch import nn

from vidtrain.layers.flat import DepthwiseConv3d, FlatConv3d, dense_order, depthwise_order


@pytest.mark.parametrize(
    "arguments",
    [
        {"out_channels": 5, "kernel_size": 1},
        {"out_channels": 5, "kernel_size": 1, "stride": (1, 2, 2), "bias": False},
        {"out_channels": 4, "kernel_size": (5, 1, 1), "padding": (2, 0, 0), "groups": 4},
        {"out_channels": 6, "kernel_size": (3, 1, 1), "stride": (2, 1, 1), "groups": 2},
    ],
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
def test_same_as_conv3d(arguments, order):
    torch.manual_seed(0)
    ours, theirs = FlatConv3d(4, **arguments), nn.Conv3d(4, **arguments)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for conv in (ours, theirs):
        clip = torch.randn(2, 4, 7, 5, 6, generator=torch.Generator().manual_seed(1))
        clip = clip.contiguous(memory_format=order).requires_grad_()
        out = conv(clip)
        weights = torch.arange(out.numel(), dtype=torch.float).view(out.shape) / out.numel()
        (out * weights).sum().backward()
        results.append((out, clip.grad, conv.weight.grad))
    torch.testing.assert_close(*results)


def test_order_in_memory():
    clip = torch.randn(2, 3, 4, 5, 6)
    laid = depthwise_order(clip)
    assert torch.equal(laid, clip) and laid.is_contiguous(memory_format=torch.channels_last_3d)
    assert dense_order(clip) is clip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "frames"),
    [
        ((3, 3, 3), 1, (1, 1, 1), 5),
        ((3, 3, 3), 2, (1, 1, 1), 1),  # the frames before and behind are all padding
        ((5, 3, 3), 2, (2, 1, 1), 2),
        ((5, 3, 3), 1, (0, 0, 0), 7),
        ((1, 5, 5), 2, (0, 2, 2), 3),
        ((5, 1, 1), 1, (2, 0, 0), 7),
    ],
)
def test_channels_by_themselves(device, order, kernel, stride, padding, frames):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(0)
    flat = kernel[1:] == (1, 1)
    kind = FlatConv3d if flat else DepthwiseConv3d
    arguments = (8, 8, kernel, (1, stride, stride), padding)
    ours = kind(*arguments, groups=8, bias=False).to(device)
    theirs = nn.Conv3d(*arguments, groups=8, bias=False)
    theirs.load_state_dict(ours.state_dict())
    clip, results = torch.randn(2, 8, frames, 9, 8), []
    for conv, where in ((ours, device), (theirs, "cpu")):
        x = clip.to(where).contiguous(memory_format=order).requires_grad_()
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out = conv(x)
            weights = torch.arange(out.numel(), dtype=torch.float).view(out.shape) / out.numel()
            (out * weights.to(where)).sum().backward()
        results.append([tensor.cpu() for tensor in (out, x.grad, conv.weight.grad)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_order_in_memory_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    last = {"memory_format": torch.channels_last_3d}
    small = torch.randn(2, 3, 4, 5, 6, device="cuda")
    large = torch.empty(1, 3, 8, 1000, 1000, device="cuda")
    assert dense_order(small).is_contiguous(**last)
    assert depthwise_order(small.contiguous(**last)).is_contiguous()
    assert depthwise_order(large).is_contiguous()
    assert depthwise_order(large.half()).is_contiguous(**last)
    with torch.autocast("cuda", torch.bfloat16):
        assert depthwise_order(large).is_contiguous(**last)
        assert depthwise_order(small).is_contiguous()
