"""The small 3D CNN: its size, its shapes, and that it sees in which order frames come."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vidtrain.models.small_3d_cnn import small_3d_cnn


def test_parameters_and_multiply_adds():
    with torch.device("meta"):
        net = small_3d_cnn(8).eval()
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 16, 56, 56))
    assert sum(parameter.numel() for parameter in net.parameters()) == 293_112
    assert counter.get_total_flops() / 2 == 62_927_872  # two operations each


@pytest.mark.parametrize(
    "clip, out",
    [
        ((16, 56, 56), (4, 4, 4)),
        ((75, 48, 48), (19, 3, 3)),
        ((10, 72, 96), (3, 5, 6)),
        ((2, 17, 33), (1, 2, 3)),
        ((1, 1, 1), (1, 1, 1)),
    ],
)
def test_any_clip_will_do(clip, out):
    net = small_3d_cnn(5, widths=(4, 6, 8, 12)).eval()
    assert net.num_features == 12
    video = torch.randn(2, 3, *clip)
    with torch.no_grad():
        features = net.forward_features(video)
        assert features.shape == (2, 12, *out)
        assert net(video).shape == (2, 5)
        net.reset_classifier(0)
        torch.testing.assert_close(net(video), features.mean((2, 3, 4)))
        net.reset_classifier(3)
        assert net(video).shape == (2, 3)


def test_dropout_is_in_training_only():
    net = small_3d_cnn(4, widths=(4, 4, 4, 64), dropout=0.5)
    video = torch.randn(2, 3, 4, 16, 16)
    torch.manual_seed(0)
    assert not torch.equal(net(video), net(video))
    net.eval()
    assert torch.equal(net(video), net(video))


def drift(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Make noise that moves by a pixel a frame, left (0) or right (1): `(B, 3, 6, 16, 16)`."""
    label = torch.randint(2, (count,), generator=generator)
    still = torch.randn(count, 3, 16, 16, generator=generator)
    clips = [
        torch.stack([image.roll((2 * int(y) - 1) * t, -1) for t in range(6)], 1)
        for image, y in zip(still, label, strict=True)
    ]
    return torch.stack(clips), label


def test_learns_a_direction_and_reads_it_backwards_in_a_reversed_clip():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = small_3d_cnn(2, widths=(8, 16, 16, 16))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(60):
        video, label = drift(16, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(video), label).backward()
        optimizer.step()
    net.eval()
    video, label = drift(100, generator)
    with torch.no_grad():
        assert (net(video).argmax(1) == label).float().mean() > 0.95
        assert (net(video.flip(2)).argmax(1) == 1 - label).float().mean() > 0.95
