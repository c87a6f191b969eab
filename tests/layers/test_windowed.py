"""Sliding-window attention: the same as dense attention under a mask, at a cost that is linear."""

import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vidtrain.layers import windowed
from vidtrain.layers.windowed import WindowedAttention
from vidtrain.types import UserError

LENGTHS = (1, 5, 18, 19, 37, 250)


def shaken(window=18, dim=24, heads=3, **kwargs) -> WindowedAttention:
    """Weights and biases large enough that attention chooses."""
    torch.manual_seed(0)
    net = WindowedAttention(dim, heads, window, **kwargs)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def dense(net: WindowedAttention, x: torch.Tensor) -> torch.Tensor:
    """Compute all scores of all pairs, and mask them."""
    place = torch.arange(x.shape[1])
    sees = (place[:, None] - place).abs() <= net.reach
    sees[:, 0] = True

    def attend(q, k, v, sees):
        q, k, v = (part(x).unflatten(2, (net.heads, -1)) for part in (q, k, v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)

    local = attend(net.query, net.key, net.value, sees)
    whole = attend(net.query_global, net.key_global, net.value_global, torch.ones_like(sees))
    return net.proj(torch.cat([whole[:, :1], local[:, 1:]], 1))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", [18, 6, 2])
def test_same_as_dense_attention_under_a_mask(length, window):
    net = shaken(window)
    x = torch.randn(2, 1 + length, 24, requires_grad=True)
    torch.testing.assert_close(net(x), dense(net, x), rtol=1e-4, atol=1e-5)
    direction = torch.randn(2, 1 + length, 24)
    ours, theirs = (torch.autograd.grad((f(x) * direction).sum(), x)[0] for f in
                    (net, lambda x: dense(net, x)))  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "reach"), [(18, (21, 39)), (6, (27, 33))])
def test_a_token_is_seen_in_its_window_and_by_the_global_one(window, reach):
    net, x = shaken(window), torch.randn(1, 51, 24)
    other = x.clone()
    other[0, 1 + 30] += 1
    with torch.no_grad():
        moved = (net(other) - net(x)).abs().amax(-1)[0]
    assert moved[0] > 1e-3
    first, last = reach
    frames = (moved[1:] > 1e-4).nonzero().flatten().tolist()
    assert frames == list(range(first, last + 1))
    assert not moved[1:first].any() and not moved[last + 2 :].any()  # exactly


def test_the_global_token_is_seen_by_all():
    net, x = shaken(6), torch.randn(1, 51, 24)
    other = x.clone()
    other[0, 0] += 1
    with torch.no_grad():
        assert (net(other) - net(x)).abs().amax(-1).min() > 1e-4


def test_it_does_not_matter_what_stands_in_the_padding(monkeypatch):
    net, x = shaken(18), torch.randn(2, 1 + 22, 24)
    pad = torch.nn.functional.pad
    with torch.no_grad():
        before = net(x)
        monkeypatch.setattr(windowed.F, "pad", lambda x, amount: pad(x, amount, value=1e4))
        assert torch.equal(net(x), before)


def test_the_global_token_has_projections_of_its_own():
    net, x = shaken(), torch.randn(1, 41, 24)
    with torch.no_grad():
        before = net(x)
        for part in (net.query_global, net.key_global, net.value_global):
            part.weight += 0.3
            after = net(x)
            assert (after - before)[:, 0].abs().max() > 1e-3
            assert torch.equal(after[:, 1:], before[:, 1:])
            before = after
        for part in (net.query, net.key, net.value):
            part.weight += 0.3
            after = net(x)
            assert (after - before)[:, 1:].abs().amax(-1).min() > 1e-4
            assert torch.equal(after[:, 0], before[:, 0])
            before = after


def test_cost_grows_with_the_length():
    """Of all but the projections: products, and the largest tensor that is made."""

    def measure(length):
        largest = 0

        class Note(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                out = function(*args, **(kwargs or {}))
                tensors = [t for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t)]
                largest = max([largest, *(t.numel() for t in tensors)])
                return out

        with torch.device("meta"), torch.no_grad():
            q, kv = torch.empty(1, length, 3, 8), torch.empty(1, 1 + length, 3, 8)
            with FlopCounterMode(display=False) as flops:
                windowed.windowed(q, kv, kv, 9)
            with Note():
                windowed.windowed(q, kv, kv, 9)
        return flops.get_total_flops(), largest

    (few, small), (many, large) = measure(180), measure(1800)
    assert few > 0 and many == 10 * few and large == pytest.approx(10 * small, rel=0.05)


def test_dropout_is_for_training_alone():
    net, x = shaken(dropout=0.5), torch.randn(1, 31, 24)
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
        net.train()
        assert ((net(x) - net(x)).abs().amax(-1) > 1e-4).all()


def test_wrong_settings_are_named():
    for window in (0, 7, -2, "wide", 2.0):
        with pytest.raises(UserError, match=f"model.window is {re.escape(str(window))}"):
            WindowedAttention(24, 3, window)
    with pytest.raises(UserError, match=r"model\.heads is 5"):
        WindowedAttention(24, 5, 18)


def test_traced_whole():
    torch.compiler.reset()
    net, x = shaken(), torch.randn(1, 38, 24)
    with torch.no_grad():
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), net(x))
        exported = torch.export.export(net, (x,)).module()
        torch.testing.assert_close(exported(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_same_as_transformers(length):
    """Theirs takes sequences of whole windows: the rest is padding that is masked."""
    pytest.importorskip("transformers")
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerAttention

    net = shaken()
    config = LongformerConfig(hidden_size=24, num_attention_heads=3, attention_window=[18])
    theirs = LongformerAttention(config).self.eval()
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("proj")}
    theirs.load_state_dict(state)
    x = torch.randn(2, 1 + length, 24)
    spare = -(1 + length) % 18
    padded = nn.functional.pad(x, (0, 0, 0, spare), value=3.0)
    mask = torch.zeros(2, 1 + length + spare)
    mask[:, 0], mask[:, 1 + length :] = 1e4, -1e4
    with torch.no_grad():
        seen = theirs(padded, mask, mask < 0, mask > 0, True)[0][:, : 1 + length]
        torch.testing.assert_close(net(x), net.proj(seen), rtol=1e-4, atol=1e-4)
