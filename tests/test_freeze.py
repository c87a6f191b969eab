"""`freeze=` through training: no gradient, no optimizer state, no new statistics, no dropout."""

import pytest
import torch
from torch import nn

from vidtrain import build
from vidtrain.config import quote, resolved


@pytest.fixture
def task(compose):
    """Build a task: `task("model=...", "freeze=...")`."""

    def make(*overrides):
        cfg = compose("train", "data=ucf101", "data.num_classes=3", "clip.size=32", *overrides)
        torch.manual_seed(0)
        return build.task(cfg, build.model(cfg))

    return make


POOL = ("model=late_fusion_pool", "model.backbone=small", "clip.num_frames=2")


def step(module, lr=0.1):
    """One training step on two clips."""
    module.train()
    built = module.optimizer(module.model, 10)
    optimizer = built["optimizer"]
    clip = torch.randn(2, 1, 3, 2, 32, 32)
    module.step(
        {"video": clip, "label": torch.tensor([0, 2]), "index": torch.arange(2)}
    ).loss.backward()
    optimizer.step()
    return optimizer


def test_a_frozen_backbone_does_not_move(task):
    module = task(*POOL, "freeze=backbone", "optim.schedule=constant")
    assert module.frozen == ("backbone",)
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    optimizer = step(module)
    moved = {n for n, t in module.model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"classifier.weight", "classifier.bias"}  # nor statistics of batch norm
    assert all(p.grad is None for p in module.model.backbone.parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 2 and len(optimizer.state) == 2


def test_without_it_everything_moves(task):
    module = task(*POOL, "optim.schedule=constant")
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    step(module)
    assert not any(torch.equal(t, before[n]) for n, t in module.model.state_dict().items())


def test_frozen_parts_stay_in_eval_mode_and_the_rest_does_not(task):
    module = task(*POOL, "freeze=[backbone.body.norm1,backbone.body.conv2]")
    for _ in range(2):
        module.eval()
        assert not any(m.training for m in module.modules())
        assert module.train() is module
        body = module.model.backbone.body
        assert not body.norm1.training and not body.conv2.training
        assert body.norm2.training and body.conv1.training and module.model.training
    assert body.conv1.weight.requires_grad and not body.conv2.weight.requires_grad


def test_what_a_frozen_part_makes_can_be_kept(task):
    """Dropout inside it is off as well, so that its features are the same each time."""
    module = task("model=late_fusion", "clip.num_frames=2", "model.backbone=small", "freeze=mlp")
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.model.mlp.modules())
    x = torch.randn(2, module.model.mlp[1].in_features)
    module.train()
    assert torch.equal(module.model.mlp(x), module.model.mlp(x))


def test_the_config_has_the_key_and_a_checkpoints_task_too(compose, task):
    assert resolved(compose("train", "freeze=backbone"))["freeze"] == "backbone"
    assert resolved(compose("train"))["freeze"] is None
    assert task(*POOL).frozen == ()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("freeze=backbone", "backbone"),
        ("freeze=layer[12]*", "layer[12]*"),
        ("freeze=*.norm?", "*.norm?"),
        ("freeze=[stem,layer*]", ["stem", "layer*"]),
        ("freeze=null", None),
    ],
)
def test_patterns_can_be_typed(compose, word, value):
    assert resolved(compose("train", quote(word)))["freeze"] == value


def test_lightning_keeps_it_through_validation(vidtrain, tiny_dataset, tmp_path):
    done = vidtrain(
        "train", *POOL, "clip.size=32", "clip.stride=2", "data=folder", f"data.root={tiny_dataset}",
        "data.workers=0", "data.batch_size=8", "trainer=cpu", "logger=csv", "trainer.max_epochs=2",
        "freeze=backbone", "optim=sgd_cosine", "optim.groups={classifier: 10}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "frozen: backbone: 97,680 of 98,067 parameters" in done.out.replace("\n", " ")
    (last,) = tmp_path.glob("runs/*/*/checkpoints/last.ckpt")
    saved = torch.load(last, weights_only=True)
    assert saved["vidtrain"]["config"]["freeze"] == "backbone"
    assert saved["vidtrain"]["config"]["optim"]["groups"] == {"classifier": 10}
    state = saved["state_dict"]
    norms = [t for name, t in state.items() if "backbone" in name and name.endswith("running_mean")]
    assert norms and not any(t.any() for t in norms)
    assert not state["model.backbone.body.norm1.num_batches_tracked"]
    (optimizer,) = saved["optimizer_states"]
    assert len(optimizer["state"]) == 2
    assert {g["initial_lr"] for g in optimizer["param_groups"]} == {0.5}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("freeze=backbon", "no part of LateFusionPool is called 'backbon'"),
        ("freeze=[backbone,classifier]", "leaves nothing to train"),
        ("optim.groups={fc: 10}", "optim.groups: no part of LateFusionPool is called 'fc'"),
        ("optim.groups={classifier: -1}", "must be a number above 0"),
        ("optim.group={classifier: 10}", "no setting 'optim.group'"),
    ],
)
def test_mistakes_are_one_line(vidtrain, tiny_dataset, word, message):
    done = vidtrain(
        "train", *POOL, "clip.size=32", "data=folder", f"data.root={tiny_dataset}", "data.workers=0",
        "trainer=cpu", "logger=csv", word,
    )  # fmt: skip
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
