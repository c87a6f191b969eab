"""Networks of other projects, by the names of their tensors alone.

A `Net` is a state dict that a forward pass fills as it goes: what is used for the first time is drawn
at random. Written from the papers and from the projects' lists of names, so that it shares no code with
the networks or the key maps that are tested with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Net:
    """Layers that find their tensors by name."""

    def __init__(self, seed: int = 0) -> None:
        self.state: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)

    def tensor(self, name: str, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        if name not in self.state:
            drawn = torch.rand(shape, generator=self.random)
            self.state[name] = low + (high - low) * drawn
        assert self.state[name].shape == shape, name
        return self.state[name]

    def conv(self, x, name, out, kernel, stride=(1, 1, 1), padding=None, groups=1, bias=False):
        """A convolution that keeps lengths unless it is told its padding."""
        size = (out, x.shape[1] // groups, *kernel)
        bound = (3 / (size[1] * torch.tensor(kernel).prod().item())) ** 0.5
        weight = self.tensor(f"{name}.weight", *size, low=-bound, high=bound)
        extra = self.tensor(f"{name}.bias", out) if bias else None
        padding = tuple(k // 2 for k in kernel) if padding is None else padding
        return F.conv3d(x, weight, extra, stride, padding, groups=groups)

    def norm(self, x, name, eps=1e-5):
        dim = x.shape[1]
        self.state.setdefault(f"{name}.num_batches_tracked", torch.tensor(7))
        return F.batch_norm(
            x,
            self.tensor(f"{name}.running_mean", dim, low=-0.3, high=0.3),
            self.tensor(f"{name}.running_var", dim, low=0.5, high=1.5),
            self.tensor(f"{name}.weight", dim, low=0.5, high=1.5),
            self.tensor(f"{name}.bias", dim, low=-0.3, high=0.3),
            eps=eps,
        )

    def linear(self, x, name, out, bias=True):
        bound = (3 / x.shape[1]) ** 0.5
        weight = self.tensor(f"{name}.weight", out, x.shape[1], low=-bound, high=bound)
        return F.linear(x, weight, self.tensor(f"{name}.bias", out) if bias else None)


def randomise(network: torch.nn.Module, seed: int = 0) -> None:
    """Give every tensor of a network values, so that none of them can be left out unseen."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=random))
            elif tensor.is_floating_point() and tensor.ndim == 1:
                shift = 1.0 if name.endswith("weight") else 0.0
                tensor.copy_(shift + 0.3 * (2 * torch.rand(tensor.shape, generator=random) - 1))
            elif tensor.is_floating_point():
                fan = max(1, tensor[0].numel())
                drawn = 2 * torch.rand(tensor.shape, generator=random) - 1
                tensor.copy_(drawn * (3 / fan) ** 0.5)
