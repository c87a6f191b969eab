"""SlowFast: counts, its two pathways and what joins them, and the same logits as others' code."""

import re

import pytest
import torch
from nets import counts, shake_norms
from torch import nn

from vidtrain.models import slowfast
from vidtrain.models.slowfast import NL_R50, SlowFast
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError


def size_of(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def on_meta(name: str, **kwargs) -> SlowFast:
    with torch.device("meta"):
        return getattr(slowfast, name)(400, **kwargs)


@pytest.mark.parametrize(
    ("name", "frames", "params", "at_224", "at_256"),
    [
        ("slowfast_r50_4x16", 32, 34_480_216, 27.6387, 36.0992),
        ("slowfast_r50_8x8", 32, 34_566_488, 50.3086, 65.7089),
        ("slowfast_r101_8x8", 32, 53_774_808, 81.5478, 106.5111),
        ("slowfast_r101_16x8", 64, 53_774_808, 163.0946, 213.0212),
        ("slowfast_r101_16x8_nl", 64, 60_080_088, 177.9692, 233.9592),
    ],
)
def test_parameters_and_multiply_adds(name, frames, params, at_224, at_256):
    net = on_meta(name)
    assert counts(net, frames, 224) == (params, pytest.approx(at_224, abs=1e-3))
    assert counts(net, frames, 256) == (params, pytest.approx(at_256, abs=1e-3))


def test_depth_where_all_blocks_of_res4_span_frames():
    net = on_meta("slowfast_r101_8x8", temporal_blocks=23)
    assert counts(net, 32, 224) == (62_826_968, pytest.approx(96.3966, abs=1e-3))
    with torch.device("meta"):
        part = on_meta("slowfast_r101_8x8")
    for pathway, stem, (res2, res3, res5) in ((part.slow, 1, (1, 1, 3)), (part.fast, 5, (3, 3, 3))):
        assert pathway.stem.conv.kernel_size == (stem, 7, 7)
        spans = {
            name: [block.conv_a.kernel_size[0] for block in getattr(pathway, name)]
            for name in ("res2", "res3", "res4", "res5")
        }
        assert spans == {
            "res2": [res2] * 3, "res3": [res3] * 4, "res4": [3] * 6 + [1] * 17, "res5": [res5] * 3,
        }  # fmt: skip


def test_non_local_blocks():
    plain, attending = on_meta("slowfast_r101_16x8"), on_meta("slowfast_r101_16x8_nl")
    assert size_of(attending) - size_of(plain) == 6_305_280
    blocks = [key for key, _ in attending.named_modules() if re.search(r"after\d+$", key)]
    assert blocks == ["slow.res4.after6", "slow.res4.after13", "slow.res4.after20"]
    wide = {"non_local": "embedded_gaussian", "non_local_pool": (1, 2, 2)}  # PySlowFast's default
    assert counts(on_meta("slowfast_r101_16x8_nl", **wide), 64, 256)[1] == pytest.approx(
        242.0123, abs=1e-3
    )
    with torch.device("meta"):
        r50 = SlowFast(400, 50, 4, 5, non_local="embedded_gaussian", non_local_at=NL_R50)
    assert counts(r50, 32, 224) == (41_838_680, pytest.approx(72.2287, abs=1e-3))


def test_non_local_blocks_begin_as_nothing():
    torch.manual_seed(0)
    net = slowfast.slowfast_r101_16x8_nl(5, width=8)
    plain = slowfast.slowfast_r101_16x8(5, width=8)
    missing = plain.load_state_dict(net.state_dict(), strict=False)
    assert not missing.missing_keys and missing.unexpected_keys
    clip = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        assert torch.equal(net.eval()(clip), plain.eval()(clip))
        shake_norms(net, last="norm_c")
        plain.load_state_dict(net.state_dict(), strict=False)
        assert not torch.allclose(net(clip), plain(clip), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "lateral_params"), [("slowfast_r50_4x16", 216_608), ("slowfast_r50_8x8", 302_880)]
)
def test_pathways_and_laterals(name, lateral_params):
    net = on_meta(name)
    assert size_of(net.fast) == 514_152
    assert size_of(net.lateral) == lateral_params
    widths = [getattr(net.slow, f"res{stage}")[0].conv_a.in_channels for stage in (2, 3, 4, 5)]
    assert widths == [64 + 16, 256 + 64, 512 + 128, 1024 + 256]
    assert net.head.proj.in_features == net.num_features == 2304


