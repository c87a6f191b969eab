"""Image networks of torchvision give what torchvision gives."""

import pytest
import torch
from torch import nn

from vidtrain.layers.image import TorchvisionNet, stage_shapes


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 64), ("convnext_tiny", 32), ("densenet121", 32), ("googlenet", 32),
        ("mobilenet_v2", 32), ("mobilenet_v3_small", 32), ("resnet18", 32), ("squeezenet1_1", 32),
        ("shufflenet_v2_x0_5", 32), ("swin_t", 32), ("vit_b_32", 64), ("regnet_x_400mf", 32),
        pytest.param("maxvit_t", 224, marks=pytest.mark.slow),
        pytest.param("inception_v3", 96, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_torchvision_nets_give_what_torchvision_gives(name, size):
    torch.manual_seed(0)
    net = TorchvisionNet(name, 7, size).eval()
    frames = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(net(frames), net.net(frames))
        net.reset_classifier(0)
        assert net(frames).shape == (2, net.num_embedding)
        net.reset_classifier(5)
        assert net(frames).shape == (2, 5)


def test_shapes_are_found_without_running_the_network():
    net = TorchvisionNet("resnet18", None, 64)
    counts = {name: buffer.clone() for name, buffer in net.named_buffers()}
    shapes = stage_shapes(net, 64)
    assert shapes[0] == (1, 64, 32, 32) and shapes[-1] == (1, 512, 2, 2)
    assert net.training and all(torch.equal(counts[n], b) for n, b in net.named_buffers())
    assert isinstance(net.net.fc, nn.Identity)  # a body has no head
