"""What several tests of networks do to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from vidtrain.trace.table import layer_table

POOLING = ("aten.mean.dim", "aten.view.default")


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


def compiled_for_gpu(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Counter[str]:
    """Count the operations that `torch.compile` is given of a network in training on a GPU.

    No GPU is needed: tensors have a shape, memory order and device, and no content.

    Args:
        make: Makes the network.
        shape: Of a batch of clips, (B, C, T, H, W).

    Returns:
        How often each operation comes, with its settings and what comes out: shape, memory order, type.
        Pooling to one place, the same with the axes that it leaves and without, is left out.
    """
    found: list[str] = []

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.stride(), value.dtype, value.device.type
        return [told(one) for one in value] if isinstance(value, list | tuple) else value

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if node.op == "call_function" and str(node.target) not in POOLING:
                arguments = (torch.fx.map_arg(one, lambda node: "tensor") for one in node.args)
                found.append(f"{node.target}{tuple(arguments)} {told(node.meta['val'])}")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            net, clip = make().train(), torch.empty(shape)
        torch.compile(net, backend=aot_autograd(fw_compiler=note), fullgraph=True)(clip)
    torch._dynamo.reset()
    return Counter(found)
