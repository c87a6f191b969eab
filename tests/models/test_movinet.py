"""MoViNet against its tables, frame by frame against the whole clip, and against the authors' code."""

import os
import re

import pytest
import torch
from nets import counts, shake_norms
from torch import nn

from vidtrain.layers.same import same_padding
from vidtrain.models import movinet
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError

COUNTS = {  # frames, size; parameters and multiply-adds of 600 classes: base, stream, stream in 3D
    "a0": ((50, 172), (3_111_799, 2.6307), (3_748_031, 2.4264), (3_783_983, 2.6810)),
    "a1": ((50, 172), (4_690_296, 5.8656), (6_447_352, 5.5403), (6_504_408, 5.9992)),
    "a2": ((50, 224), (5_249_562, 11.5581), (7_326_962, 10.7005), (7_392_554, 11.7189)),
    "a3": ((120, 256), (7_397_545, 55.5932), (10_986_585, 52.1336), (11_073_705, 56.2563)),
    "a4": ((80, 290), (11_349_463, 103.3388), (18_136_135, 96.7411), (18_279_335, 104.1651)),
    "a5": ((120, 320), (18_650_523, 276.3341), (31_495_875, 261.7100), (31_704_675, 278.6658)),
}
BLOCKS = {"a0": 15, "a1": 24, "a2": 26, "a3": 33, "a4": 47, "a5": 59}


def meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return getattr(movinet, f"movinet_{name}")(600, **kwargs).eval()


def shake(net: nn.Module, gates: float = 0.5) -> nn.Module:
    """Give norms statistics and scales that hide nothing, and open the gates."""
    for module in net.modules():
        if isinstance(getattr(module, "alpha", None), nn.Parameter):
            nn.init.uniform_(module.alpha, gates / 2, gates)
    return shake_norms(net)


def make(name: str, num_classes: int = 7, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return shake(getattr(movinet, f"movinet_{name}")(num_classes, **kwargs))


def run_stream(net: nn.Module, clip: torch.Tensor, pieces: list[int]) -> list[torch.Tensor]:
    """Stream a clip in pieces of so many frames; the logits after each."""
    state, answers = None, []
    for frames in clip.split(pieces, 2):
        logits, state = net.stream(frames, state)
        answers.append(logits)
    return answers


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds(name):
    clip, base, stream, _ = COUNTS[name]
    for net, (params, gmacs) in ((meta(name), base), (meta(f"{name}_stream"), stream)):
        assert counts(net, *clip) == (params, pytest.approx(gmacs, abs=1e-4))


@pytest.mark.parametrize("name", ["a0", pytest.param("a5", marks=pytest.mark.slow)])
def test_time_and_space_in_one_convolution(name):
    clip, _, _, (params, gmacs) = COUNTS[name]
    assert counts(meta(f"{name}_stream", conv="3d"), *clip) == (
        params,
        pytest.approx(gmacs, abs=1e-4),
    )


@pytest.mark.parametrize(("name", "size", "gmacs"), [("a0", 172, 0.0507), ("a2", 224, 0.2165)])
def test_multiply_adds_of_one_frame(name, size, gmacs):
    assert counts(meta(f"{name}_stream"), 1, size)[1] == pytest.approx(gmacs, abs=5e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_position_is_a_gate_a_block(name):
    net = meta(f"{name}_stream", positional_encoding=True)
    params = COUNTS[name][2][0]
    assert sum(p.numel() for p in net.parameters()) == params + BLOCKS[name]


def test_what_the_files_say_is_the_counted_clip(compose):
    for name, ((frames, size), *_) in COUNTS.items():
        for variant in (f"movinet_{name}", f"movinet_{name}_stream"):
            cfg = compose("train", f"model={variant}", "data=ucf101")
            assert (cfg.clip.num_frames, cfg.clip.size) == (frames, size)
            assert list(cfg.clip.mean) == [0, 0, 0] and list(cfg.clip.std) == [1, 1, 1]


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 2, 2], [9]], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"conv": "3d"}, {"positional_encoding": True}],
    ids=["2plus1d", "3d", "positions"],
)
def test_stream_is_the_whole_clip(kwargs, pieces):
    net = make("a0_stream", **kwargs)
    clip, other = torch.rand(2, 2, 3, 9, 35, 44)
    with torch.no_grad():
        for video in (clip, other, clip):  # nothing is left of one in the next
            answers = run_stream(net, video, pieces)
            whole = net(video)
            assert whole.std(0).max() > 0.01
            torch.testing.assert_close(answers[-1], whole, rtol=1e-5, atol=1e-5)
            first = net(video[:, :, : pieces[0]])  # what is said on the way is of all frames so far
            torch.testing.assert_close(answers[0], first, rtol=1e-5, atol=1e-5)
        assert (net(clip) - net(other)).abs().max() > 0.01
        assert (net(clip) - net(clip.flip(2))).abs().max() > 0.01


