"""The non-local block against its definition, place by place."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vidtrain.layers.non_local import PAIRWISE, NonLocal
from vidtrain.types import UserError

POOLS = [None, (1, 2, 2), (2, 2, 2)]
SOFTMAX = ("embedded_gaussian", "gaussian")


def filled(pairwise: str, dim: int = 6, pool=None) -> NonLocal:
    """Build a block that lets everything through: random weights, statistics, scale and shift."""
    torch.manual_seed(0)
    block = NonLocal(dim, pairwise, pool)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.uniform_(block.norm.weight, 0.5, 1.5)
    nn.init.normal_(block.norm.running_mean, std=0.1)
    nn.init.uniform_(block.norm.running_var, 0.5, 1.5)
    return block.eval()


def by_definition(block: NonLocal, x: torch.Tensor) -> torch.Tensor:
    """The paper's equations, one pair of places after another: (C, T, H, W) -> the same."""
    others = x if block.pool is None else nn.functional.max_pool3d(x[None], block.pool)[0]

    def embed(conv, place):
        return conv.weight.flatten(1) @ place + conv.bias

    places, columns = x.flatten(1).T, others.flatten(1).T
    rows = []
    for i in places:
        scores = []
        for j in columns:
            if block.pairwise == "gaussian":
                scores.append(torch.exp(i @ j))
                continue
            theta, phi = embed(block.theta, i), embed(block.phi, j)
            if block.pairwise == "embedded_gaussian":
                scores.append(torch.exp(theta @ phi / len(theta) ** 0.5))
            elif block.pairwise == "dot_product":
                scores.append(theta @ phi)
            else:
                scores.append((block.pair.flatten() @ torch.cat([theta, phi])).clamp(min=0))
        total = sum(scores) if block.pairwise in SOFTMAX else len(scores)
        y = sum(score / total * embed(block.g, j) for score, j in zip(scores, columns, strict=True))
        rows.append(embed(block.out, y))
    z = torch.stack(rows, 1).view_as(x)
    return x + block.norm(z[None])[0]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_it_is_what_the_paper_defines(pairwise, pool):
    block = filled(pairwise, pool=pool).double()
    x = torch.randn(2, 6, 2, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        z = block(x)
        torch.testing.assert_close(z, torch.stack([by_definition(block, clip) for clip in x]))
        assert (z - x).abs().amin() > 1e-6
        swapped = block(x.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(swapped, z)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_it_starts_as_the_identity(pairwise, pool):
    block = NonLocal(8, pairwise, pool)
    x = torch.randn(2, 8, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(block.train()(x), x)
        assert torch.equal(block.eval()(x), x)
        block.norm.weight.fill_(0.5)
        assert not torch.equal(block(x), x)


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_at_first_only_the_scale_and_shift_learn(pairwise):
    block = NonLocal(8, pairwise)
    torch.manual_seed(0)
    block(torch.randn(2, 8, 2, 4, 4)).square().sum().backward()
    moved = {name for name, parameter in block.named_parameters() if parameter.grad.any()}
    assert moved == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("pool", [None, (1, 2, 2)])
@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_every_place_sees_the_farthest(pairwise, pool):
    block = filled(pairwise, pool=pool).double()
    if pairwise == "concatenation":  # no pair may lie below the ReLU, where nothing changes
        block.theta.bias.data += 20 * block.pair[0] / block.pair[0].square().sum()
    x = torch.randn(1, 6, 4, 4, 4, dtype=torch.float64)
    other = x.clone()
    other[:, :, -1, -2:, -2:] += 1
    with torch.no_grad():
        moved = (block(other) - block(x)).abs().amax(1)[0]
    assert moved.shape == (4, 4, 4) and moved.min() > 1e-9


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_places_in_another_order_come_out_in_that_order(pairwise):
    block = filled(pairwise)
    x = torch.randn(2, 6, 2, 4, 4)
    order = torch.randperm(32)

    def shuffle(y):
        return y.flatten(2)[:, :, order].view_as(y)

    with torch.no_grad():
        torch.testing.assert_close(block(shuffle(x)), shuffle(block(x)))


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_every_place_twice_changes_nothing(pairwise):
    block = filled(pairwise)
    x = torch.randn(2, 6, 2, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(block(torch.cat([x, x], 4)), torch.cat([block(x)] * 2, 4))


@pytest.mark.parametrize("pairwise", SOFTMAX)
def test_weights_of_a_softmax_add_up_to_one(pairwise):
    block = filled(pairwise, pool=(1, 2, 2))
    nn.init.zeros_(block.g.weight)
    nn.init.ones_(block.g.bias)
    seen = []
    block.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(torch.randn(2, 6, 2, 4, 4))
    torch.testing.assert_close(seen[0], torch.ones(2, 3, 2, 4, 4))


@pytest.mark.parametrize(("dim", "params"), [(512, 526_592), (1024, 2_101_760)])
def test_parameters(dim, params):
    def count(pairwise):
        with torch.device("meta"):
            return sum(p.numel() for p in NonLocal(dim, pairwise).parameters())

    assert count("embedded_gaussian") == count("dot_product") == params
    assert count("concatenation") == params + dim  # w_f, of C / 2 + C / 2
    assert count("gaussian") == params - 2 * (dim * dim // 2 + dim // 2)


def test_gaussian_has_no_embeddings():
    assert {name for name, _ in NonLocal(8, "gaussian").named_children()} == {"g", "out", "norm"}


@pytest.mark.parametrize(("side", "fewer"), [(4, False), (24, True)])
def test_dot_products_are_taken_from_the_side_that_is_cheaper(side, fewer):
    block = filled("dot_product", 32)
    x = torch.randn(1, 32, 1, side, side)
    m, d = side * side, 16
    as_written, regrouped = 2 * m * m * d, 2 * m * d * d
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        z = block(x)
    convs = 4 * m * 32 * 16
    assert counter.get_total_flops() == 2 * (convs + (regrouped if fewer else as_written))
    with torch.no_grad():
        theta, phi, g = (conv(x).flatten(2) for conv in (block.theta, block.phi, block.g))
        y = (theta.transpose(1, 2) @ phi / m) @ g.transpose(1, 2)
        y = block.norm(block.out(y.transpose(1, 2).reshape(1, 16, 1, side, side)))
    torch.testing.assert_close(z, x + y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_a_map_smaller_than_the_pool(pairwise):
    assert filled(pairwise, pool=(2, 2, 2))(torch.randn(1, 6, 1, 1, 3)).shape == (1, 6, 1, 1, 3)


@pytest.mark.parametrize("pairwise", PAIRWISE)
def test_low_precision(pairwise):
    block, x = filled(pairwise), torch.randn(2, 6, 2, 4, 4)
    with torch.no_grad():
        exact = block(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(block(x).float(), exact, rtol=0.1, atol=0.1)


def test_unknown_pairwise_function():
    with pytest.raises(UserError, match=r"model\.non_local is 'cosine'; it must be null or one of"):
        NonLocal(8, "cosine")


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("pairwise", "theirs"), [("embedded_gaussian", "softmax"), ("dot_product", "dot_product")]
)
def test_same_as_pytorchvideo(pairwise, theirs, pool):
    nonlocal_net = pytest.importorskip("pytorchvideo.layers.nonlocal_net")
    block = filled(pairwise, 64, pool)
    for parameter in block.parameters():
        parameter.data *= 0.2  # of 64 channels, so that nothing grows too large to compare
    other = nonlocal_net.create_nonlocal(
        dim_in=64, dim_inner=32, pool_size=pool, instantiation=theirs
    )
    names = {"theta": "conv_theta", "phi": "conv_phi", "g": "conv_g", "out": "conv_out"}
    state = {
        ".".join([names.get(key.split(".")[0], key.split(".")[0]), key.split(".")[1]]): tensor
        for key, tensor in block.state_dict().items()
    }
    other.load_state_dict(state)
    x = torch.randn(2, 64, 4, 8, 8)
    with torch.no_grad():
        z = other.eval()(x)
        torch.testing.assert_close(block(x), z, rtol=1e-5, atol=1e-5)
        assert (z - x).std() > 0.1
