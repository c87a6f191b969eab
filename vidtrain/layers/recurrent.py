"""Recurrences over time: the LSTM, and recurrent layers whose states are maps.

Time comes first, `(T, B, ...)`, so that a step is one piece of memory. What a step takes from its
input does not hang on other steps: it is computed for all of them at once. Only what a step takes
from the state before it is computed one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]  # of an LSTM: h and c, each (layers, B, D)


class LSTM(nn.RNNBase):
    """An LSTM with the parameters of `nn.LSTM`, by the same names, that torch.compile traces whole.

    Args:
        dim: Of the input.
        hidden: D, of the state.
        layers: How many, one reading the other.
        dropout: Between them.
    """

    def __init__(self, dim: int, hidden: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__("LSTM", dim, hidden, layers, dropout=dropout if layers > 1 else 0.0)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(T, B, C) -> (T, B, D), the last layer's h at every step, and the state after the last."""
        if state is None:
            zeros = x.new_zeros(self.num_layers, x.shape[1], self.hidden_size)
            state = zeros, zeros
        # By name: `functional_call` and `export` put others in their place.
        weights = [getattr(self, name) for name in self._flat_weights_names]
        steps, h, c = torch.lstm(
            x, state, weights, True, self.num_layers, self.dropout, self.training, False, False
        )
        return steps, (h, c)


class ConvRNN(nn.Module):
    """`h_t = tanh(W_h * h_{t-1} + W_x * x_t)`, where `*` is a convolution over space.

    Args:
        in_channels: C, of x.
        channels: D, of h.
        kernel_size: Of both convolutions; odd.
        stride: Of W_x: the maps of h are smaller by it.
        padding_mode: As of `nn.Conv2d`.
    """

    one_row = True  # in `vidtrain summary`: its steps are many and alike

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        same: dict[str, Any] = {"padding": kernel_size // 2, "padding_mode": padding_mode}
        self.input = nn.Conv2d(in_channels, channels, kernel_size, stride, **same)
        self.hidden = nn.Conv2d(channels, channels, kernel_size, bias=False, **same)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """(T, B, C, H, W) -> (T, B, D, h, w), all states; `h` (B, D, h, w) is the one before them."""
        inputs = self.input(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        h = torch.zeros_like(inputs[0]) if h is None else h
        states = []
        for step in inputs.unbind():
            h = torch.tanh(step + self.hidden(h))
            states.append(h)
        return torch.stack(states)


class ConvGRU(nn.Module):
    """A gated recurrent unit whose products are convolutions over space.

        z = sigmoid(W_z * x + U_z * h)      r = sigmoid(W_r * x + U_r * h)
        c = tanh(W * x + U * (r h))         h <- (1 - z) h + z c

    Ballas, Yao, Pal, Courville. ICLR 2016, equations 5 to 8. https://arxiv.org/abs/1511.06432

    Args:
        in_channels: C, of x.
        channels: D, of h.
        kernel_size: Of all convolutions; odd.
        padding_mode: As of `nn.Conv2d`.
    """

    one_row = True  # in `vidtrain summary`: its steps are many and alike

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, padding_mode: str = "zeros"
    ) -> None:
        super().__init__()
        same: dict[str, Any] = {"padding": kernel_size // 2, "padding_mode": padding_mode}
        self.input = nn.Conv2d(in_channels, 3 * channels, kernel_size, **same)  # W_z, W_r, W
        self.gates = nn.Conv2d(channels, 2 * channels, kernel_size, bias=False, **same)  # U_z, U_r
        self.candidate = nn.Conv2d(channels, channels, kernel_size, bias=False, **same)  # U

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """(T, B, C, H, W) -> (T, B, D, H, W), all states; `h` (B, D, H, W) is the one before them."""
        inputs = self.input(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        dim = inputs.shape[2] // 3
        h = torch.zeros_like(inputs[0, :, :dim]) if h is None else h
        states = []
        for step in inputs.unbind():
            gates, candidate = step.split((2 * dim, dim), 1)
            z, r = torch.sigmoid(gates + self.gates(h)).chunk(2, 1)
            h = torch.lerp(h, torch.tanh(candidate + self.candidate(r * h)), z)
            states.append(h)
        return torch.stack(states)
