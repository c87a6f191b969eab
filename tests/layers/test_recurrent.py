"""Recurrent layers against nn.LSTM and nn.RNN, and their equations written out."""

import pytest
import torch
from torch import nn

from vidtrain.layers.recurrent import LSTM, ConvGRU, ConvRNN


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("dim", "hidden", "params"),
    [(4096, 256, 4_458_496), (4096, 1024, 20_979_712), (1024, 512, 3_149_824)],
)
def test_lstm_parameters(dim, hidden, params):
    with torch.device("meta"):
        assert count(LSTM(dim, hidden)) == params == 4 * hidden * (dim + hidden + 2)


@pytest.mark.parametrize("layers", [1, 3])
def test_lstm_is_torchs_with_its_weights_as_they_are(layers):
    ours, theirs = LSTM(6, 5, layers), nn.LSTM(6, 5, layers)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 2, 6)
    steps, state = ours(x)
    expected, expected_state = theirs(x)
    torch.testing.assert_close(steps, expected, rtol=0, atol=0)
    for one, other in zip(state, expected_state, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_lstm_traces_whole_and_runs_in_bf16():
    lstm, x = LSTM(6, 5, 2).eval(), torch.randn(7, 2, 6)
    with torch.no_grad():
        compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], lstm(x)[0])
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(lstm(x)[0].float(), lstm(x)[0].float(), rtol=0, atol=0.02)
    assert lstm.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


@pytest.mark.parametrize("make", [ConvRNN, ConvGRU])
def test_chunks_with_the_state_carried_over_are_the_whole(make):
    layer, x = make(3, 4, 3), torch.randn(6, 2, 3, 5, 5)
    whole = layer(x)
    first = layer(x[:2])
    rest = layer(x[2:], first[-1])
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [ConvRNN, ConvGRU])
def test_a_state_knows_only_what_has_been(make):
    layer, x = make(3, 4, 3), torch.randn(6, 2, 3, 5, 5)
    before = layer(x)
    x[4:] += 1
    after = layer(x)
    torch.testing.assert_close(after[:4], before[:4], rtol=0, atol=1e-6)
    assert not torch.allclose(after[4], before[4], atol=1e-2)


def test_tanh_layer_on_single_pixels_is_torchs_rnn():
    """B5.10: without space left, the convolutions are matrix products."""
    rnn, ours = nn.RNN(6, 5), ConvRNN(6, 5, 1)
    with torch.no_grad():
        ours.input.weight.copy_(rnn.weight_ih_l0[..., None, None])
        ours.hidden.weight.copy_(rnn.weight_hh_l0[..., None, None])
        ours.input.bias.copy_(rnn.bias_ih_l0 + rnn.bias_hh_l0)
    x = torch.randn(7, 2, 6)
    torch.testing.assert_close(ours(x[..., None, None])[..., 0, 0], rnn(x)[0])


def test_parameters_of_the_lectures_layer():
    assert count(ConvRNN(64, 128, 3)) == 221_312


@pytest.mark.parametrize(
    ("x", "h", "kernel", "params"),
    [
        (128, 64, 3, 331_968),
        (256, 128, 3, 1_327_488),
        (512, 256, 3, 5_309_184),
        (4096, 512, 1, 7_079_424),
    ],
)
def test_gru_parameters(x, h, kernel, params):
    with torch.device("meta"):
        unit = ConvGRU(x, h, kernel)
    assert count(unit) == params == 3 * kernel**2 * h * (x + h) + 3 * h


def gates_of(unit: ConvGRU, x: torch.Tensor, h: torch.Tensor) -> list[torch.Tensor]:
    """The paper's equations one by one: z, r, the candidate and the new state."""
    conv = nn.functional.conv2d
    w_z, w_r, w = unit.input.weight.chunk(3)
    b_z, b_r, b = unit.input.bias.chunk(3)
    u_z, u_r = unit.gates.weight.chunk(2)
    z = torch.sigmoid(conv(x, w_z, b_z, padding=1) + conv(h, u_z, padding=1))
    r = torch.sigmoid(conv(x, w_r, b_r, padding=1) + conv(h, u_r, padding=1))
    candidate = torch.tanh(conv(x, w, b, padding=1) + conv(r * h, unit.candidate.weight, padding=1))
    return [z, r, candidate, (1 - z) * h + z * candidate]


def test_gru_is_the_papers_equations():
    unit, x = ConvGRU(3, 4, 3), torch.randn(5, 2, 3, 6, 6)
    h = torch.zeros(2, 4, 6, 6)
    for step, state in zip(x, unit(x), strict=True):
        h = gates_of(unit, step, h)[-1]
        torch.testing.assert_close(state, h)


def test_gru_from_nothing_is_gate_times_candidate_and_stays_below_one():
    """B5.8."""
    torch.manual_seed(0)
    unit = ConvGRU(3, 4, 3)
    for parameter in unit.parameters():
        parameter.data.mul_(4)
    x = torch.randn(30, 2, 3, 6, 6)
    states = unit(x)
    z, _, candidate, _ = gates_of(unit, x[0], torch.zeros(2, 4, 6, 6))
    torch.testing.assert_close(states[0], z * candidate)
    assert 0.9 < states.abs().max() < 1


@pytest.mark.parametrize("make", [ConvRNN, ConvGRU])
def test_a_shifted_input_gives_a_shifted_state(make):
    """B5.9, where frames go round at their edges."""
    layer = make(3, 4, 3, padding_mode="circular")
    x = torch.randn(5, 2, 3, 6, 8)
    shifted = layer(x.roll((2, 3), (-2, -1)))
    torch.testing.assert_close(shifted, layer(x).roll((2, 3), (-2, -1)), rtol=0, atol=1e-6)


def test_stride_shrinks_the_state_and_nothing_else():
    layer, x = ConvRNN(3, 4, 3, stride=2), torch.randn(5, 2, 3, 9, 9)
    assert layer(x).shape == (5, 2, 4, 5, 5)
