"""What the tracer says a unit sees, against what gradients say, on nets of many shapes."""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from vidtrain.trace.footprint import Atom, Footprint, Span, plain
from vidtrain.trace.rules import Call, rule_for
from vidtrain.trace.table import layer_table

CLIP = (3, 16, 40, 40)


def conv(i, o, k, s=1, p=None, d=1):
    k = k if isinstance(k, tuple) else (k, k, k)
    pad = tuple(d * (size // 2) for size in k) if p is None else p
    return nn.Conv3d(i, o, k, stride=s, padding=pad, dilation=d)


class Residual(nn.Module):
    """A strided block with a projection, then a dilated one with an identity."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4, (1, 3, 3))
        self.a, self.b, self.short = conv(4, 6, 3, s=2), conv(6, 6, 3), conv(4, 6, 1, s=2)
        self.wide = conv(6, 6, 3, d=2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.b(self.a(x).relu()) + self.short(x)
        return x + self.wide(x)


class Inception(nn.Module):
    """Four branches side by side, each with another window."""

    def __init__(self):
        super().__init__()
        self.one, self.three, self.five = (
            conv(3, 2, 1),
            conv(3, 2, (1, 5, 5)),
            conv(3, 2, (5, 3, 3)),
        )
        self.pool = nn.AvgPool3d(3, stride=1, padding=1)
        self.after = conv(9, 4, (3, 1, 1))

    def forward(self, x):
        return self.after(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1))


class TwoPathways(nn.Module):
    """Every fourth frame beside all of them, joined by a strided convolution over time."""

    def __init__(self):
        super().__init__()
        self.slow, self.fast = conv(3, 4, (1, 5, 5)), conv(3, 2, (5, 5, 5))
        self.lateral = nn.Conv3d(2, 4, (5, 1, 1), stride=(4, 1, 1), padding=(2, 0, 0))
        self.last = conv(8, 4, (3, 3, 3))

    def forward(self, x):
        slow, fast = self.slow(x[:, :, ::4]), self.fast(x)
        return self.last(torch.cat([slow, self.lateral(fast)], dim=1))


class IndexedPathway(TwoPathways):
    """The slow frames picked by number."""

    def forward(self, x):
        index = torch.linspace(0, 12, 4, device=x.device).long()
        slow, fast = self.slow(x.index_select(2, index)), self.fast(x)
        return self.last(torch.cat([slow, self.lateral(fast)], dim=1))


class Hourglass(nn.Module):
    """Down, up again in two ways, and the fine map beside."""

    def __init__(self):
        super().__init__()
        self.down, self.low = conv(3, 4, 3, s=2), conv(4, 4, 3)
        self.up = nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.last = conv(7, 4, (1, 3, 3))

    def forward(self, x):
        return self.last(torch.cat([self.up(self.low(self.down(x))), x], 1))


class FoldedPlusOne(nn.Module):
    """2D convolutions on folded frames, 1D convolutions on folded places."""

    def __init__(self):
        super().__init__()
        self.space = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.time = nn.Conv1d(4, 5, 5, padding=2)

    def forward(self, x):
        t = x.shape[2]
        x = self.space(rearrange(x, "b c t h w -> (b t) c h w"))
        h = x.shape[2]
        x = self.time(rearrange(x, "(b t) c h w -> (b h w) c t", t=t))
        return rearrange(x, "(b h w) c t -> b c t h w", h=h, w=h)


class LoopOverTime(nn.Module):
    """One frame after another, stacked again."""

    def __init__(self):
        super().__init__()
        self.space, self.time = nn.Conv2d(3, 4, 5, padding=2), conv(4, 4, (3, 1, 1))

    def forward(self, x):
        return self.time(torch.stack([self.space(x[:, :, t]) for t in range(x.shape[2])], dim=2))


class Shift(nn.Module):
    """Channels of the frames before and after, by concatenation with zeros."""

    def __init__(self):
        super().__init__()
        self.last = conv(9, 4, (1, 3, 3))

    def forward(self, x):
        zeros = torch.zeros_like(x[:, :, :1])
        before = torch.cat([zeros, x[:, :, :-1]], 2)
        after = torch.cat([x[:, :, 1:], zeros], 2)
        return self.last(torch.cat([before, x, after], 1))


class ShiftInPlace(Shift):
    """The same, written into a tensor of zeros."""

    def forward(self, x):
        before, after = torch.zeros_like(x), torch.zeros_like(x)
        before[:, :, 1:] = x[:, :, :-1]
        after[:, :, :-1] = x[:, :, 1:]
        return self.last(torch.cat([before, x, after], 1))


class Differences(nn.Module):
    """Differences of frames, pooled unevenly, mirrored borders."""

    def __init__(self):
        super().__init__()
        self.space = nn.Conv3d(3, 4, (1, 3, 3))
        self.pool = nn.AvgPool3d((2, 3, 3), stride=(2, 2, 2))

    def forward(self, x):
        x = x[:, :, 1:] - x[:, :, :-1]
        return self.pool(self.space(nn.functional.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")))


class Patches(nn.Module):
    """Patches by unfolding, then a linear layer on each."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * 2 * 8 * 8, 6)

    def forward(self, x):
        x = x.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8)  # (B, C, t, h, w, 2, 8, 8)
        return self.embed(rearrange(x, "b c t h w u v z -> b t h w (c u v z)")).movedim(-1, 1)


class PatchesByView(Patches):
    """The same by regrouping."""

    def forward(self, x):
        x = rearrange(x, "b c (t u) (h v) (w z) -> b t h w (c u v z)", u=2, v=8, z=8)
        return self.embed(x).movedim(-1, 1)


class SqueezeExcite(nn.Module):
    """A gate that has seen the whole clip."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = conv(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        gate = self.gate(x.mean((2, 3, 4))).sigmoid()
        return x * gate[:, :, None, None, None]


class TimeAttention(nn.Module):
    """Attention over time at each place, after a convolution over space."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 8, (1, 4, 4), stride=(1, 4, 4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.patch(x)
        h = x.shape[3]
        x = rearrange(x, "b d t h w -> (b h w) t d")
        x = x + self.attention(x, x, x)[0]
        return rearrange(x, "(b h w) t d -> b d t h w", h=h, w=h)


class SpaceAttention(nn.Module):
    """Attention over space in each frame, written out, then a convolution over time."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 8, (2, 8, 8), stride=(2, 8, 8))
        self.qkv, self.time = nn.Linear(8, 24), conv(8, 8, (3, 1, 1))

    def forward(self, x):
        x = self.patch(x)
        t, h = x.shape[2:4]
        q, k, v = self.qkv(rearrange(x, "b d t h w -> (b t) (h w) d")).chunk(3, -1)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.time(rearrange(x, "(b t) (h w) d -> b d t h w", t=t, h=h))


class ClassToken(nn.Module):
    """A class token beside the patches, taken off again before anything is mixed over space."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv3d(3, 8, (2, 8, 8), stride=(2, 8, 8))
        self.token = nn.Parameter(torch.rand(1, 1, 8))
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)
        self.last = conv(8, 4, (1, 3, 3))

    def forward(self, x):
        x = self.patch(x)
        t, h = x.shape[2:4]
        tokens = rearrange(x, "b d t h w -> b (t h w) d")
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.mlp(self.norm(tokens))[:, 1:]
        return self.last(rearrange(tokens, "b (t h w) d -> b d t h w", t=t, h=h))


