"""Convolutions of one pixel against `nn.Conv3d`, value by value and gradient by gradient."""

import pytest
import torch
from torch import nn

from vidtrain.layers.flat import FlatConv3d, depthwise_order


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