@pytest.mark.parametrize(
    ("name", "slow", "fast"),
    [("slowfast_r50_4x16", 4, 32), ("slowfast_r50_8x8", 8, 32), ("slowfast_r101_16x8", 16, 64)],
)
def test_sizes_of_every_stage(name, slow, fast):
    net = on_meta(name)
    layers = {layer.name: layer.output for layer in layer_table(net, (3, fast, 224, 224))}
    last = {2: 2, 3: 3, 4: 22 if "101" in name else 5, 5: 2}
    for pathway, frames, width in (("slow", slow, 64), ("fast", fast, 8)):
        assert layers[f"{pathway}.stem.pool"] == [width, frames, 56, 56]
        for stage, block in last.items():  # time is never reduced
            size = [width << stage, frames, *[224 >> stage] * 2]
            assert layers[f"{pathway}.res{stage}.{block}.norm_c"] == size
    for number, (dim, side) in enumerate([(16, 56), (64, 56), (128, 28), (256, 14)]):
        assert layers[f"lateral.{number}.norm"] == [dim, slow, side, side]


@pytest.mark.parametrize("frames", [8, 16, 24, 40, 64])
@pytest.mark.parametrize(("alpha", "kernel"), [(8, 5), (4, 7), (4, 5), (8, 7)])
def test_laterals_come_to_as_many_frames_as_the_slow_pathway_has(alpha, kernel, frames):
    with torch.device("meta"):
        net = SlowFast(5, 50, alpha, kernel, width=16).eval()
        slow, fast = net.pathways(torch.empty(1, 3, frames, 32, 32))
        assert slow.shape[2] == frames // alpha and fast.shape[2] == frames
        joined = [
            lateral(torch.empty(1, lateral.conv.in_channels, frames, 2, 2))
            for lateral in net.lateral
        ]
        assert {x.shape[2] for x in joined} == {frames // alpha}


def picked(net: SlowFast, frames: int) -> list[int]:
    return net.pick_slow(torch.arange(frames).view(1, 1, -1, 1, 1)).flatten().tolist()


def test_frames_of_the_slow_pathway():
    four, eight = on_meta("slowfast_r50_8x8", width=16), on_meta("slowfast_r50_4x16", width=16)
    assert picked(four, 32) == [0, 4, 8, 13, 17, 22, 26, 31]
    assert picked(eight, 32) == [0, 10, 20, 31]
    assert picked(four, 64) == [0, 4, 8, 12, 16, 21, 25, 29, 33, 37, 42, 46, 50, 54, 58, 63]
    assert picked(four, 4) == [0]
    for net in (four, eight):
        for frames in range(net.alpha, 160, net.alpha):
            spread = torch.linspace(0, frames - 1, frames // net.alpha).long().tolist()
            assert picked(net, frames) == spread, (net.alpha, frames)
    strided = on_meta("slowfast_r50_8x8", width=16, slow_frames="stride")
    assert picked(strided, 32) == list(range(0, 32, 4))


def test_both_pathways_are_live():
    net = shake_norms(slowfast.slowfast_r50_8x8(5, width=16), last="norm_c")
    clip = torch.randn(1, 3, 16, 32, 32)
    slow_frames = net.pick_slow(torch.arange(16).view(1, 1, -1, 1, 1)).flatten().tolist()
    seen = {}
    for name, module in (("slow", net.slow.stem), ("fast", net.fast.stem)):
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        logits = net(clip)
        assert torch.equal(seen["slow"], clip[:, :, slow_frames])
        assert torch.equal(seen["fast"], clip)
        before = seen["slow"]
        for frame in set(range(16)) - set(slow_frames):
            other = clip.clone()
            other[:, :, frame] += 1
            assert not torch.allclose(net(other), logits, atol=1e-4), frame
            assert torch.equal(seen["slow"], before)
        for lateral in net.lateral:  # without them the two meet in the classifier alone
            lateral.norm.weight.zero_()
            lateral.norm.bias.zero_()
        assert not torch.allclose(net(clip), logits, atol=1e-4)


def test_map_of_both_pathways():
    net = shake_norms(slowfast.slowfast_r50_4x16(5, width=16), last="norm_c")
    clip = torch.randn(2, 3, 16, 64, 96)
    with torch.no_grad():
        features, (slow, fast) = net.forward_features(clip), net.pathways(clip)
        assert features.shape == (2, 576, 2, 2, 3) and net.num_features == 576
        assert torch.equal(features[:, :512], slow)
        torch.testing.assert_close(features[:, 512:, 1], fast[:, :, 8:].mean(2))
        net.reset_classifier(0)
        torch.testing.assert_close(net(clip), features.mean((2, 3, 4)))


@pytest.mark.parametrize(("frames", "size"), [(4, 32), (16, 33), (32, 48)])
def test_any_clip(frames, size):
    net = shake_norms(slowfast.slowfast_r50_8x8(5, width=16, non_local="gaussian"), last="norm_c")
    with torch.no_grad():
        logits = net(torch.randn(1, 3, frames, size, size))
    assert logits.shape == (1, 5) and logits.isfinite().all()


def test_blocks_that_start_as_their_shortcut():
    net = slowfast.slowfast_r50_8x8(5, width=16)
    closed = [key for key, p in net.named_parameters() if key.endswith("weight") and not p.any()]
    assert len(closed) == 2 * 16 and all(key.endswith("norm_c.weight") for key in closed)
    net = slowfast.slowfast_r50_8x8(5, width=16, zero_init=False)
    assert all(p.any() for key, p in net.named_parameters() if key.endswith("weight"))


def test_bad_arguments_are_named():
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"clip of 30; make clip\.num_frames a multiple of 4"):
            slowfast.slowfast_r50_8x8(5)(torch.empty(1, 3, 30, 64, 64))
        with pytest.raises(UserError, match=r"model\.temporal_blocks is 24; res4 has 23 blocks"):
            slowfast.slowfast_r101_8x8(5, temporal_blocks=24)
        with pytest.raises(UserError, match=r"model\.width is 20"):
            slowfast.slowfast_r50_8x8(5, width=20)
        with pytest.raises(UserError, match=r"model\.slow_frames is 'first'"):
            slowfast.slowfast_r50_8x8(5, slow_frames="first")


def from_pytorchvideo(key: str) -> str:
    """Name in our network of one of PyTorchVideo's tensors."""
    key = re.sub(r"^blocks\.6\.", "head.", key)
    key = re.sub(r"^blocks\.(\d)\.multipathway_fusion\.", r"lateral.\1.", key)
    key = key.replace("conv_fast_to_slow", "conv")
    key = re.sub(r"^blocks\.(\d)\.multipathway_blocks\.(\d)\.", r"\2.res\1.", key)
    key = re.sub(r"^0\.", "slow.", re.sub(r"^1\.", "fast.", key)).replace("res0.", "stem.")
    key = re.sub(r"res(\d)\.res_blocks\.", lambda m: f"res{int(m[1]) + 1}.", key)
    return key.replace("branch1_", "shortcut_").replace("branch2.", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "theirs", "alpha"),
    [
        ("slowfast_r50_8x8", {}, "slowfast_r50", 4),
        ("slowfast_r50_4x16", {}, None, 8),
        ("slowfast_r101_8x8", {"temporal_blocks": 23}, "slowfast_r101", 4),
        ("slowfast_r101_16x8", {}, "slowfast_16x8_r101_50_50", 4),
    ],
)
def test_same_logits_as_pytorchvideo(name, kwargs, theirs, alpha):
    hub = pytest.importorskip("pytorchvideo.models.hub")
    slow, fast = (16, 64) if "16x8" in name else (32 // alpha, 32)
    if theirs:
        other = getattr(hub, theirs)(pretrained=False)
    else:
        models = pytest.importorskip("pytorchvideo.models.slowfast")
        other = models.create_slowfast(
            slowfast_channel_reduction_ratio=(8,),
            slowfast_fusion_conv_kernel_size=(5, 1, 1),
            slowfast_fusion_conv_stride=(8, 1, 1),
            head_pool_kernel_sizes=((slow, 7, 7), (fast, 7, 7)),
        )
    shake_norms(other, last="norm_c")
    # The window of training, at a size that a CPU can bear: 64 pixels are 2 x 2 at the end.
    other.blocks[5].pool = nn.ModuleList(
        nn.AvgPool3d((frames, 2, 2), stride=1) for frames in (slow, fast)
    )
    net = getattr(slowfast, name)(400, **kwargs).eval()
    net.load_state_dict({from_pytorchvideo(key): t for key, t in other.state_dict().items()})
    clip = torch.randn(1, 3, fast, 64, 64)
    with torch.no_grad():
        logits = other([net.pick_slow(clip), clip])
        torch.testing.assert_close(net(clip), logits, rtol=0, atol=1e-4)
        assert logits.std() > 0.1
