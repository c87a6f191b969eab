"""What several tests of networks do to them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vidtrain.trace.table import layer_table


def counts(net: nn.Module, frames: int, size: int) -> tuple[int, float]:
    """Count parameters and the multiply-adds (G) of a clip."""
    layers = layer_table(net, (3, frames, size, size))
    return sum(layer.params for layer in layers), sum(layer.macs for layer in layers) / 1e9


def shake_norms(
    net: nn.Module,
    variance: tuple[float, float] = (0.5, 1.5),
    last: str | None = None,
) -> nn.Module:
    """Give batch norms statistics and affine parameters as of a trained net, which hide nothing.

    Args:
        net: Put into eval mode.
        variance: From and to. Small ones let the signal live through many layers.
        last: How the names of norms end whose result is added to a shortcut: their scales stay small,
            or logits would grow too large to compare.
    """
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm):
            small = last is not None and name.endswith(last)
            nn.init.uniform_(module.weight, *((0.1, 0.5) if small else (0.5, 1.5)))
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, *variance)
    return net.eval()
