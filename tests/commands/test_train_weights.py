"""`model.weights=` through the command line: what is said, what is kept, what is not read again."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from vidtrain.models.fusion import late_fusion_pool
from vidtrain.models.resnet3d import r3d_18
from vidtrain.weights.torchvision import published

SMALL = [
    "model=late_fusion_pool", "model.backbone=small", "clip.num_frames=2", "clip.stride=2",
    "clip.size=32",
]  # fmt: skip
RUN = [
    "data=folder", "data.workers=0", "data.batch_size=8", "optim=sgd_step", "trainer=cpu",
    "trainer.max_epochs=1", "logger=csv",
]  # fmt: skip
STILL = ["optim.lr=1e-12", "optim.weight_decay=0", "freeze=*norm*"]  # nothing moves by much


def last(folder: Path) -> Path:
    (found,) = folder.glob("checkpoints/last.ckpt")
    return found


@pytest.fixture
def train(vidtrain, tiny_dataset):
    """Train: `run, out = train("model=...")`, the run's folder and what was printed in one line."""

    def make(*words):
        done = vidtrain("train", *RUN, f"data.root={tiny_dataset}", *words)
        assert done.code == 0, done.err
        (line,) = [line for line in done.out.splitlines() if line.startswith("run ")]
        return Path(line.removeprefix("run ")), done.out

    return make


@pytest.fixture
def fails(vidtrain, tiny_dataset):
    """Train in vain: the one line of error."""

    def make(*words):
        done = vidtrain("train", *RUN, f"data.root={tiny_dataset}", *words)
        assert done.code == 2 and done.err.count("\n") == 1, (done.code, done.err)
        return done.err

    return make


def state(run):
    saved = torch.load(last(run), weights_only=True)
    return {k.removeprefix("model."): t for k, t in saved["state_dict"].items()}, saved["vidtrain"][
        "config"
    ]


def test_a_file_fills_the_network_and_stays_in_the_config(train, tmp_path):
    theirs = r3d_18(7, width=4)
    path = tmp_path / "my weights (1)" / "r3d=18.pth"
    path.parent.mkdir()
    torch.save(theirs.state_dict(), path)
    words = ["model=r3d_18", "model.width=4", "clip.num_frames=8", "clip.size=32"]
    run, out = train(*words, f"model.weights={path}", *STILL[:2], "freeze=[stem,layer1]")
    assert f"weights of {path}: " in out and "its classifier has 7 classes, the data 3" in out
    assert "normalised" not in out  # r3d_18's own colours are torchvision's
    found, config = state(run)
    for name, tensor in theirs.state_dict().items():
        if name.endswith(("weight", "bias")) and not name.startswith("fc"):
            torch.testing.assert_close(found[name], tensor, msg=name)
    assert torch.equal(found["stem.1.running_mean"], theirs.stem[1].running_mean)
    assert config["model"]["weights"] == str(path) and config["freeze"] == ["stem", "layer1"]


def test_a_checkpoint_starts_another_run_with_its_classes_in_their_order(
    train, fails, ours, tmp_path
):
    path, net = ours
    run, out = train(*SMALL, f"ckpt={path}", *STILL)
    assert f"weights of {path}: " in out and "in the order of the data's classes" in out
    expected = net.classifier.weight[[1, 2, 0]]  # apple, pear, zebra
    torch.testing.assert_close(state(run)[0]["classifier.weight"], expected)

    torch.save(net.state_dict(), tmp_path / "bare.pth")
    error = fails(*SMALL, f"ckpt={tmp_path}/bare.pth")
    assert (
        f"bare.pth is not a checkpoint of vidtrain's; weights of others: model.weights={tmp_path}"
        in error
    )


@pytest.fixture
def ours(tmp_path):
    """A checkpoint of ours whose frames were normalised in an odd way."""
    path = tmp_path / "ours.ckpt"
    net = late_fusion_pool(3, size=32, backbone="small")
    about = {"label_names": ["zebra", "apple", "it's (a) pear"]}
    about["config"] = {"clip": {"mean": [0.11, 0.12, 0.13], "std": [0.31, 0.32, 0.33]}}
    weights = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": weights, "vidtrain": about}, path)
    return path, net


