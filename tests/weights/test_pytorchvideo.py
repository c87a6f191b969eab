"""PyTorchVideo's weights: its own networks against ours with their state dicts."""

import named_net
import pytest
import torch

from vidtrain.models import slow, slowfast, x3d
from vidtrain.types import UserError
from vidtrain.weights.load import fill, open_parts

K = 400  # of its hub functions; a smaller one would do for the names, not for the order of classes


def hub():
    pytest.importorskip("pytorchvideo")
    from pytorchvideo.models import hub

    return hub


def two_paths(net, clip):
    """PyTorchVideo takes the two pathways' frames apart, and changes the list that it is given."""
    picked = torch.linspace(0, clip.shape[2] - 1, clip.shape[2] // net.alpha).long()
    return [clip[:, :, picked], clip]


CASES = {
    "slow_r50": (slow.slow_r50_8x8, (8, 224)),
    "c2d_r50": (slow.c2d_r50_8x8, (8, 224)),
    "i3d_r50": (slow.i3d_r50_8x8, (8, 224)),
    "slowfast_r50": (slowfast.slowfast_r50_8x8, (32, 224)),
    "slowfast_16x8_r101_50_50": (slowfast.slowfast_r101_16x8, (64, 224)),
    "x3d_xs": (x3d.x3d_xs, (4, 160)),
    "x3d_s": (x3d.x3d_s, (13, 160)),
    "x3d_m": (x3d.x3d_m, (16, 224)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a package that nobody keeps up
@pytest.mark.parametrize("name", CASES)
def test_the_same_logits(tmp_path, name):
    theirs = getattr(hub(), name)(pretrained=False).eval()
    named_net.randomise(theirs)
    torch.save({"model_state": theirs.state_dict()}, tmp_path / "w.pyth")
    (part,) = open_parts({"weights": str(tmp_path / "w.pyth")}, tmp_path, print)
    assert part.layout.name == "pytorchvideo"
    assert part.facts.mean == (0.45, 0.45, 0.45) and len(part.facts.labels) == 400
    build, (frames, size) = CASES[name]
    ours = build(K).eval()
    assert fill(ours, part).endswith(f"{len(theirs.state_dict())} tensors")
    clip = torch.rand(1, 3, frames, size, size)
    with torch.no_grad():
        expected = theirs(two_paths(ours, clip) if "slowfast" in name else clip)
        logits = ours(clip)
        if name.startswith("x3d"):  # it ends with a softmax when it does not train
            logits, expected = logits.log_softmax(1), expected.log()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_pathways_are_told_apart(tmp_path):
    keys = ["blocks.0.multipathway_blocks.0.conv.weight", "blocks.1.multipathway_blocks.0.res_blocks.0.branch1_conv.weight"]  # fmt: skip
    torch.save({key: torch.zeros(1) for key in keys}, tmp_path / "w.pyth")
    (part,) = open_parts({"weights": str(tmp_path / "w.pyth")}, tmp_path, print)
    with pytest.raises(UserError, match="of two pathways, and ResNet3d is not"):
        fill(slow.slow_r50_8x8(5, width=8), part)
    with pytest.raises(UserError, match=r"does not fit SlowFast: .*is 1 there and"):
        fill(slowfast.slowfast_r50_4x16(5, width=16), part)
