"""Convolutions over frames that are folded into the batch."""

import torch
from einops import rearrange
from torch import nn

from vidtrain.layers.conv import FoldedConv3d, FoldedTimeConv
from vidtrain.layers.pool import GlobalAvgPool


def test_folded_conv_is_a_3d_convolution():
    conv = FoldedConv3d(nn.Conv2d(3, 8, 5, stride=2, padding=1, bias=False), 10, 4, 2)
    clip = torch.rand(2, 3, 10, 16, 16)
    folded = conv(rearrange(clip, "b c t h w -> (b t) c h w"))
    whole = nn.functional.conv3d(clip, conv.weight, stride=(2, 2, 2), padding=(0, 1, 1))
    assert whole.shape[2] == 4 and conv.bias is None
    assert torch.equal(rearrange(folded, "(b t) c h w -> b c t h w", b=2), whole)


def test_time_conv_keeps_channels_and_places_apart():
    conv = FoldedTimeConv(6, num_frames=5, extent=2, stride=2)
    x = torch.rand(2, 5, 6, 3, 4)  # (B, T, D, H, W)
    weight = conv.conv.weight[:, 0, :, 0]  # (D, 2)
    expected = [
        x[:, t] * weight[:, 0].view(6, 1, 1)
        + x[:, t + 1] * weight[:, 1].view(6, 1, 1)
        + conv.conv.bias.view(6, 1, 1)
        for t in (0, 2)
    ]
    out = conv(x.flatten(0, 1)).unflatten(0, (2, 2))
    torch.testing.assert_close(out, torch.stack(expected, 1))

    last = FoldedTimeConv(6, num_frames=5, extent=2, stride=2, channels_last=True)
    last.load_state_dict(conv.state_dict())
    torch.testing.assert_close(
        last(x.flatten(0, 1).movedim(1, -1)).movedim(-1, 1), conv(x.flatten(0, 1))
    )
    tokens = x.flatten(0, 1).flatten(2).transpose(1, 2)  # (B·T, L, D)
    torch.testing.assert_close(
        last(tokens).transpose(1, 2).unflatten(2, (3, 4)), conv(x.flatten(0, 1))
    )


def test_global_pool():
    x = torch.rand(2, 4, 3, 5, 6)
    torch.testing.assert_close(GlobalAvgPool()(x), x.mean((2, 3, 4), keepdim=True))
    assert GlobalAvgPool(keep_time=False)(x).shape == (2, 4, 1, 1)
    torch.testing.assert_close(GlobalAvgPool(keep_time=False)(x).flatten(1), x.mean((2, 3, 4)))
