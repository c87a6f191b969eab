"""Activation checkpointing: less is kept, and nothing comes out otherwise."""

import copy
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from tiny import TINY_RUN
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vidtrain import checkpoint
from vidtrain.layers.blocks import blocks
from vidtrain.models import c3d, fusion, gru_rcn, i3d, movinet, resnet3d, slowfast, x3d
from vidtrain.recompute import recompute
from vidtrain.types import UserError

# A network, and the least factor by which fewer bytes are kept for its backward pass.
NETS = {
    "r3d_18": (lambda: resnet3d.r3d_18(4, width=8, drop_path=0.3), 2),
    "slowfast": (lambda: slowfast.slowfast_r50_4x16(4, width=8, drop_path=0.3), 2),
    "x3d": (lambda: x3d.x3d_xs(4, gamma_d=1, drop_path=0.3), 5),
    "movinet": (lambda: movinet.movinet_a0(4), 8),
    "movinet_stream": (lambda: movinet.movinet_a0_stream(4), 8),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]().train()


def clip(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(seed))


def learn(net: nn.Module, steps: int = 2) -> tuple[dict[str, Tensor], Tensor]:
    """Take steps; give what is learned, and what a generator draws next."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(clip(step)), torch.tensor([0, 3])).backward()
        optimizer.step()
    return net.state_dict(), torch.rand(3)


def kept_bytes(net: nn.Module) -> int:
    """Count the bytes that a forward pass keeps for the backward one, beside the weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in net.state_dict().values()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        net(clip())
    return sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in weights)


@pytest.mark.parametrize("name", NETS)
def test_less_is_kept_and_the_same_is_learned(name):
    plain, net = make(name), make(name)
    assert recompute(net, True) == len([b for b in blocks(net).values() if any(b.children())])
    assert kept_bytes(net) * NETS[name][1] < kept_bytes(plain)
    plain, net = make(name), make(name)
    recompute(net, True)
    expected, draw = learn(plain)
    state, again = learn(net)
    assert list(state) == list(expected) and torch.equal(again, draw)
    for key, tensor in expected.items():  # weights, running statistics, how many batches they saw
        assert torch.equal(state[key], tensor), key
    assert any(key.endswith("num_batches_tracked") for key in state)
    with torch.no_grad():
        assert torch.equal(net.eval()(clip()), plain.eval()(clip()))


def test_a_stream_goes_on_as_it_did():
    net, other = make("movinet_stream").eval(), make("movinet_stream").eval()
    recompute(net, True)
    logits, state = net.stream(clip())
    expected, before = other.stream(clip())
    assert torch.equal(logits, expected)
    assert torch.equal(net.stream(clip(1), state)[0], other.stream(clip(1), before)[0])


class Memory(nn.Module):
    """A block of several tensors in and out, with keywords, whose result goes by what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, state: Tensor | None = None) -> dict[str, Tensor]:
        self.seen += 1
        x = self.dropout(torch.tanh(self.linear(x) * self.seen.clone()))
        return {"x": x, "state": x if state is None else torch.sin(x + state)}


class Custom(nn.Module):
    """A user's network; a block is called several times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Memory() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for block in [*self.blocks, *self.blocks]:
            made = block(x, state=state)
            x, state = made["x"], made["state"]
        return x + state


@pytest.mark.parametrize("parts", [True, "blocks", ["blocks.0", "blocks.1.*", "blocks.1"], "*"])
def test_blocks_with_state_and_several_tensors(parts):
    torch.manual_seed(0)
    plain, x = Custom(), torch.randn(3, 4)
    net = copy.deepcopy(plain)
    assert recompute(net, parts) == recompute(net, parts) == 2
    for one in (plain, net):
        torch.manual_seed(1)
        loss = one(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()  # the second time from the same beginning
    for (key, parameter), other in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(other.grad, parameter.grad), key
    assert net.blocks[0].seen == plain.blocks[0].seen == 2


def test_a_copy_computes_with_its_own_weights():
    """As the average of the weights, and a trial of batch sizes, are copies."""
    net = make("r3d_18")
    recompute(net, True)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert twin(clip()).abs().max() > 0
    twin(clip()).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert twin.layer1[0].conv1[0].weight.grad.any()


@pytest.mark.slow  # tracing takes ten seconds
@pytest.mark.parametrize("name", ["r3d_18", "x3d"])
def test_it_compiles_whole(name):
    torch._dynamo.reset()
    plain, net = make(name), make(name)
    recompute(net, True)
    expected, _ = learn(plain)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    learn(compiled)
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=key)
    torch._dynamo.reset()