def test_stream_leaves_the_state_it_was_given():
    net = make("a0_stream")
    clip = torch.rand(1, 3, 5, 32, 32)
    with torch.no_grad():
        _, state = net.stream(clip[:, :, :3])
        kept = {key: tensor.clone() for key, tensor in state.items()}
        once, _ = net.stream(clip[:, :, 3:], state)
        twice, _ = net.stream(clip[:, :, 3:], state)
    assert torch.equal(once, twice)
    assert all(torch.equal(state[key], kept[key]) for key in kept)


@pytest.mark.parametrize("conv", ["2plus1d", "3d"])
def test_what_a_stream_keeps(conv):
    net = make("a0_stream", conv=conv)
    _, state = net.stream(torch.rand(2, 3, 4, 43, 60))
    initial = net.initial_state(torch.rand(2, 3, 1, 43, 60))
    assert {k: v.shape for k, v in initial.items()} == {k: v.shape for k, v in state.items()}
    assert all(not tensor.any() for tensor in initial.values())
    assert state["seen"] == 4 and state["total"].shape == (2, 480)
    size = (22, 30)
    for s, stage in enumerate(movinet.A0.blocks()):
        for n, (_, dim, extent, _, stride) in enumerate(stage):
            after = tuple(-(-side // stride) for side in size)
            assert state[f"{s}.{n}.total"].shape == (2, dim, 1, 1, 1)
            if extent == 1:
                assert f"{s}.{n}.past" not in state
            else:  # of the inner channels; in space before the stride only if time is not split
                held = size if conv == "3d" else after
                assert state[f"{s}.{n}.past"].shape == (2, dim, extent - 1, *held)
            size = after
    extents = [extent for stage in movinet.A0.blocks() for _, _, extent, _, _ in stage]
    assert sorted(set(extents)) == [1, 3, 5]


@pytest.mark.parametrize(
    ("name", "kwargs", "causal"),
    [
        ("a0_stream", {}, True),
        ("a0_stream", {"conv": "3d"}, True),
        ("a0_stream", {"positional_encoding": True}, True),
        ("a0", {}, False),
    ],
)
def test_only_streams_are_causal(name, kwargs, causal):
    net = make(name, **kwargs)
    clip = torch.rand(1, 3, 9, 32, 32)
    later = clip.clone()
    later[:, :, 5:] = torch.rand(1, 3, 4, 32, 32)
    with torch.no_grad():
        change = (net.forward_features(clip) - net.forward_features(later)).abs()
    change = change.amax((0, 1, 3, 4))
    assert change[5:].min() > 0.01
    assert (change[:5].max() == 0) if causal else (change[:5].min() > 1e-4)


def test_reach_of_one_depthwise_convolution():
    for net in (make("a0_stream"), make("a0_stream", conv="3d")):
        conv = net.blocks[2][0].depthwise  # 5 frames
        dim = conv.conv.in_channels
        clip = torch.rand(1, dim, 9, 8, 8)
        other = clip.clone()
        other[:, :, 3] += 1
        changed = (conv(clip) - conv(other)).abs().amax((0, 1, 3, 4)) > 1e-4
        assert changed.tolist() == [False] * 3 + [True] * 5 + [False]


def test_blocks_start_as_the_identity():
    torch.manual_seed(0)
    for name in ("a0", "a0_stream"):
        net = getattr(movinet, f"movinet_{name}")(7).eval()
        same = [b for stage in net.blocks for b in stage if isinstance(b.skip, nn.Identity)]
        assert len(same) == 11  # of 15; 5 stages, of which the fourth keeps size and width
        for block in same:
            x = torch.randn(1, block.expand.conv.in_channels, 3, 5, 5)
            assert torch.equal(block(x), x)
            block.alpha.data.fill_(0.5)
            assert not torch.allclose(block(x), x, atol=1e-3)


def test_squeeze_and_excitation_goes_by_the_mean_so_far():
    torch.manual_seed(0)
    se = make("a0_stream").blocks[1][0].se
    dim = se.expand.out_channels
    seen = []
    se.reduce.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, dim, 7, 3, 4)
    se(x)
    frames = x.mean((3, 4))
    for t in range(7):
        so_far, frame = seen[0][:, :, t, 0, 0].chunk(2, 1)
        torch.testing.assert_close(so_far, frames[:, :, : t + 1].mean(2))
        torch.testing.assert_close(frame, frames[:, :, t])


def test_positions_are_sines_and_cosines_of_the_frames_number():
    net = make("a3_stream", positional_encoding=True)
    se = net.blocks[0][0].se
    positions = se._positions(torch.tensor([0, 7]).view(-1, 1, 1))
    dim = se.expand.out_channels
    assert positions.shape == (2 * dim, 2, 1, 1)
    assert positions[:, 0, 0, 0].tolist() == [0.0] * dim + [1.0] * dim
    expected = torch.tensor([7 / 10_000 ** (2 * j / (2 * dim)) for j in range(dim)])
    torch.testing.assert_close(positions[:, 1, 0, 0], torch.cat([expected.sin(), expected.cos()]))


def test_hard_sigmoid_is_the_steep_one():
    x = torch.tensor([-9.0, -2.5, -1.0, 0.0, 1.0, 2.5, 9.0])
    expected = torch.tensor([0.0, 0.0, 0.3, 0.5, 0.7, 1.0, 1.0])
    torch.testing.assert_close(movinet._hard_sigmoid(x), expected)
    assert not torch.allclose(nn.functional.hardsigmoid(x), expected, atol=0.01)


@pytest.mark.parametrize(("size", "halved"), [(43, 22), (145, 73), (172, 86), (2, 1), (1, 1)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_same_padding_at_any_size(size, halved, kernel):
    conv = movinet.SameConv(1, 1, (1, kernel, kernel), (1, 2, 2), bias=False)
    nn.init.ones_(conv.weight)
    x = torch.rand(1, 1, 2, size, size)
    out = conv(x)
    assert out.shape == (1, 1, 2, halved, halved)
    (before, behind), _ = same_padding((size, size), (kernel, kernel), (2, 2))
    padded = nn.functional.pad(x, (before, behind, before, behind))
    corner = padded[..., :kernel, :kernel].sum((3, 4))
    torch.testing.assert_close(out[..., 0, 0], corner)


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (6, 9), (1, 2)])
def test_average_pool_counts_no_padding(size):
    skip = movinet.Skip(3, 3, 2).eval()
    nn.init.zeros_(skip.conv.weight)
    skip.conv.weight.data.flatten(1).fill_diagonal_(1)
    x = torch.rand(2, 3, 2, *size)
    out = skip(x) * (1 + 1e-3) ** 0.5  # the norm's eps
    pads = [before for before, _ in same_padding(size, (3, 3), (2, 2))]
    assert out.shape == (2, 3, 2, *(-(-side // 2) for side in size))
    for i in range(out.shape[3]):
        for j in range(out.shape[4]):
            top, left = 2 * i - pads[0], 2 * j - pads[1]
            window = x[..., max(top, 0) : top + 3, max(left, 0) : left + 3]
            torch.testing.assert_close(out[..., i, j], window.mean((3, 4)))


def test_sizes_of_a0():
    outputs = {layer.name: layer.output for layer in layer_table(meta("a0"), (3, 50, 172, 172))}
    assert outputs["stem.norm"] == [8, 50, 86, 86]
    for stage, last, dim, side in ((0, 0, 8, 43), (1, 2, 32, 22), (2, 2, 56, 11), (4, 3, 104, 6)):
        assert outputs[f"blocks.{stage}.{last}.project.norm"] == [dim, 50, side, side]
    assert outputs["project.norm"] == [480, 50, 6, 6]


def test_dropped_paths_grow_with_depth():
    net = meta("a0", drop_path=0.3)
    rates = [block.drop_path.p for stage in net.blocks for block in stage]
    assert rates == pytest.approx([0.3 * (i + 1) / 15 for i in range(15)])
    assert meta("a0").dropout.p == 0.2 and meta("a1").dropout.p == 0.5


def test_bf16_stream():
    net = make("a0_stream").to(torch.bfloat16)
    clip = torch.rand(1, 3, 6, 32, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        answers = run_stream(net, clip, [2, 3, 1])
        state = net.initial_state(clip)
    assert answers[-1].dtype == torch.bfloat16
    assert state["total"].dtype == torch.float32  # so that a long video's sums do not stand still
    whole = net(clip)
    torch.testing.assert_close(answers[-1], whole, rtol=0.1, atol=0.1)


def test_bad_use_is_named():
    with pytest.raises(UserError, match=r"model\.conv is '2d'"):
        meta("a0_stream", conv="2d")
    with pytest.raises(UserError, match="sees later frames"):
        meta("a0").stream(torch.empty(1, 3, 2, 32, 32, device="meta"))
    net = meta("a0_stream")
    _, state = net.stream(torch.empty(1, 3, 2, 32, 32, device="meta"))
    for other in ((2, 3, 2, 32, 32), (1, 3, 2, 64, 32)):
        with pytest.raises(UserError, match="begin a new video with state=None"):
            net.stream(torch.empty(other, device="meta"), state)


class OneStep(nn.Module):
    """A step of a stream, as what is exported takes it: tensors in, tensors out."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, frames: torch.Tensor, state: dict[str, torch.Tensor]):
        return self.net.stream(frames, state)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["export", "compile"])
def test_a_step_of_a_stream_can_be_exported_and_compiled(how):
    net = make("a0_stream", positional_encoding=True)
    clip = torch.rand(1, 3, 5, 36, 32)
    with torch.no_grad():
        state = net.initial_state(clip)
        if how == "export":
            step = torch.export.export(OneStep(net), (clip[:, :, :1], state)).module()
        else:
            step = torch.compile(OneStep(net), backend="aot_eager", fullgraph=True)
        for frame in clip.split(1, 2):
            logits, state = step(frame, state)
        torch.testing.assert_close(logits, net(clip), rtol=0, atol=1e-5)


# Against the authors' code: pip install tensorflow-cpu tf-keras gin-config, and, without what they ask for,
# tf-models-official, tensorflow-datasets and what its import then misses.

NAMES = {
    r"^stem/stem/": "stem.",
    r"^block(\d)_layer(\d+)/bneck/": r"blocks.\1.\2.",
    r"^block(\d)_layer(\d+)/scale$": r"blocks.\1.\2.alpha",
    r"^head/project/": "project.",
    r"^classifier_head(_\d+)?/head/": "fc1.",
    r"^classifier_head(_\d+)?/classifier/": "fc2.",
    r"expansion/": "expand.",
    r"feature/": "depthwise.",
    r"projection/": "project.",
    r"se/se_": "se.",
    r"(reduce|skip_project|se\.expand)/": r"\1.",
    r"skip/skip_project\.": "skip.",
    r"conv2d_temporal/bn_temporal/": "norm_t.",
    r"conv2d_temporal/depthwise_conv2d(_\d+)?/depthwise_kernel$": "conv_t.weight",
    r"(conv2d/)?bn/": "norm.",
    r"(conv2d/)?(depthwise_)?conv[23]d(_\d+)?/(depthwise_)?kernel$": "conv.weight",
    r"(conv2d/)?conv[23]d(_\d+)?/bias$": "conv.bias",
    r"gamma$": "weight",
    r"beta$": "bias",
    r"moving_mean$": "running_mean",
    r"moving_variance$": "running_var",
    r"^(fc\d|.*se\.\w+)\.conv\.": r"\1.",
}


def from_tensorflow(name: str) -> str:
    """Name one of TensorFlow's variables as ours is named."""
    for theirs, ours in NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def to_tensorflow(tensor: torch.Tensor, shape: tuple[int, ...], name: str):
    """Turn one of our tensors into TensorFlow's order of axes."""
    array = tensor.numpy()
    if tensor.ndim == 2:
        return array.T.reshape(shape)
    if tensor.ndim == 5:
        array = array.transpose(2, 3, 4, 1, 0)  # t h w C D
        if "depthwise_kernel" in name:
            array = array.swapaxes(3, 4)
    return array.reshape(shape)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", ["a0", "a0_stream", "a3_stream"])
def test_same_logits_as_the_authors(name, monkeypatch):
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    tf = pytest.importorskip("tensorflow")
    theirs = pytest.importorskip("official.projects.movinet.modeling.movinet")
    classifier = pytest.importorskip("official.projects.movinet.modeling.movinet_model")
    member, stream = name[:2], name.endswith("stream")
    positional = name == "a3_stream"
    backbone = theirs.Movinet(
        model_id=member,
        causal=stream,
        conv_type="2plus1d" if stream else "3d",
        se_type="2plus3d" if stream else "3d",
        activation="hard_swish" if stream else "swish",
        # Not their repository's own hard sigmoid, x / 6 + 0.5, but that of the released weights.
        gating_activation=(lambda x: tf.clip_by_value(0.2 * x + 0.5, 0.0, 1.0))
        if stream
        else "sigmoid",
        use_positional_encoding=positional,
        use_sync_bn=False,
    )
    model = classifier.MovinetClassifier(backbone, num_classes=7)
    net = make(name, **({"positional_encoding": True} if positional else {}))
    state = net.state_dict()
    gates = [f"blocks.{s}.{n}.se.alpha" for s, b in enumerate(net.blocks) for n in range(len(b))]
    used = set()
    for variable in model.weights:
        full = variable.name.removesuffix(":0")
        key = gates.pop(0) if full == "scale" else from_tensorflow(full)
        variable.assign(to_tensorflow(state[key], tuple(variable.shape), full))
        used.add(key)
    assert {key for key in state if not key.endswith("num_batches_tracked")} == used
    run = tf.function(lambda x: model(x, training=False), jit_compile=not stream)
    for size in ((36, 44), (47, 33)):  # padded on one side, on both
        clip = torch.rand(2, 3, 6, *size)
        expected = torch.from_numpy(run(clip.permute(0, 2, 3, 4, 1).numpy()).numpy())
        assert expected.std() > 0.1
        with torch.no_grad():
            torch.testing.assert_close(net(clip), expected, rtol=0, atol=1e-4)
