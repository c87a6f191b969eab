"""`vidtrain summary` on the command line: its table, its JSON, its mistakes."""

import json

import pytest
import torch

from vidtrain.commands.summary import _amount

DATA = ("data=ucf101", "data.num_classes=10")
KEYS = ["name", "type", "output", "receptive_field", "params", "macs"]


def test_json_is_one_object_and_nothing_else(vidtrain, tmp_path):
    result = vidtrain("summary", "model=toy_3d_cnn", *DATA, "format=json")
    assert result.code == 0 and not result.err
    assert result.out.count("\n") == 1  # parses as a whole: nothing before it, nothing after it
    report = json.loads(result.out)
    assert list(report) == ["model", "input", "params", "macs", "layers"]
    assert report["model"] == "toy_3d_cnn" and report["input"] == [3, 20, 64, 64]
    assert report["params"] == 9034 and report["macs"] == 89_579_760
    assert all(list(layer) == KEYS for layer in report["layers"])
    assert report["layers"][0] == {
        "name": "conv1", "type": "Conv3d", "output": [12, 20, 64, 64],
        "receptive_field": [3, 3, 3], "params": 984, "macs": 79_626_240,
    }  # fmt: skip
    for total in ("params", "macs"):
        assert sum(layer[total] for layer in report["layers"]) == report[total]
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_table_shows_every_layer_and_the_totals(vidtrain):
    result = vidtrain("summary", "model=toy_late_fusion", *DATA)
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert any("conv2" in s and "24 x 20 x 16 x 16" in s and "1 x 14 x 14" in s for s in lines)
    assert any("pool2" in s and "24 x 1 x 1 x 1" in s and "20 x 64 x 64" in s for s in lines)
    assert any("3,202" in s and "39.813 M" in s for s in lines)
    assert "…" not in result.out  # nothing is cut off in a pipe


def test_the_clip_and_the_classes_come_from_the_command_line(vidtrain):
    words = ("clip.num_frames=8", "clip.size=32", "data.num_classes=3", "format=json")
    report = json.loads(vidtrain("summary", "model=toy_early_fusion", "data=ucf101", *words).out)
    assert report["input"] == [3, 8, 32, 32]
    assert report["layers"][0]["params"] == 3 * 8 * 12 * 9 + 12
    assert report["layers"][-1]["output"] == [3]


def test_every_input_is_named(vidtrain):
    words = ("model=two_stream", *DATA, "clip.num_frames=4", "clip.size=64")
    report = json.loads(vidtrain("summary", *words, "format=json").out)
    assert report["input"] == {"video": [3, 4, 64, 64], "flow": [2, 4, 64, 64]}
    title = vidtrain("summary", *words).out.splitlines()[0]
    assert " ".join(title.split()) == "two_stream, video 3 x 4 x 64 x 64, flow 2 x 4 x 64 x 64"
    alone = json.loads(vidtrain("summary", *words, "model.streams=temporal", "format=json").out)
    assert alone["input"] == [2, 4, 64, 64]
    assert alone["params"] < report["params"]


def test_nothing_is_computed_read_or_downloaded(vidtrain, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    result = vidtrain(
        "summary", "model=slow_fusion", "model.backbone=resnet18", *DATA, "format=json"
    )
    layers = json.loads(result.out)["layers"]
    assert layers[0]["type"] == "FoldedConv3d" and layers[0]["receptive_field"] == [4, 7, 7]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("format=yaml", "format is 'yaml'; it must be one of table, json"),
        ("model.backbone=resnet81", "no 'resnet81'; did you mean 'resnet18'?"),
    ],
)
def test_a_mistake_is_one_line(vidtrain, word, message):
    result = vidtrain("summary", "model=slow_fusion", *DATA, word)
    assert result.code == 2 and message in result.err
    assert result.err.count("\n") == 1 and not result.out


def test_amounts_are_readable():
    assert [_amount(n) for n in (7, 1500, 39_813_360, 38_548_963_328, 2_823_404_100_000)] == [
        "7", "1.500 K", "39.813 M", "38.549 G", "2.823 T",
    ]  # fmt: skip
