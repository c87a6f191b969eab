"""Two ranks learn what one learns: split batches (DDP), split networks (FSDP2)."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vidtrain import checkpoint
from vidtrain.layers.blocks import blocks
from vidtrain.models.movinet import movinet_a0
from vidtrain.parallel import Sharded, prepare
from vidtrain.types import UserError

LINE = [
    "model=toy_3d_cnn", "clip.num_frames=4", "clip.size=16",
    "data=folder", "data.workers=0", "data.shuffle=true", "augment=none", "trainer.max_epochs=2",
    "logger=csv", "trainer.log_every_n_steps=1", "optim=sgd_cosine", "optim.lr=0.05", "test=true",
    "views.clips=2", "views.crops=1", "trainer.precision=32-true",
]  # fmt: skip


def train(root: Path, folder: Path, *words: str) -> tuple[dict, dict]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "vidtrain", "train", *LINE, f"data.root={root}", *words],
        cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = folder.glob("runs/*/*")
    saved = checkpoint.load(run / "checkpoints" / "last.ckpt")["state_dict"]
    return saved, json.loads((run / "report.json").read_text())


def test_blocks_are_the_rows_of_a_network():
    net = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 1),
            "blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)),
            "head": nn.Linear(4, 2),
        }
    )
    assert blocks(net) == {f"blocks.{n}": block for n, block in enumerate(net["blocks"])}
    net["blocks"] = nn.ModuleList(
        [net["blocks"]]
    )  # a list of stages, each a list that nothing calls
    assert list(blocks(net)) == ["blocks.0.0", "blocks.0.1"]


def test_what_cannot_be_split_is_said():
    trainer = SimpleNamespace(strategy=Sharded(), callbacks=[])
    prepare(SimpleNamespace(model=nn.Linear(2, 2)), trainer)
    with torch.device("meta"):
        task = SimpleNamespace(model=movinet_a0(4))
    with pytest.raises(UserError, match=r"cannot split blocks\.0\.0\.alpha, one number"):
        prepare(task, trainer)


@pytest.mark.slow
def test_two_nodes_end_where_one_does(tiny_dataset, tmp_path):
    """Started by torchrun on each, as README has it; here both are this machine."""
    one, report = train(tiny_dataset, tmp_path / "one", "trainer=cpu", "data.batch_size=8")
    folder = tmp_path / "two"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["trainer=ddp", "trainer.num_nodes=2", "trainer.devices=1", "trainer.accelerator=cpu",
             "trainer.benchmark=false", "data.batch_size=4", f"data.root={tiny_dataset}"]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--master-addr=127.0.0.1", f"--master-port={port}"]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", "-m", "vidtrain", "train", *LINE, *words],
            cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for node in nodes:
        _, said = node.communicate(timeout=600)
        assert node.returncode == 0, said[-3000:]
    (run,) = folder.glob("runs/*/*")
    many = checkpoint.load(run / "checkpoints" / "last.ckpt")["state_dict"]
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    again = json.loads((run / "report.json").read_text())
    assert again["videos"] == report["videos"]
    assert again["metrics"] == pytest.approx(report["metrics"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_ranks_end_where_one_does(tiny_dataset, tmp_path, trainer):
    """24 videos: batches of 8, or 4 on each of two ranks."""
    cpu = ["trainer=cpu", "data.batch_size=8"]
    one, report = train(tiny_dataset, tmp_path / "one", *cpu)
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.benchmark=false"]
    many, again = train(
        tiny_dataset, tmp_path / trainer, f"trainer={trainer}", *two, "data.batch_size=4"
    )
    assert set(one) == set(many)
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert again["videos"] == report["videos"] and again["metrics"] == pytest.approx(
        report["metrics"], abs=1e-3
    )
