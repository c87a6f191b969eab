"""`freeze=backbone` with a linear and an attentive probe: what learns, what is kept, and that a run goes on."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from vidtrain import build
from vidtrain.callbacks import checkpoint
from vidtrain.layers.head import head_names, row_names
from vidtrain.types import UserError

NARROW = [
    "clip.num_frames=4", "clip.stride=2", "clip.size=32", "+model.dim=24", "+model.depth=2",
    "+model.heads=3", "+model.patch=8",
]  # fmt: skip
RUN = [
    *NARROW, "data=folder", "data.batch_size=4", "data.workers=0", "trainer=cpu", "logger=none",
    "callbacks.pictures=null", "optim.lr=0.01", "augment=none",
]  # fmt: skip
HEADS = {
    None: {"head.weight", "head.bias"},
    "linear": {"head.linear.weight", "head.linear.bias"},
    "attentive": {
        "head.query", "head.kv.weight", "head.kv.bias", "head.proj.weight", "head.proj.bias",
        "head.norm.weight", "head.norm.bias", "head.mlp.fc1.weight", "head.mlp.fc1.bias",
        "head.mlp.fc2.weight", "head.mlp.fc2.bias", "head.linear.weight", "head.linear.bias",
    },
}  # fmt: skip
NORM = {"fc_norm.weight", "fc_norm.bias"}


@pytest.fixture
def task(compose):
    """Build a task around a narrow VideoMAE: `task("linear", "freeze=backbone")`."""

    def make(probe, *overrides):
        words = ["model=videomae_small", *NARROW, f"model.probe={probe or 'null'}"]
        cfg = compose("train", "data=ucf101", "data.num_classes=3", *words, *overrides)
        torch.manual_seed(0)
        return build.task(cfg, build.model(cfg))

    return make


def batch():
    torch.manual_seed(1)
    clips = torch.randn(4, 1, 3, 4, 32, 32)
    return {"video": clips, "label": torch.tensor([0, 2, 1, 0]), "index": torch.arange(4)}


@pytest.mark.parametrize("probe", [None, "linear", "attentive"])
def test_only_the_probe_learns(task, probe):
    module = task(
        probe, "freeze=backbone", "optim.schedule=constant", "optim.layer_decay=0.5",
        "model.drop_path=0.5", "optim.warmup=0",
    )  # fmt: skip
    assert module.frozen == ("patch_embed", "blocks")
    learns = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert learns == HEADS[probe] | NORM
    optimizer = module.optimizer(module.model, 10)["optimizer"]
    assert {group["lr"] for group in optimizer.param_groups} == {0.001}  # the last layer's
    module.train()
    assert module.model.head.training and not any(m.training for m in module.model.blocks.modules())
    features = [module.model.forward_features(batch()["video"][:, 0]) for _ in range(2)]
    assert torch.equal(*features)  # nothing is dropped
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    for _ in range(2):  # the first step moves what lies behind zeros
        optimizer.zero_grad()
        module.step(batch()).loss.backward()
        optimizer.step()
    moved = {n for n, t in module.model.state_dict().items() if not torch.equal(t, before[n])}
    statistics = {
        "head.norm.running_mean",
        "head.norm.running_var",
        "head.norm.num_batches_tracked",
    }
    assert moved == learns | (statistics if probe == "linear" else set())


@pytest.mark.parametrize("probe", [None, "attentive"])
def test_no_activation_of_a_frozen_part_is_kept(task, probe):
    """Autograd keeps nothing before the norm in front of the probe, and takes no gradient there."""
    kept = {}
    for frozen in (True, False):
        module = task(probe, f"freeze={'backbone' if frozen else 'null'}")
        own = {p.data_ptr() for p in module.model.parameters()}
        sizes = []

        def pack(tensor, own=own, sizes=sizes):
            if tensor.data_ptr() not in own:
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.train().step(batch()).loss
        kept[frozen] = sum(sizes)
        features = module.model.forward_features(batch()["video"][:, 0])
        assert features.requires_grad is not frozen
        loss.backward()
        grads = {name for name, p in module.model.named_parameters() if p.grad is not None}
        assert (grads == HEADS[probe] | NORM) == frozen
    tokens = 4 * 32 * 24 * 4  # bytes: 4 clips of 32 tokens of 24 numbers
    assert kept[True] < (6 * tokens if probe else tokens)
    assert kept[False] > kept[True] + 20 * tokens


@pytest.mark.parametrize("name", ["c3d", "r3d_18", "x3d_xs", "timesformer_base", "mvit_v2_s_16x4"])
def test_the_backbone_is_all_but_the_classifier(compose, name):
    with torch.device("meta"):
        cfg = compose("train", f"model={name}", "data=ucf101", "freeze=backbone")
        net = build.model(cfg)
        module = build.task(cfg, net)
    learns = {key for key, p in net.named_parameters() if p.requires_grad}
    assert learns and learns == head_names(net) & set(dict(net.named_parameters()))
    still = {m for part in module.frozen for m in net.get_submodule(part).modules()}
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert all(norm in still for norm in norms)


@pytest.mark.parametrize(
    ("name", "words", "learns"),
    [
        ("cnn_lstm", ["model.backbone=small"], ("lstm.", "classifier.")),
        ("late_fusion", ["model.backbone=small"], ("mlp.", "classifier.")),
        ("single_frame", ["model.backbone=small"], ("backbone.head.",)),
    ],
)
def test_a_part_called_backbone_is_that_part(compose, name, words, learns):
    cfg = compose(
        "train", f"model={name}", *words, "data=ucf101", "freeze=backbone", "clip.size=48"
    )
    net = build.model(cfg)
    build.task(cfg, net)
    found = {key for key, p in net.named_parameters() if p.requires_grad}
    head = head_names(net)
    assert head & set(dict(net.named_parameters())) <= found
    assert found == {
        key for key, _ in net.named_parameters() if key in head or not key.startswith("backbone.")
    }


def test_there_is_no_backbone_without_one(compose):
    cfg = compose("train", "model=cnn_lstm", "model.features=16", "data=ucf101", "freeze=backbone")
    with pytest.raises(UserError, match="freeze: no part of CNNLSTM is called 'backbone'"):
        build.task(cfg, build.model(cfg))


def test_rows_of_a_probe(task):
    assert row_names(task("attentive").model) == {"head.linear.weight", "head.linear.bias"}
    assert row_names(task(None).model) == HEADS[None]


def only(folder: Path) -> dict:
    (path,) = folder.glob("*/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("probe", [pytest.param("linear", marks=pytest.mark.slow), "attentive"])
def test_a_probe_on_a_run_and_that_it_goes_on(vidtrain, tiny_dataset, tmp_path, monkeypatch, probe):
    """Pretrained, then probed: its tensors stay; stopped and resumed, the probe is the same to the bit."""
    data = f"data.root={tiny_dataset}"
    decoder = ["+model.decoder_dim=24", "+model.decoder_depth=1", "+model.decoder_heads=3"]
    one = ["trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    masked = ["model=videomae_small_pretrain", *decoder, *one]
    made = vidtrain("train", *masked, *RUN, data, "paths.runs=pretrained")
    assert made.code == 0, made.err
    (run,) = (tmp_path / "pretrained").glob("*/*")
    line = [
        "train", "model=videomae_small", *RUN, data, f"model.probe={probe}", "freeze=backbone",
        "trainer.max_epochs=2", "optim.layer_decay=0.75",
    ]  # fmt: skip
    whole = vidtrain(*line, f"ckpt={run}", "paths.runs=whole")
    assert whole.code == 0, whole.err
    assert "frozen: patch_embed, blocks: " in whole.out.replace("\n", " ")

    check = checkpoint.Checkpoint._stop_if_asked

    def stop(self, trainer):
        if trainer.global_step == 8 and trainer.training:  # inside the second epoch
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        check(self, trainer)

    monkeypatch.setattr(checkpoint.Checkpoint, "_stop_if_asked", stop)
    assert vidtrain(*line, f"ckpt={run}", "paths.runs=parts").code == 130
    monkeypatch.setattr(checkpoint.Checkpoint, "_stop_if_asked", check)
    again = vidtrain(*line, f"ckpt={run}", "paths.runs=parts", "resume=auto")
    assert again.code == 0, again.err
    ours, theirs = only(tmp_path / "whole"), only(tmp_path / "parts")
    assert ours["global_step"] == theirs["global_step"] == 12
    assert all(torch.equal(t, theirs["state_dict"][n]) for n, t in ours["state_dict"].items())

    before = only(tmp_path / "pretrained")["state_dict"]
    after = ours["state_dict"]
    kept = [name for name in after if name.startswith(("model.patch_embed.", "model.blocks."))]
    assert len(kept) > 20
    for name in kept:
        assert torch.equal(after[name], before[name.replace("model.", "model.encoder.", 1)]), name
    tested = vidtrain("test", f"ckpt={next((tmp_path / 'whole').glob('*/*'))}")
    assert tested.code == 0 and "top1" in tested.out


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("null", "attentive"),
        pytest.param("attentive", "null", marks=pytest.mark.slow),
        pytest.param("attentive", "attentive", marks=pytest.mark.slow),
    ],
)
def test_a_probe_on_a_network_with_another_classifier(
    vidtrain, tiny_dataset, tmp_path, first, then
):
    line = [
        "train", "model=videomae_small", *RUN, f"data.root={tiny_dataset}", "trainer.max_epochs=1",
        "trainer.limit_train_batches=1", "trainer.limit_val_batches=1",
    ]  # fmt: skip
    assert vidtrain(*line, f"model.probe={first}", "paths.runs=first").code == 0
    (run,) = (tmp_path / "first").glob("*/*")
    done = vidtrain(*line, f"model.probe={then}", f"ckpt={run}", "paths.runs=then")
    assert done.code == 0, done.err
    said = done.out.replace("\n", " ")
    assert ("new here: head" in said) == ("not used: its classifier" in said) == (first != then)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.probe=atentive"], "model.probe is 'atentive'; it is one of linear, attentive"),
        (["freeze=[backbone,fc_norm,head]"], "leaves nothing to train"),
        (["model.probe=linear", "data.batch_size=1"], "set data.batch_size=4 or more"),
    ],
)
def test_mistakes_are_one_line(vidtrain, tiny_dataset, words, message):
    done = vidtrain("train", "model=videomae_small", *RUN, f"data.root={tiny_dataset}", *words)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
