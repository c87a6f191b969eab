"""S3D against torchvision."""

import pytest
import torch
import torchvision.models.video as tv
from nets import compiled_for_gpu, shake_norms
from torch import nn

from vidtrain.models.s3d import s3d
from vidtrain.trace.table import layer_table
from vidtrain.types import UserError

MIXED = {
    "5": [256, 8, 28, 28], "6": [480, 8, 28, 28], "8": [512, 4, 14, 14], "9": [512, 4, 14, 14],
    "10": [512, 4, 14, 14], "11": [528, 4, 14, 14], "12": [832, 4, 14, 14],
    "14": [832, 2, 7, 7], "15": [1024, 2, 7, 7],
}  # fmt: skip


def pair(dropout: float = 0.2) -> tuple[nn.Module, nn.Module]:
    """Make torchvision's network, with norms that hide nothing, and ours with its weights."""
    torch.manual_seed(0)
    theirs = tv.s3d(num_classes=11, dropout=dropout)
    shake_norms(theirs, variance=(0.05, 0.15)).train()
    ours = s3d(11, dropout=dropout)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("shape", [(14, 224, 224), (14, 224, 256)])
def test_logits_are_torchvisions(shape):
    theirs, ours = pair()
    clip = torch.randn(1, 3, *shape)
    with torch.no_grad():
        expected = theirs.eval()(clip)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours.eval()(clip), expected, rtol=0, atol=1e-4)


def test_a_compiler_is_given_what_torchvisions_gives_it():
    clips = (2, 3, 32, 224, 224)
    ours = compiled_for_gpu(lambda: s3d(11), clips)
    assert sum(count for op, count in ours.items() if op.startswith("aten.convolution")) >= 70
    assert ours == compiled_for_gpu(lambda: tv.s3d(num_classes=11), clips)


def test_the_norms_statistics_move_as_torchvisions():
    theirs, ours = pair()
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        theirs.train().features(clip)
        ours.train().features(clip)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def test_parameters_multiply_adds_and_sizes():
    with torch.device("meta"):
        layers = layer_table(s3d(400), (3, 16, 224, 224))
    assert sum(layer.params for layer in layers) == 8_320_048
    assert sum(layer.macs for layer in layers) / 1e9 == pytest.approx(17.9788, abs=1e-4)
    outputs = {layer.name: layer.output for layer in layers}
    assert outputs["features.0.0.2"] == [64, 16, 112, 112]
    assert outputs["features.0.1.2"] == [64, 8, 112, 112]
    assert outputs["features.4"] == [192, 8, 28, 28]
    for number, output in MIXED.items():
        assert outputs[f"features.{number}.cat"] == output


def test_small_clips_and_those_too_small():
    net = s3d(3).eval()
    with torch.no_grad():
        assert net.forward_features(torch.randn(1, 3, 5, 17, 17)).shape == (1, 1024, 1, 1, 1)
        assert net(torch.randn(1, 3, 5, 17, 40)).shape == (1, 3)
    for shape in ((4, 32, 32), (8, 32, 16)):
        with pytest.raises(UserError, match=f"{shape[0]} frames of {shape[1]} x {shape[2]}"):
            net(torch.randn(1, 3, *shape))
