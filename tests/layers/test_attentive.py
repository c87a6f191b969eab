"""Probes: counts, a plain reference, and what is said of mistakes."""

import pytest
import torch
from torch import nn

from vidtrain.layers.attentive import AttentiveProbe, LinearProbe, make_probe, pooled
from vidtrain.types import UserError


def shaken(net: nn.Module) -> nn.Module:
    """Fill all parameters with noise, so that nothing is hidden by zeros and ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            nn.init.normal_(parameter, 1.0 if name == "norm.weight" else 0.0, 0.3)
    return net


def test_attentive_probe_is_its_formula():
    net, x = shaken(AttentiveProbe(24, 3, 5)), torch.randn(2, 7, 24)
    with torch.no_grad():
        k, v = (x @ net.kv.weight.T + net.kv.bias).view(2, 7, 2, 3, 8).unbind(2)
        query = net.query.view(3, 8)
        scores = torch.einsum("hd,bnhd->bhn", query, k) / 8**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        seen = torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)
        q = net.query[0] + seen @ net.proj.weight.T + net.proj.bias
        centred = q - q.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        inner = (normed * net.norm.weight + net.norm.bias) @ net.mlp.fc1.weight.T + net.mlp.fc1.bias
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        q = q + inner @ net.mlp.fc2.weight.T + net.mlp.fc2.bias
        want = q @ net.linear.weight.T + net.linear.bias
        torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-4)
        assert (weights.amax(-1) > 0.3).any()  # it looks somewhere
        torch.testing.assert_close(net(x[:, torch.randperm(7)]), net(x), rtol=1e-4, atol=1e-4)
        other = x.clone()
        other[:, 6] += 1
        assert (net(other) - net(x)).abs().max() > 1e-2  # every token counts


@pytest.mark.parametrize(("dim", "heads", "classes"), [(24, 3, 5), (768, 12, 400)])
def test_counts(dim, heads, classes):
    with torch.device("meta"):
        attentive = AttentiveProbe(dim, heads, classes)
        linear = LinearProbe(dim, classes)
    count = sum(p.numel() for p in attentive.parameters())
    # query; k, v and proj; norm; MLP; linear layer
    parts = [dim, 3 * dim * dim + 3 * dim, 2 * dim, 8 * dim * dim + 5 * dim, (dim + 1) * classes]
    assert count == sum(parts)
    assert sum(p.numel() for p in linear.parameters()) == (dim + 1) * classes
    if dim == 768:
        assert count == 6_804_112


def test_linear_probe_norms_over_the_batch():
    net, x = shaken(LinearProbe(8, 3)).train(), torch.randn(16, 8) * 5 + 3
    normed = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(net(x), normed @ net.linear.weight.T + net.linear.bias)
    assert len(list(net.norm.parameters())) == 0
    for _ in range(200):
        net(x)
    net.eval()
    torch.testing.assert_close(net(x[:1]), net(x)[:1])  # its own statistics by now
    assert net(x).std() > 0.1
    with pytest.raises(UserError, match=r"model\.probe=linear .* data\.batch_size=4"):
        net.train()(x[:1])


def test_which_probe_takes_what():
    tokens = torch.randn(2, 7, 24)
    assert pooled(tokens, make_probe("attentive", 24, 3, 5)).shape == (2, 7, 24)
    assert torch.equal(pooled(tokens, make_probe("linear", 24, 3, 5)), tokens.mean(1))
    for kind in ("linear", "attentive"):
        none = make_probe(kind, 24, 3, 0)
        assert torch.equal(none(pooled(tokens, none)), tokens.mean(1))


def test_mistakes_are_named():
    with pytest.raises(
        UserError, match=r"model\.probe is 'atentive'; it is one of linear, attenti"
    ):
        make_probe("atentive", 24, 3, 5)
    with pytest.raises(UserError, match=r"model\.heads is 5"):
        make_probe("attentive", 24, 5, 5)
