"""ViViT: counts, what each kind of attention sees, how it begins, and the same logits as others' code."""

import re

import pytest
import torch
import torch.nn.functional as F
from nets import counts
from torch import Tensor, nn

from vidtrain.models import vivit
from vidtrain.models.vivit import FactorisedBlock, SplitAttention, ViViT, ViViTBlock
from vidtrain.optim.groups import depths
from vidtrain.recompute import recompute
from vidtrain.types import UserError
from vidtrain.weights.inflate import central_frame, inflate_kernel

NAMES = ("joint", "factorised_encoder", "factorised_attention", "factorised_dot_product")
EACH = pytest.mark.parametrize("name", NAMES)
LARGE = {"dim": 1024, "depth": 24, "heads": 16}
HUGE = {"dim": 1280, "depth": 32, "heads": 16, "patch": 14}


def size_of(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def on_meta(name: str, **kwargs) -> ViViT:
    with torch.device("meta"):
        return getattr(vivit, f"vivit_{name}")(400, **kwargs)


def small(name: str, **kwargs) -> ViViT:
    """A narrow network for 8 frames of 32 x 32 pixels, in tubelets of 2 x 8 x 8, as it begins."""
    torch.manual_seed(0)
    sizes = {"num_frames": 8, "size": 32, "patch": 8, "dim": 24, "depth": 2, "heads": 4}
    return getattr(vivit, f"vivit_b_{name}")(5, **{**sizes, **kwargs}).eval()


def shaken(net: nn.Module) -> nn.Module:
    """Fill all parameters with noise, zeros and ones too, so that nothing is hidden."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            norm = re.search(r"norm\d?\.weight$", name) is not None
            nn.init.normal_(parameter, 1.0 if norm else 0.0, 0.2)
    return net.eval()


def clip_of(frames: int = 8, height: int = 32, width: int = 32) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, frames, height, width)


# counts


@pytest.mark.parametrize(
    ("name", "kwargs", "frames", "size", "params", "gmacs"),
    [
        ("b_joint", {}, 32, 224, 88_954_000, 451.5248),
        ("b_factorised_encoder", {}, 32, 224, 115_062_928, 283.3420),
        ("b_factorised_encoder", {"temporal_depth": 0}, 32, 224, 86_696_080, 282.8590),
        ("b_factorised_attention", {}, 32, 224, 117_319_312, 371.0940),
        ("b_factorised_dot_product", {}, 32, 224, 88_952_464, 276.1819),
        ("l_joint", {}, 32, 224, 307_508_624, 1435.9687),
        ("l_joint", {}, 32, 320, 310_850_960, 3956.9991),
        ("b_factorised_encoder", LARGE, 32, 224, 354_903_440, 988.1837),
        ("b_factorised_encoder", LARGE, 128, 224, 354_952_592, 3952.6076),
        ("b_factorised_encoder", LARGE | {"temporal_depth": 24}, 32, 224, 606_827_920, 992.4737),
        ("b_joint", HUGE, 32, 224, 636_945_040, 3958.8364),
        ("b_factorised_encoder", HUGE, 32, 224, 710_765_200, 2681.1245),
    ],
)
def test_parameters_and_multiply_adds(name, kwargs, frames, size, params, gmacs):
    net = on_meta(name, num_frames=frames, size=size, **kwargs)
    assert counts(net, frames, size) == (params, pytest.approx(gmacs, abs=1e-3))


@pytest.mark.parametrize(("frames", "size"), [(32, 224), (2, 224), (64, 96)])
def test_multiply_adds_are_the_formulas(frames, size):
    d, t, s = 768, frames // 2, (size // 16) ** 2
    once = t * s * 1536 * d + d * 400

    def matrices(tokens: int, of_attention: int = 4) -> int:
        return (of_attention + 8) * d**2 * tokens

    def look(rows: int, tokens: int) -> int:
        return rows * 2 * tokens**2 * d

    n = t * s
    wanted = {
        "joint": 12 * (matrices(n + 1) + look(1, n + 1)),
        "factorised_encoder": 12 * (matrices(t * (s + 1)) + look(t, s + 1))
        + 4 * (matrices(t + 1) + look(1, t + 1)),
        "factorised_attention": 12 * (matrices(n, 8) + look(s, t) + look(t, s)),
        "factorised_dot_product": 12 * (matrices(n) + (look(s, t) + look(t, s)) / 2),
    }
    for name, macs in wanted.items():
        net = on_meta(f"b_{name}", num_frames=frames, size=size)
        assert counts(net, frames, size)[1] == pytest.approx((macs + once) / 1e9, abs=1e-6)


def test_parameters_that_differ():
    joint, encoder, attention, dot_product = (on_meta(f"b_{name}") for name in NAMES)
    assert size_of(joint) - size_of(dot_product) == 2 * 768  # the class token and its position
    block = attention.blocks[0]
    parts = size_of(block.temporal_norm1), size_of(block.temporal_attn)
    assert parts == (1_536, 2_362_368)
    assert size_of(attention) - size_of(joint) == 12 * sum(parts) - 1_536
    without = on_meta("b_factorised_encoder", temporal_depth=0)
    assert not any(name.startswith("temporal") for name, _ in without.named_parameters())
    assert size_of(encoder.temporal_blocks[0]) == 7_087_872
    added = 4 * 7_087_872 + 1_536 + 768 + 17 * 768
    assert size_of(encoder) - size_of(without) == added == 28_366_848
    assert joint.pos_embed.shape == (1, 3137, 768) and encoder.pos_embed.shape == (1, 197, 768)
    assert attention.pos_embed.shape == dot_product.pos_embed.shape == (1, 3136, 768)


# the paper's formulas, token by token


def look(attn: nn.Module, x: Tensor, heads: slice = slice(None)) -> Tensor:
    """Self-attention of (N, D), written out, by some of the heads; without the last matrix."""
    weight = attn.qkv.weight.unflatten(0, (3, attn.heads, -1))[:, heads]
    bias = attn.qkv.bias.unflatten(0, (3, attn.heads, -1))[:, heads]
    q, k, v = torch.einsum("nd,chkd->chnk", x, weight) + bias.unsqueeze(2)
    scores = (torch.einsum("hnk,hmk->hnm", q, k) / q.shape[-1] ** 0.5).exp()
    scores = scores / scores.sum(-1, keepdim=True)
    return torch.einsum("hnm,hmk->nhk", scores, v).flatten(1)


def matrix(x: Tensor, made: nn.Linear) -> Tensor:
    return torch.einsum("...d,ed->...e", x, made.weight) + made.bias


def normed(x: Tensor, made: nn.LayerNorm) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * made.weight + made.bias


def mlp(x: Tensor, block: nn.Module) -> Tensor:
    inner = matrix(normed(x, block.norm2), block.mlp.fc1)
    inner = inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))) / 2
    return x + matrix(inner, block.mlp.fc2)


def plain_block(x: Tensor, block: nn.Module) -> Tensor:
    """(N, D): all look at all."""
    return mlp(x + matrix(look(block.attn, normed(x, block.norm1)), block.attn.proj), block)


def over_space(x: Tensor, attn: nn.Module, heads: slice = slice(None)) -> Tensor:
    return torch.stack([look(attn, frame, heads) for frame in x])


def over_time(x: Tensor, attn: nn.Module, heads: slice = slice(None)) -> Tensor:
    places = range(x.shape[1])
    return torch.stack([look(attn, x[:, place], heads) for place in places], 1)


def plain(net: ViViT, name: str, clip: Tensor) -> Tensor:
    """Logits of one clip (3, T, H, W)."""
    (t, h, w), kernel = net.grid, net.patch_embed.proj.weight
    boxes = clip.reshape(3, t, 2, h, 8, w, 8)
    x = torch.einsum("ctahbwe,dcabe->thwd", boxes, kernel) + net.patch_embed.proj.bias
    x, pos = x.flatten(1, 2), net.pos_embed[0]  # (t, S, D)
    if name == "joint":
        x = torch.cat([net.cls_token[0], x.flatten(0, 1)]) + pos
        for block in net.blocks:
            x = plain_block(x, block)
        return matrix(normed(x, net.norm)[0], net.head)
    if name == "factorised_encoder":
        seen = []
        for frame in x:
            tokens = torch.cat([net.cls_token[0], frame]) + pos
            for block in net.blocks:
                tokens = plain_block(tokens, block)
            seen.append(normed(tokens, net.norm)[0])
        x = torch.stack([net.temporal_cls_token[0, 0], *seen]) + net.temporal_pos_embed[0]
        for block in net.temporal_blocks:
            x = plain_block(x, block)
        return matrix(normed(x, net.temporal_norm)[0], net.head)
    x = x + pos.view(t, h * w, -1)
    for block in net.blocks:
        if name == "factorised_attention":
            time, first = block.temporal_attn, normed(x, block.temporal_norm1)
            x = x + matrix(over_time(first, time), time.proj)
            x = x + matrix(over_space(normed(x, block.norm1), block.attn), block.attn.proj)
        else:
            half, first = block.attn.heads // 2, normed(x, block.norm1)
            time = over_time(first, block.attn, slice(half))
            space = over_space(first, block.attn, slice(half, None))
            x = x + matrix(torch.cat([time, space], -1), block.attn.proj)
        x = mlp(x, block)
    return matrix(normed(x, net.norm).flatten(0, 1).mean(0), net.head)


@EACH
def test_models_are_the_papers_formulas(name):
    net, clip = shaken(small(name)), clip_of()
    with torch.no_grad():
        wanted = torch.stack([plain(net, name, one) for one in clip])
        assert wanted.std() > 0.1
        torch.testing.assert_close(net(clip), wanted, rtol=1e-4, atol=1e-4)


# what is seen


def changed(before: Tensor, after: Tensor) -> set[tuple[int, int]]:
    """Name the tokens, by frame and place, that differ between (1, t, S, D)."""
    return {(frame, place) for frame, place in (before != after).any(-1)[0].nonzero().tolist()}


ROW = {(frame, 4) for frame in range(3)}  # the place 4 in all frames
FRAME = {(1, place) for place in range(6)}  # frame 1


def moved_token() -> tuple[Tensor, Tensor]:
    """Tokens of 3 frames of 6 places, and the same with place 4 of frame 1 moved."""
    x = torch.randn(1, 3, 6, 24)
    other = x.clone()
    other[0, 1, 4] += torch.randn(24)
    return x, other


@torch.no_grad()
def test_half_of_the_heads_see_their_own_place_and_half_their_own_frame():
    attn, (x, other) = shaken(SplitAttention(24, 4)), moved_token()
    seen = []
    attn.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attn(x), attn(other)
    before, after = (heads.unflatten(-1, (4, 6)) for heads in seen)
    for head, reach in enumerate((ROW, ROW, FRAME, FRAME)):
        assert changed(before[..., head, :], after[..., head, :]) == reach
    names = {name: tuple(p.shape) for name, p in attn.named_parameters()}
    assert names["qkv.weight"] == (72, 24) and names["proj.weight"] == (24, 24) and len(names) == 4


@torch.no_grad()
def test_factorised_attention_sees_its_own_place_then_its_own_frame():
    block, (x, other) = shaken(FactorisedBlock(24, 4, 0.0)), moved_token()
    rest = {name: p.clone() for name, p in block.state_dict().items()}
    block.attn.proj.weight.zero_()
    assert changed(block(x), block(other)) == ROW
    block.load_state_dict(rest)
    block.temporal_attn.proj.weight.zero_()
    assert changed(block(x), block(other)) == FRAME
    block.load_state_dict(rest)
    assert len(changed(block(x), block(other))) == 3 * 6  # both together: all


@torch.no_grad()
def test_space_comes_after_time():
    """Reads off what the second attention is given: what the first one saw, not what came in."""
    block, (x, other) = shaken(FactorisedBlock(24, 4, 0.0)), moved_token()
    seen = []
    block.attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(x), block(other)
    assert changed(*seen) == ROW


@EACH
@torch.no_grad()
def test_only_positions_tell_the_order_of_frames(name):
    net, clip = shaken(small(name)), clip_of()
    net.pos_embed *= 5
    pairs = clip.unflatten(2, (4, 2))[:, :, [2, 0, 3, 1]].flatten(2, 3)  # whole tubelets
    assert (net(pairs) - net(clip)).abs().max() > 1e-2
    if name == "factorised_encoder":
        net.temporal_pos_embed.zero_()
    else:
        net.pos_embed.zero_()
    torch.testing.assert_close(net(pairs), net(clip), rtol=0, atol=1e-4)
    assert (net(clip.roll(1, 2)) - net(clip)).abs().max() > 1e-3  # half tubelets


@torch.no_grad()
def test_without_an_encoder_over_time_the_frames_are_averaged():
    """Model 2 then is the mean of model 1 on each tubelet's frames by themselves."""
    net, clip = shaken(small("factorised_encoder", temporal_depth=0)), clip_of()
    frame = small("joint", num_frames=2)
    frame.load_state_dict(net.state_dict())  # the same names and sizes
    each = torch.stack([frame(clip[:, :, start : start + 2]) for start in (0, 2, 4, 6)])
    assert each.std(0).min() > 0.01
    torch.testing.assert_close(net(clip), each.mean(0), rtol=1e-4, atol=1e-4)
    with_time = shaken(small("factorised_encoder", temporal_depth=1))
    with_time.load_state_dict(net.state_dict(), strict=False)
    assert (with_time(clip) - net(clip)).abs().max() > 0.1


# how it begins


class PerFrame(nn.Module):
    """A vision transformer on each frame of tokens by itself, then the mean of all tokens."""

    def __init__(self, net: ViViT) -> None:
        super().__init__()
        self.net = net
        self.blocks = nn.ModuleList(ViViTBlock(24, 4, 0.0) for _ in net.blocks)
        for block, given in zip(self.blocks, net.blocks, strict=True):
            state = {n: p for n, p in given.state_dict().items() if "temporal" not in n}
            block.load_state_dict(state)

    def forward(self, clip: Tensor) -> Tensor:
        net, frames = self.net, []
        for start in range(0, clip.shape[2], 2):
            tokens = net.patch_embed(clip[:, :, start : start + 2]).flatten(1, 3)
            tokens = tokens + net.pos_embed.unflatten(1, (-1, 16))[:, start // 2]
            for block in self.blocks:
                tokens = block(tokens)
            frames.append(net.norm(tokens).mean(1))
        return net.head(torch.stack(frames).mean(0))


@pytest.mark.parametrize("init", vivit.INIT_TEMPORAL)
@torch.no_grad()
def test_attention_over_time_adds_nothing_at_first(init):
    net, clip = small("factorised_attention", init_temporal=init), clip_of()
    assert all(block.temporal_attn.proj.weight.any() == (init == "random") for block in net.blocks)
    for block in net.blocks:  # shaken but for what was zero
        zero = {block.temporal_attn.proj.weight, block.temporal_attn.proj.bias}
        for parameter in set(block.parameters()) - zero:
            parameter += 0.2 * torch.randn_like(parameter)
    off = (net(clip) - PerFrame(net)(clip)).abs().max() / net(clip).std()
    assert off < 1e-4 if init == "zero" else off > 1e-3
    other = clip.clone()
    other[:, :, 2] += 1
    reach = net.forward_features(other) != net.forward_features(clip)
    frames = reach.any(1).flatten(2).any(2).any(0).tolist()
    assert frames == ([False, True, False, False] if init == "zero" else [True] * 4)


def test_zero_learns():
    """The matrix that is zero gets a gradient, and the rest of the attention does when it has moved."""
    net, clip = small("factorised_attention").train(), clip_of()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    behind = {n for n, _ in net.named_parameters() if re.search(r"temporal_(norm1|attn\.qkv)", n)}
    assert len(behind) == 2 * 4
    for without in (behind, set()):
        optimizer.zero_grad()
        F.cross_entropy(net(clip), torch.tensor([0, 3])).backward()
        assert {name for name, p in net.named_parameters() if not p.grad.any()} == without
        optimizer.step()


def test_all_weights_at_zero_would_stay_there():
    """Which is why `zero` is not what the paper says it is: section 3.4, all of the attention's weights."""
    attn = vivit.TimeAttention(24, 4)
    for parameter in attn.parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(attn.proj.bias)  # the one that would learn, after some steps
    x = torch.randn(2, 3, 4, 24)
    (attn(x) * torch.randn(2, 3, 4, 24)).sum().backward()
    learning = {name for name, p in attn.named_parameters() if p.grad.any()}
    assert learning == {"proj.bias"}


@EACH
def test_first_weights(name):
    net = small(name, init_temporal="random") if name == "factorised_attention" else small(name)
    for key, parameter in net.named_parameters():
        if key.endswith("bias") and "patch_embed" not in key:
            assert not parameter.any(), key
        elif "norm" in key:
            assert (parameter == 1).all(), key
        elif "patch_embed" not in key:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.5), key
    net.train()(clip_of()).square().sum().backward()
    assert all(p.grad.any() for p in net.parameters())


@torch.no_grad()
def test_tubelets_of_an_image_networks_patches():
    flat, embed, clip = nn.Conv2d(3, 24, 8, 8), small("joint").patch_embed, clip_of()
    embed.proj.bias.copy_(flat.bias)

    def off(video: Tensor, seen: Tensor) -> float:
        tokens = embed(video).permute(0, 4, 1, 2, 3)
        wanted = torch.stack([flat(frame) for frame in seen.unbind(2)], 2)
        return (tokens - wanted).abs().max().item()

    embed.proj.weight.copy_(central_frame(flat.weight, 2))
    assert off(clip, clip[:, :, 1::2]) < 1e-5 < 0.1 < off(clip, clip[:, :, ::2])
    embed.proj.weight.copy_(inflate_kernel(flat.weight, 2, "average"))
    still = clip[:, :, :1].expand_as(clip)
    assert off(still, still[:, :, ::2]) < 1e-5
    mean = clip.unflatten(2, (4, 2)).mean(3)
    assert off(clip, mean) < 1e-5 < 0.1 < off(clip, clip[:, :, 1::2])


# other clips


@EACH
@torch.no_grad()
def test_map_lies_as_the_clip_does(name):
    net, clip = shaken(small(name, depth=0)), clip_of(6, 32, 40)[:1]
    other = clip.clone()
    other[0, 1, 5, 9, 31] += 1
    before, after = net.forward_features(clip), net.forward_features(other)
    assert before.shape == (1, 24, 3, 4, 5)
    assert (before != after).any(1).nonzero().tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("name", ["joint", "factorised_attention", "factorised_dot_product"])
@torch.no_grad()
def test_other_clips_get_positions_in_between(name):
    net = shaken(small(name, depth=0, num_frames=4))
    net.norm = nn.Identity()
    blank = torch.zeros(1, 3, 8, 32, 64)
    known = net.forward_features(blank[:, :, :4, :, :32])
    longer = net.forward_features(blank[..., :32])
    torch.testing.assert_close(longer[:, :, [0, 3]], known)
    torch.testing.assert_close(longer[:, :, 1], 0.75 * known[:, :, 0] + 0.25 * known[:, :, 1])
    wider = net.forward_features(blank[:, :, :4])
    torch.testing.assert_close(wider[..., [0, 7]], known[..., [0, 3]])
    torch.testing.assert_close(wider[..., 2], 0.75 * known[..., 1] + 0.25 * known[..., 0])


@torch.no_grad()
def test_other_clips_get_positions_in_between_in_two_encoders():
    net, x = shaken(small("factorised_encoder", depth=0)), torch.randn(2, 8, 24)
    known = net.temporal_pos_embed[:, 1:]
    seen = []
    net.temporal_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.over_time(x)
    net.over_time(x[:, :4])
    longer, same = seen[0] - F.pad(x, (0, 0, 1, 0)), seen[1] - F.pad(x[:, :4], (0, 0, 1, 0))
    cls = (net.temporal_cls_token + net.temporal_pos_embed[:, :1]).expand(2, -1, -1)
    torch.testing.assert_close(same, torch.cat([cls, known.expand(2, -1, -1)], 1))
    torch.testing.assert_close(longer[:, :1], cls)
    torch.testing.assert_close(longer[:, [1, 8]], known[:, [0, 3]].expand(2, -1, -1))
    between = 0.75 * known[0, 0] + 0.25 * known[0, 1]
    torch.testing.assert_close(longer[:, 2], between.expand(2, -1))
    net.norm = nn.Identity()
    narrow = net.forward_features(torch.zeros(1, 3, 8, 32, 32))
    wider = net.forward_features(torch.zeros(1, 3, 8, 32, 64))
    torch.testing.assert_close(wider[..., [0, 7]], narrow[..., [0, 3]])
    torch.testing.assert_close(wider[..., 2], 0.75 * narrow[..., 1] + 0.25 * narrow[..., 0])


# training


@EACH
@torch.no_grad()
def test_embedding_is_what_the_classifier_sees(name):
    net, clip = shaken(small(name)), clip_of()
    logits, head = net(clip), net.head
    net.reset_classifier(0)
    embedding = net(clip)
    assert embedding.shape == (2, net.num_features) == (2, 24)
    torch.testing.assert_close(head(embedding), logits)
    if name not in ("joint", "factorised_encoder"):
        torch.testing.assert_close(embedding, net.forward_features(clip).mean((2, 3, 4)))


@EACH
@torch.no_grad()
def test_drop_path_leaves_out_whole_branches_of_a_clip(name):
    net = small(name, drop_path=0.4, depth=3)
    rates = [getattr(block.drop_path, "p", 0) for block in net.blocks]
    assert rates == [0, 0.2, 0.4]
    if name == "factorised_encoder":
        rates = [getattr(block.drop_path, "p", 0) for block in net.temporal_blocks]
        assert rates == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    block = shaken(small(name, drop_path=0.5).blocks[-1])
    x = torch.randn((64, 12, 24) if name == "joint" else (64, 3, 4, 24))
    torch.manual_seed(0)
    same = (block.train()(x) == x).flatten(1)
    untouched = same.all(1)
    branches = 3 if name == "factorised_attention" else 2
    assert 0.4 * 64 / 2**branches <= untouched.sum() <= 2 * 64 / 2**branches
    assert same[~untouched].float().mean() < 0.01  # no frame and no token by itself
    assert torch.equal(block.eval()(x), block(x)) and not (block(x) == x).all()


@EACH
@torch.no_grad()
def test_dropout_is_before_the_classifier(name):
    net, clip = small(name, dropout=0.5).train(), clip_of()
    assert not torch.equal(net(clip), net(clip))
    net.reset_classifier(0)
    assert 0.2 < (net(clip) == 0).float().mean() < 0.8


@EACH
def test_blocks_computed_again_give_the_same_gradients(name):
    grads = []
    for again in (False, True):
        net = shaken(small(name, drop_path=0.3)).train()
        if again:
            assert recompute(net, True) == (6 if name == "factorised_encoder" else 2)
        torch.manual_seed(3)
        net(clip_of()).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@EACH
@torch.no_grad()
def test_whole_in_bf16(name):
    net, clip = shaken(small(name)), clip_of()
    logits = net(clip)
    rough = net.bfloat16()(clip.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - logits).abs().max() < 0.1 * logits.abs().max()


def test_depth_of_layers():
    for name in NAMES:
        depth, last = depths(on_meta(f"b_{name}"))
        assert last == (17 if name == "factorised_encoder" else 13)
        first = ("cls_token", "pos_embed", "temporal_cls_token", "temporal_pos_embed")
        assert {depth.get(key, 0) for key in (*first, "patch_embed.proj.weight")} == {0}
        for number in range(12):
            assert depth[f"blocks.{number}.attn.qkv.weight"] == number + 1
        assert depth["head.weight"] == last
    for number in range(4):
        depth, last = depths(on_meta("b_factorised_encoder"))
        assert depth[f"temporal_blocks.{number}.mlp.fc1.weight"] == 13 + number
    assert depth["norm.weight"] == 12 and depth["temporal_norm.weight"] == last


def test_bad_arguments_are_named():
    with torch.device("meta"):
        for name in NAMES:
            with pytest.raises(UserError, match=r"2 frames at a time and got a clip of 5"):
                small(name, num_frames=5)
            with pytest.raises(UserError, match=r"make clip\.num_frames .* a multiple of 2"):
                small(name)(torch.empty(1, 3, 7, 32, 32))
            with pytest.raises(UserError, match=r"8 x 8 pixels and got 32 x 33"):
                small(name)(torch.empty(1, 3, 8, 32, 33))
            with pytest.raises(UserError, match=r"model\.heads is 7; it must divide model\.dim"):
                small(name, heads=7)
            with pytest.raises(UserError, match=r"model\.drop_path is 1"):
                small(name, drop_path=1)
        with pytest.raises(UserError, match=r"model\.heads is 3; .* make it an even number"):
            small("factorised_dot_product", heads=3)
        for wrong in (-1, 1.5):
            with pytest.raises(UserError, match=rf"model\.temporal_depth is {wrong}; it is how"):
                small("factorised_encoder", temporal_depth=wrong)
        for wrong in ("ones", None):
            with pytest.raises(UserError, match=rf"model\.init_temporal is '{wrong}'; .* zero or"):
                small("factorised_attention", init_temporal=wrong)


HF = (
    (r"^vivit\.embeddings\.cls_token", "cls_token"),
    (r"^vivit\.embeddings\.position_embeddings", "pos_embed"),
    (r"^vivit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^vivit\.layers\.", "blocks."),
    (r"^vivit\.layernorm", "norm"),
    (r"^classifier", "head"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.o_proj", "attn.proj"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "size"), [(16, 64), (8, 96)])
def test_same_logits_as_transformers(frames, size):
    """Their default, `gelu_fast`, is GELU by tanh, as here."""
    hf = pytest.importorskip("transformers")
    config = hf.VivitConfig(image_size=size, num_frames=frames, num_labels=400)
    other = hf.VivitForVideoClassification(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            norm = "layernorm" in name and name.endswith("weight")
            nn.init.normal_(parameter, 1.0 if norm else 0.0, 0.05)
    theirs, state = other.eval().state_dict(), {}
    for name, tensor in theirs.items():
        if "q_proj" in name:
            parts = [theirs[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, tensor = name.replace("attention.q_proj", "attn.qkv"), torch.cat(parts)
        elif re.search(r"[kv]_proj", name):
            continue
        for old, new in HF:
            name = re.sub(old, new, name)
        state[name] = tensor
    net = vivit.vivit_b_joint(400, num_frames=frames, size=size).eval()
    net.load_state_dict(state)
    clip = torch.randn(2, 3, frames, size, size)
    with torch.no_grad():
        logits = other(clip.transpose(1, 2)).logits
        torch.testing.assert_close(net(clip), logits, rtol=0, atol=1e-4)
        assert logits.std() > 0.1