def test_normalisation_and_order_of_classes_come_with_the_weights(train, ours, vidtrain):
    path, net = ours
    run, out = train(*SMALL, f"model.weights={path}", "optim.lr=1e-12", "optim.weight_decay=0")
    assert "frames are normalised as for the weights: clip.mean=[0.11,0.12,0.13]" in out
    assert "in the order of the data's classes" in out
    found, config = state(run)
    assert config["clip"]["mean"] == [0.11, 0.12, 0.13] and config["clip"]["std"] == [
        0.31,
        0.32,
        0.33,
    ]
    assert config["data"]["clip"]["mean"] == [0.11, 0.12, 0.13]
    expected = net.classifier.weight[[1, 2, 0]]  # apple, pear, zebra
    torch.testing.assert_close(found["classifier.weight"], expected)

    path.unlink()  # neither a test nor going on needs it
    done = vidtrain("test", f"ckpt={run}", "trainer=cpu", "views.clips=1", "views.crops=1")
    assert done.code == 0, done.err
    again, out = train(*SMALL, f"model.weights={path}", f"resume={run}", "trainer.max_epochs=2")
    assert again == run and "weights of" not in out
    assert state(run)[1]["clip"]["mean"] == [0.11, 0.12, 0.13]
    _, out = train(*SMALL, f"model.weights={path}", f"ckpt={run}")
    assert "clip.mean=[0.11,0.12,0.13]" in out
    assert f"weights of {run}" in out and f"weights of {path}" not in out


def test_resume_auto_finds_a_run_with_weights(train, ours):
    path, _ = ours
    words = [*SMALL, f"model.weights={path}"]
    run, _ = train(*words)
    saved = torch.load(last(run), weights_only=True)
    saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
    torch.save(saved, last(run))  # as if it had been stopped before its end
    again, out = train(*words, "resume=auto")
    assert again == run and "going on" in out and "weights of" not in out
    again, out = train(*SMALL, "resume=auto")  # without its weights it is another run
    assert again != run


def test_other_colours_than_the_weights_are_an_error_when_the_user_wants_them(fails, train, ours):
    path, _ = ours
    error = fails(*SMALL, f"model.weights={path}", "clip.mean=[0.5,0.5,0.5]")
    assert "clip.mean=[0.5,0.5,0.5]" in error and "set clip.mean=[0.11,0.12,0.13]" in error
    words = ["clip.mean=[0.11,0.12,0.13]", "clip.std=[0.31,0.32,0.33]"]
    _, out = train(*SMALL, f"model.weights={path}", *words)
    assert "normalised" not in out


def test_mistakes_are_one_line_before_the_data_are_read(fails, tmp_path, monkeypatch):
    root = f"data.root={tmp_path / 'nothing'}"
    assert "is no file, and late_fusion_pool has no weights by name" in fails(
        *SMALL, "model.weights=w.pth", root
    )
    assert "model.weights= is empty" in fails(*SMALL, "model.weights=", root)
    assert "w.pth is no file, and c3d has no weights by name" in fails(
        "model=c3d", "model.weights=w.pth", root
    )
    assert "has no checksum" in fails(*SMALL, "model.weights=https://example.org/w.pth", root)
    assert "no setting 'model.weight'" in fails(*SMALL, "model.weight=w.pth", root)
    torch.save({"odd": torch.ones(1)}, tmp_path / "w.pth")
    assert "no known layout" in fails(*SMALL, "model.weights=w.pth", root)

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    error = fails("model=r3d_18", "model.weights=kinetics400", root)
    item = published("r3d_18")["kinetics400"]
    target = tmp_path / "cache" / "weights" / Path(item.address.url).name
    assert f"cannot fetch {item.address.url} (Name or service not known)" in error
    assert f"put it at {target}" in error


def test_parts_are_named_on_the_command_line(vidtrain, compose):
    cfg = compose("train", "model=i3d_two_stream", "model.weights={rgb: a.pt, flow: b.pt}")
    assert cfg.model.weights == {"rgb": "a.pt", "flow": "b.pt"}
    done = vidtrain(
        "train", "model=i3d_two_stream", "data=demo", "model.weights={rgb: a.pt, flow: b.pt}", "--cfg", "job",
    )  # fmt: skip
    assert done.code == 0 and "rgb: a.pt" in done.out
    done = vidtrain(
        "summary", "model=c3d", "data=ucf101", "model.weights=nothing.pth", "format=json"
    )
    assert done.code == 0  # it reads nothing
