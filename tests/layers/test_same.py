"""SAME padding against TensorFlow's rule, worked by hand and place by place."""

import pytest
import torch
import torch.nn.functional as F

from vidtrain.layers.same import SameConv3d, SameMaxPool3d, same_padding


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads"),
    [
        (112, 3, 2, (0, 1)),
        (32, 3, 2, (0, 1)),
        (224, 7, 2, (2, 3)),
        (225, 7, 2, (3, 3)),
        (79, 7, 2, (3, 3)),
        (56, 3, 1, (1, 1)),
        (7, 2, 2, (0, 1)),
        (8, 2, 2, (0, 0)),
        (1, 7, 2, (3, 3)),
        (1, 2, 2, (0, 1)),
        (5, 1, 2, (0, 0)),
        (43, 3, 2, (1, 1)),
        (43, 5, 3, (2, 2)),
        (44, 5, 3, (1, 2)),
    ],
)
def test_places_padded(size, kernel, stride, pads):
    assert same_padding([size], [kernel], [stride]) == [pads]


def windows(x: torch.Tensor, kernel: int, stride: int, fill: float) -> torch.Tensor:
    """Cut the windows of a row of numbers one by one: (n,) -> (places, kernel)."""
    places = (len(x) + stride - 1) // stride
    lacking = max(places * stride - stride + kernel - len(x), 0)
    rows = []
    for place in range(places):
        start = place * stride - lacking // 2
        inside = [start + tap for tap in range(kernel)]
        rows.append([x[i].item() if 0 <= i < len(x) else fill for i in inside])
    return torch.tensor(rows)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride"), [(1, 1), (3, 1), (7, 1), (2, 2), (3, 2), (7, 2), (5, 3)]
)
def test_every_window_by_itself(axis, kernel, stride):
    generator = torch.Generator().manual_seed(kernel)
    extent, step = ([other if i == axis else 1 for i in range(3)] for other in (kernel, stride))
    conv = SameConv3d(1, 1, tuple(extent), tuple(step))
    pool = SameMaxPool3d(tuple(extent), tuple(step))
    for size in range(1, 12):
        x = torch.randn(size, generator=generator) - 3  # below 0: a padded 0 would be the maximum
        clip = x.view([1, 1, *(size if i == axis else 1 for i in range(3))])
        by_hand = windows(x, kernel, stride, 0.0) @ conv.weight.flatten() + conv.bias
        torch.testing.assert_close(conv(clip).flatten(), by_hand)
        highest = windows(x, kernel, stride, -torch.inf).amax(1)
        assert torch.equal(pool(clip).flatten(), highest), size


def test_axes_of_odd_and_even_length_together():
    x = torch.randn(2, 3, 7, 8, 10) - 3
    conv, pool = SameConv3d(3, 4, 3, 2), SameMaxPool3d((3, 3, 3), (2, 2, 2))
    ends = (0, 1, 0, 1, 1, 1)  # w and h are even, t is odd
    expected = F.conv3d(F.pad(x, ends), conv.weight, conv.bias, stride=2)
    torch.testing.assert_close(conv(x), expected)
    assert torch.equal(pool(x), F.max_pool3d(F.pad(x, ends, value=-torch.inf), 3, 2))
    assert expected.shape[2:] == (4, 4, 5)


def test_an_even_window_of_stride_one_is_refused():
    with pytest.raises(ValueError, match="even window"):
        SameMaxPool3d((1, 2, 2), (1, 1, 1))
