"""Which parameters decay, and at which rate."""

import pytest
import torch
from torch import nn

from vidtrain import build
from vidtrain.optim.groups import chosen, covers, decay_groups, depths, freeze
from vidtrain.optim.schedules import adamw, sgd
from vidtrain.types import UserError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.layer1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Dropout(0.5))
        self.layer10 = nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 2)


def names(net, parameters):
    by_id = {id(p): name for name, p in net.named_parameters()}
    return {by_id[id(p)] for p in parameters}


def test_a_name_covers_itself_and_what_lies_below():
    assert covers("stem", "stem.0.weight") and covers("stem.0", "stem.0.weight")
    assert covers("stem.0.weight", "stem.0.weight") and covers("*.bias", "stem.0.bias")
    assert covers("layer*", "layer1.0.weight") and covers("layer[12]", "layer1.0.weight")
    assert not covers("layer1", "layer10.weight") and not covers("0", "stem.0.weight")


def test_rates_are_multiplied_and_decay_stays_split():
    net = Net()
    groups = {"fc": 10, "layer1*": 0.1}
    made = decay_groups(net, 0.5, lr=0.2, groups=groups)
    found = {(round(g.get("lr", 0.2), 9), g["weight_decay"]): names(net, g["params"]) for g in made}
    assert found == {
        (0.2, 0.5): {"stem.0.weight"},
        (0.2, 0.0): {"stem.0.bias", "stem.1.weight", "stem.1.bias", "scale"},
        (2.0, 0.5): {"fc.weight"},
        (2.0, 0.0): {"fc.bias"},
        (0.02, 0.5): {"layer1.0.weight", "layer10.weight"},
        (0.02, 0.0): {"layer1.0.bias", "layer10.bias"},
    }
    assert sum(len(g["params"]) for g in made) == len(list(net.parameters()))


def test_the_last_pattern_that_fits_counts():
    net = Net()
    made = decay_groups(net, 0.0, lr=1.0, groups={"*": 0.1, "fc": 5, "fc.bias": 7})
    rates = {name: g.get("lr", 1.0) for g in made for name in names(net, g["params"])}
    assert rates["stem.0.weight"] == pytest.approx(0.1)
    assert rates["fc.weight"] == 5 and rates["fc.bias"] == 7


@pytest.mark.parametrize("make", [sgd, adamw])
def test_the_schedule_keeps_the_factors(make):
    net = Net()
    built = make(net, 10, lr=0.5, groups={"fc": 10}, schedule="cosine", warmup=0.2)
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    for _ in range(10):
        rates = {g["lr"] for g in optimizer.param_groups}
        assert len(rates) == 2 and max(rates) == pytest.approx(10 * min(rates))
        assert optimizer.param_groups[0]["lr"] == min(rates)  # what is shown is the base rate
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"head": 10},
            "optim.groups: no part of Net is called 'head'; at the top there are stem, ",
        ),
        ({"fc": 0}, "'fc' has the factor 0; it must be a number above 0"),
        ({"fc": -1}, "above 0"),
        ({"fc": "ten"}, "above 0"),
        ({"fc": True}, "above 0"),
    ],
)
def test_mistakes_are_named(groups, message):
    with pytest.raises(UserError) as error:
        decay_groups(Net(), 0.0, lr=1.0, groups=groups)
    assert message in str(error.value)


def test_frozen_parameters_are_in_no_group():
    net = Net()
    assert freeze(net, ["stem", "layer1"]) == ("stem", "layer1")
    made = decay_groups(net, 0.1, lr=1.0, groups={"stem": 2, "fc": 3})
    held = {name for g in made for name in names(net, g["params"])}
    assert held == {"layer10.weight", "layer10.bias", "scale", "fc.weight", "fc.bias"}


def test_freeze_names_what_stays_in_eval_mode():
    assert freeze(Net(), None) == () and freeze(Net(), []) == ()
    assert freeze(Net(), "stem") == ("stem",)
    assert freeze(Net(), "stem.1") == ("stem.1",)
    assert freeze(Net(), "layer*") == ("layer1", "layer10")
    assert freeze(Net(), ["stem.0", "stem"]) == ("stem",)
    net = Net()
    assert freeze(net, ["*.bias", "scale"]) == ()  # single parameters; no module is whole
    assert not net.fc.bias.requires_grad and net.fc.weight.requires_grad
    assert chosen(Net(), "layer10", "freeze") == ["layer10.weight", "layer10.bias"]


