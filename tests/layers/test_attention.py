"""Self-attention: what it hands to PyTorch's kernels, and how much at once."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode

from vidtrain.layers import attention
from vidtrain.layers.attention import Attention, Block, attend
from vidtrain.models.timesformer import TimeSformer
from vidtrain.models.vivit import SplitAttention


class Watched(TorchFunctionMode):
    """Notes what scaled_dot_product_attention gets."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.calls.append((args, kwargs))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("key_bias", [True, False])
def test_flash_attention_can_take_what_it_gets(key_bias):
    net = Block(64, 4, 128, key_bias)
    with Watched() as seen, torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 6, 64))
    ((args, kwargs),) = seen.calls
    assert len(args) == 3 and not kwargs  # no mask
    for part in args:
        assert part.shape == (2, 4, 6, 16) and part.dtype == torch.bfloat16
        assert part.stride(-1) == 1 and part.untyped_storage().nbytes() == 2 * 2 * 6 * 3 * 64


@pytest.mark.parametrize("key_bias", [True, False])
def test_a_compiler_is_given_one_copy_of_activations(key_bias):
    """Backward puts the gradients of q, k and v beside each other; nothing else is moved."""
    net, x = Block(64, 4, 128, key_bias, drop=0.1).train(), torch.randn(2, 6, 64)
    found = Counter()

    def note(graph, inputs):
        moves = ("aten.stack", "aten.cat", "aten.clone", "aten.contiguous", "aten.copy")
        for node in graph.graph.nodes:
            if str(node.target).startswith(moves) and node.meta["val"].numel() >= x.numel():
                found[str(node.target)] += 1
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(x.requires_grad_())
    out.sum().backward()
    torch._dynamo.reset()
    assert found == {"aten.stack.default": 1}


def test_more_rows_than_a_kernel_takes_are_taken_in_turns():
    rows = attention.MOST_ROWS
    q = torch.empty(2 * rows + 1, 1, 2, 8, device="meta")
    with Watched() as seen:
        assert attend(q, q, q).shape == q.shape
    assert [len(args[0]) for args, _ in seen.calls] == [rows, rows, 1]
    with Watched() as seen:
        attend(q[:rows], q[:rows], q[:rows])
    assert len(seen.calls) == 1


def test_rows_are_fewer_where_a_gradient_would_be_too_long():
    """TimeSformer-B on 112 clips of 224 pixels: 12 heads, 8 frames that count as 128."""
    q = torch.empty(112 * 14 * 14, 12, 8, 64, device="meta")
    with Watched() as seen:
        attend(q, q, q)
    first = len(seen.calls[0][0][0])
    assert len(seen.calls) == 2 and first * 12 * 128 * 64 <= 2**31 < (first + 1) * 12 * 128 * 64
    q = torch.empty(2, 1, 2**26, 64, device="meta")  # a row that is too long by itself
    with Watched() as seen:
        attend(q, q, q)
    assert len(seen.calls) == 2


@pytest.mark.parametrize("make", [Attention, SplitAttention])
def test_turns_change_nothing(monkeypatch, make):
    torch.manual_seed(0)
    net = make(24, 4)
    x = torch.randn(5, 6, 24) if make is Attention else torch.randn(2, 3, 4, 24)

    def run():
        net.zero_grad()
        inputs = x.clone().requires_grad_()
        with Watched() as seen:
            out = net(inputs)
        out.square().sum().backward()
        return len(seen.calls), out, inputs.grad, net.qkv.weight.grad.clone()

    whole = run()
    monkeypatch.setattr(attention, "MOST_ROWS", 2)
    parts = run()
    assert parts[0] > whole[0]
    for one, other in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_timesformer_on_many_clips_attends_in_turns():
    """Along time there is a row for each place of each clip."""
    with torch.device("meta"):
        net = TimeSformer(5, num_frames=2, size=64, patch=4, dim=8, depth=1, heads=1)
        clips = torch.empty(257, 3, 2, 64, 64)
    with Watched() as seen:
        assert net(clips).shape == (257, 5)
    assert [len(args[0]) for args, _ in seen.calls] == [65_535, 257, 514]
