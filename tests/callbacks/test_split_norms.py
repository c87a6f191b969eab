"""Batch norm over parts of a batch: each part as alone, the running statistics as of the whole."""

import pytest
import torch
from torch import nn

from vidtrain.callbacks.multigrid import split_norms


def made(splits: int, momentum: float | None = 0.1) -> nn.BatchNorm3d:
    torch.manual_seed(0)
    norm = nn.BatchNorm3d(3, momentum=momentum)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    (norm_,) = split_norms(nn.Sequential(norm))
    norm_.splits = splits
    return norm


def clips(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shift = torch.arange(count).view(-1, 1, 1, 1, 1)
    return torch.randn(count, 3, 2, 4, 4, generator=generator) * 2 + shift


@pytest.mark.parametrize("count", [8, 9])
def test_each_part_is_normalised_by_itself(count):
    video = clips(count)
    for first in range(4):
        assert torch.equal(made(4)(video)[first::4], made(1)(video[first::4]))
    assert not torch.allclose(made(4)(video), made(1)(video))
    few = clips(5)  # two parts, as each has two clips at least
    assert torch.equal(made(4)(few)[1::2], made(1)(few[1::2]))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_the_whole_batch(momentum):
    norm, plain = made(4, momentum), made(1, momentum)
    for count in (8, 6):
        norm(clips(count))
        plain(clips(count))
    assert torch.allclose(norm.running_mean, plain.running_mean, atol=1e-5)
    # but for what the parts, which are smaller, add for being samples
    assert torch.allclose(norm.running_var, plain.running_var, rtol=0.02)
    assert norm.num_batches_tracked == plain.num_batches_tracked == 2


def test_gradients_reach_the_parameters_and_a_test_is_as_ever():
    norm = made(4)
    norm(clips(8)).square().sum().backward()
    assert norm.weight.grad.abs().sum() > 0
    norm.eval()
    plain = nn.BatchNorm3d(3).eval()
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(clips(8)), plain(clips(8)))


def test_nothing_but_the_class_changes():
    plain = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.BatchNorm1d(4), nn.LayerNorm(4))
    before = {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()}
    assert len(split_norms(plain)) == len(split_norms(plain)) == 2
    assert {name: tensor.data_ptr() for name, tensor in plain.state_dict().items()} == before
    video = clips(4)
    norm, other = made(1), nn.BatchNorm3d(3)
    other.load_state_dict(norm.state_dict())
    assert torch.equal(norm(video), other(video))  # one part: to the bit