def test_the_word_backbone_means_all_but_the_classifier():
    net = Transformer()
    assert freeze(net, "backbone") == ("patch_embed", "blocks", "norm")
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
    }
    net = Transformer()
    net.readout = ("norm",)
    assert freeze(net, ["backbone", "head.bias"]) == ("patch_embed", "blocks")
    learns = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learns == {"head.weight", "norm.weight", "norm.bias"}
    net = Transformer()
    made = decay_groups(net, 0.0, lr=1.0, groups={"backbone": 0.1})
    rates = {name: g.get("lr", 1.0) for g in made for name in names(net, g["params"])}
    assert {name for name, found in rates.items() if found == 1} == {"head.weight", "head.bias"}
    assert {found for found in rates.values()} == {1.0, 0.1}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("backbone", "freeze: no part of Net is called 'backbone'; at the top there are stem, layer1, layer10, fc, scale"),
        (["stem", "nothing*"], "is called 'nothing*'"),
        ("*", "leaves nothing to train"),
        ([3], "it takes a name or several"),
    ],
)  # fmt: skip
def test_what_cannot_be_frozen_is_said(patterns, message):
    with pytest.raises(UserError) as error:
        freeze(Net(), patterns)
    assert message in str(error.value)


class Transformer(nn.Module):
    """Tokens, three blocks, a last norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Conv3d(3, 4, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)
        )
        self.norm = nn.LayerNorm(4)
        self.reset_classifier(2)

    def reset_classifier(self, num_classes: int) -> None:
        self.head = nn.Linear(4, num_classes) if num_classes else nn.Identity()


def test_layers_of_a_transformer_are_counted_as_in_beit():
    """`get_num_layer_for_vit` of BEiT and VideoMAE: embeddings 0, block i at i + 1, the rest last."""
    found, last = depths(Transformer())
    assert last == 4
    for name, depth in found.items():
        block = name.split(".")[1] if name.startswith("blocks") else None
        first = name.startswith(("positions", "patch_embed"))
        assert depth == (int(block) + 1 if block else 0 if first else 4), name


@pytest.mark.parametrize(
    ("name", "layers", "first", "late"),
    [
        ("slow_r50_4x16", 17, ["stem.norm.weight"], {"res2.0.conv_a.weight": 1, "res5.2.norm_c.bias": 16}),
        ("r3d_18", 9, ["stem.0.weight", "stem.1.bias"], {"layer1.0.conv1.0.weight": 1}),
        ("slowfast_r50_4x16", 21, ["slow.stem.conv.weight", "fast.stem.norm.bias"],
         {"slow.res3.1.conv_b.weight": 5, "fast.res3.1.conv_b.weight": 5}),
        ("i3d", 12, ["Conv3d_1a_7x7.conv3d.weight"], {"Mixed_5c.b0.bn.weight": 11}),
        ("c3d", 10, ["conv1.weight"], {"fc7.bias": 9}),
    ],
)  # fmt: skip
def test_layers_of_networks(compose, name, layers, first, late):
    with torch.device("meta"):
        net = build.model(compose("train", f"model={name}", "data=ucf101"))
    found, last = depths(net)
    assert last == layers and set(found) == {name for name, _ in net.named_parameters()}
    assert all(found[key] == 0 for key in first)
    assert {key: found[key] for key in late} == late
    head = {key for key, depth in found.items() if depth == last}
    net.reset_classifier(0)
    assert head.isdisjoint(dict(net.named_parameters()))


def test_rates_fall_from_the_classifier_down():
    net = Transformer()
    made = decay_groups(net, 0.1, lr=1.0, groups={"blocks.1": 10}, layer_decay=0.5)
    rates = {name: g.get("lr", 1.0) for g in made for name in names(net, g["params"])}
    assert rates["head.weight"] == rates["norm.bias"] == 1
    assert rates["blocks.2.1.weight"] == 0.5 and rates["blocks.1.0.bias"] == 2.5
    assert rates["positions"] == rates["patch_embed.weight"] == 0.0625
    for wrong in (0, 1.1, True):
        with pytest.raises(UserError, match=r"optim.layer_decay is"):
            decay_groups(net, 0.1, lr=1.0, layer_decay=wrong)


def test_tables_of_positions_need_not_decay():
    net = nn.Module()
    net.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
    net.encoder = nn.Module()
    net.encoder.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
    net.encoder.fc = nn.Linear(3, 2)

    def decaying(no_decay):
        groups = decay_groups(net, 0.1, no_decay=no_decay)
        return {n for group in groups if group["weight_decay"] for n in names(net, group["params"])}

    assert decaying(None) == {"pos_embed", "encoder.cls_token", "encoder.fc.weight"}
    assert decaying(["pos_*", "*_token"]) == {"encoder.fc.weight"}
    with pytest.raises(UserError, match=r"optim\.no_decay: no part of Module is called 'time_\*'"):
        decaying(["time_*"])
    with pytest.raises(UserError, match=r"optim\.no_decay is 'pos_embed'; it takes a list"):
        decaying("pos_embed")