def test_parts_by_name():
    with torch.device("meta"):
        net = i3d.i3d(4)
    assert recompute(net, ["Mixed_*", "Mixed_3b.*"]) == 9
    with torch.device("meta"):
        rows = gru_rcn.gru_rcn(4, size=48, backbone="small")
    assert recompute(rows, True) == sum(len(row) for row in rows.units)


@pytest.mark.parametrize(
    ("net", "parts", "message"),
    [
        (lambda: c3d.c3d(4), True, "C3D has no numbered blocks .*; leave it out"),
        (
            lambda: fusion.late_fusion(4, 2, 32, backbone="small"), True,
            r"LateFusion has no numbered blocks .*; name parts of it: checkpointing=\[backbone,mlp\]",
        ),
        (lambda: c3d.c3d(4), ["conv9"], "no part of C3D is called 'conv9'; at the top there are conv1"),
        (lambda: c3d.c3d(4), 3, "checkpointing is 3; it takes true, false or names"),
        (lambda: c3d.c3d(4), [1], "checkpointing is"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(net, parts, message):
    with torch.device("meta"):
        network = net()
    with pytest.raises(UserError, match=message):
        recompute(network, parts)


class Stop(L.Callback):
    """Raise at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("an error of a test")


def weights(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*/*/checkpoints/last.ckpt")
    return checkpoint.load(path)["state_dict"]


def test_a_run_learns_the_same_and_goes_on_exactly(vidtrain, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    words = [
        "train", *TINY_RUN, "model=r3d_18", "model.width=2", "model.drop_path=0.5", f"data.root={tiny_dataset}",
        "trainer.max_epochs=2", "callbacks.ema.decay=0.9", "callbacks.pictures=null",
    ]  # fmt: skip
    words.remove("model=late_fusion_pool")
    words.remove("model.backbone=small")
    on, says = "checkpointing=true", ", 8 parts computed again in the backward pass"
    plain = vidtrain(*words, "paths.runs=plain", "test=true")
    assert plain.code == 0 and says not in plain.out, plain.err
    whole = vidtrain(*words, "paths.runs=whole", "test=true", on)
    assert whole.code == 0 and says in whole.out, whole.err
    stop = ["+callbacks.stop._target_=test_recompute.Stop", "+callbacks.stop.step=8"]
    with pytest.raises(RuntimeError, match="an error of a test"):
        vidtrain(*words, "paths.runs=parts", on, *stop)
    parts = vidtrain(*words, "paths.runs=parts", on, "resume=auto")
    assert parts.code == 0 and "going on with" in parts.out, parts.err
    expected = weights(tmp_path / "plain")
    for folder in ("whole", "parts"):
        state = weights(tmp_path / folder)
        assert list(state) == list(expected)
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), (folder, key)


def test_a_network_without_blocks_is_a_mistake_of_one_line(vidtrain, tiny_dataset):
    done = vidtrain("train", *TINY_RUN, f"data.root={tiny_dataset}", "checkpointing=true")
    assert done.code == 2
    assert done.err.startswith("vidtrain train: checkpointing=true: LateFusionPool has no")
    assert done.err.count("\n") == 1 and not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("trainer", "model"), [("ddp", "r3d_18"), ("fsdp", "r3d_18")])
def test_two_ranks_learn_the_same(tiny_dataset, tmp_path, trainer, model):
    words = [
        f"model={model}", f"trainer={trainer}", "clip.num_frames=4", "clip.size=32", "data=folder",
        f"data.root={tiny_dataset}", "data.workers=0", "data.batch_size=4", "augment=none",
        "trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.benchmark=false", "trainer.precision=32-true", "logger=none",
        "model.drop_path=0.3", "optim=sgd_cosine", "optim.lr=0.01", "callbacks.pictures=null",
    ]  # fmt: skip
    states = []
    for folder, on in (("plain", False), ("again", True)):
        more = ["model.width=4"] if model == "r3d_18" else []
        more += [f"paths.runs={tmp_path / folder}", f"checkpointing={on}"]
        done = subprocess.run(
            [sys.executable, "-m", "vidtrain", "train", *words, *more],
            cwd=tmp_path, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("parts computed again" in done.stdout) == on
        states.append(weights(tmp_path / folder))
    assert list(states[0]) == list(states[1])
    for key, tensor in states[0].items():
        assert torch.equal(states[1][key], tensor), key