class Flipped(nn.Module):
    """Forwards and backwards in time, added."""

    def __init__(self):
        super().__init__()
        self.conv = conv(3, 4, (3, 3, 3))

    def forward(self, x):
        return self.conv(x).flip(2).flip(2)


class Rolled(nn.Module):
    """Each frame beside the one before, the last before the first."""

    def __init__(self):
        super().__init__()
        self.last = conv(6, 4, (1, 3, 3))

    def forward(self, x):
        return self.last(torch.cat([x, x.roll(1, 2)], 1))


LOCAL = [
    Residual, Inception, TwoPathways, IndexedPathway, Hourglass, FoldedPlusOne, LoopOverTime, Shift,
    ShiftInPlace, Differences, Patches, PatchesByView, SqueezeExcite, TimeAttention, SpaceAttention,
    ClassToken, Flipped, Rolled,
]  # fmt: skip


def extent_by_gradient(net: nn.Module, shape: tuple[int, ...]) -> list[int]:
    """The widest extent, over units of the middle, of what has a gradient."""
    net = net.double().eval()
    for parameter in net.parameters():
        parameter.data.abs_()
    clip = torch.rand(1, *shape, dtype=torch.double, requires_grad=True)
    output = net(clip)
    widest = torch.zeros(3, dtype=torch.long)
    t, h, w = (size // 2 for size in output.shape[2:])
    for place in ((t, h, w), (t - 1, h, w), (t, h - 1, w - 1)):
        (gradient,) = torch.autograd.grad(output[(0, 0, *place)], clip, retain_graph=True)
        seen = gradient[0].abs().sum(0).nonzero()
        widest = torch.maximum(widest, seen.amax(0) - seen.amin(0) + 1)
    return widest.tolist()


@pytest.mark.parametrize("kind", LOCAL, ids=lambda kind: kind.__name__)
def test_gradients_agree(kind):
    torch.manual_seed(0)
    net = kind()
    last = layer_table(net, CLIP)[-1]
    output = net(torch.rand(1, *CLIP))
    assert last.output == list(output.shape[1:])
    assert last.receptive_field == extent_by_gradient(net, CLIP)


class Recurrent(nn.Module):
    """Frames into vectors, an LSTM over them, the last step or all."""

    def __init__(self, every: bool):
        super().__init__()
        self.every = every
        self.space, self.lstm = nn.Conv2d(3, 4, 8, stride=8), nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        t = x.shape[2]
        x = self.space(rearrange(x, "b c t h w -> (b t) c h w")).mean((2, 3))
        x = self.lstm(x.unflatten(0, (-1, t)))[0]
        return self.head(x if self.every else x[:, -1])


@pytest.mark.parametrize("every", [True, False])
def test_recurrence_sees_all_frames(every):
    rows = {layer.name: layer for layer in layer_table(Recurrent(every), CLIP)}
    assert rows["space"].receptive_field == [1, 8, 8]
    assert rows["lstm"].receptive_field == CLIP_EXTENT
    assert rows["head"].output == ([2, 16] if every else [2])


CLIP_EXTENT = list(CLIP[1:])


@pytest.mark.parametrize("fused", [True, False])
def test_joint_attention_sees_everything(fused):
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv3d(3, 8, (2, 8, 8), stride=(2, 8, 8))
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.qkv(self.patch(x).flatten(2).transpose(1, 2))
            q, k, v = x.chunk(3, -1)
            if fused:
                x = nn.functional.scaled_dot_product_attention(q, k, v)
            else:
                x = (q @ k.transpose(1, 2)).softmax(-1) @ v
            return self.head(x.mean(1))

    rows = layer_table(Joint(), CLIP)
    by_type = {layer.type: layer for layer in rows}
    assert rows[0].receptive_field == rows[1].receptive_field == [2, 8, 8]
    assert by_type["matmul"].receptive_field == CLIP_EXTENT
    assert rows[-1].output == [5]


def test_windows_of_attention_are_as_wide_as_the_window():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.qkv = nn.Conv3d(3, 8, (1, 4, 4), stride=(1, 4, 4)), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x)  # 10 x 10 places
            t, h = x.shape[2:4]
            x = rearrange(x, "b d t (h p) (w q) -> (b t h w) (p q) d", p=5, q=5)
            q, k, v = self.qkv(x).chunk(3, -1)
            x = (q @ k.transpose(1, 2)).softmax(-1) @ v
            return rearrange(
                x, "(b t h w) (p q) d -> b d t (h p) (w q)", t=t, h=h // 5, w=h // 5, p=5
            )

    torch.manual_seed(0)
    last = layer_table(Windows(), CLIP)[-1]
    assert last.receptive_field == [1, 20, 20] == extent_by_gradient(Windows(), CLIP)


def test_attention_as_one_operation():
    """Some versions and devices do not take it apart."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (torch.rand(1, 2, 12, 4) for _ in range(3))
    tokens = (Atom("T", 3, 2.0), Atom("H", 2, 8.0), Atom("W", 2, 8.0))
    dims = (plain(1), plain(2), tokens, plain(4))
    seen = Footprint(dims, (Span(0, 2), Span(0, 8), Span(0, 8)))
    call = Call(attention.default, (q, k, v), {}, attention(q, k, v), lambda tensor: seen)
    out = rule_for(attention)(call, [seen, seen, seen])[0]
    assert out.dims == dims
    assert [span.size for span in out.spans] == [2 + 2 * 2, 8 + 8, 8 + 8]


def test_an_unknown_mixture_is_taken_to_see_everything():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv3d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.fft.fft(x, dim=2).real)

    assert layer_table(Spectrum(), CLIP)[-1].receptive_field == CLIP_EXTENT
