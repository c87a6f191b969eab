"""Blocks and stages of the 3D ResNets."""

import pytest
import torch
from torch import nn

from vidtrain.layers.bottleneck import Bottleneck, Stage, Stem, stage_depths
from vidtrain.types import UserError


def test_a_block_starts_as_its_shortcut():
    x = torch.randn(2, 8, 2, 4, 4)
    block = Bottleneck(8, 2, 8, kernel=3, stride=1, zero_init=True)
    assert torch.equal(block(x), x.relu())
    assert not torch.equal(Bottleneck(8, 2, 8, 3, 1, zero_init=False)(x), x.relu())
    wider = Bottleneck(8, 2, 16, kernel=3, stride=2, zero_init=True)
    shortcut = wider.shortcut_norm(wider.shortcut_conv(x)).relu()
    assert torch.equal(wider(x), shortcut) and shortcut.shape == (2, 16, 2, 2, 2)


def test_the_stride_is_in_the_middle_and_never_in_time():
    block = Bottleneck(8, 2, 16, kernel=3, stride=2, zero_init=True)
    convs = {name: m for name, m in block.named_children() if isinstance(m, nn.Conv3d)}
    assert {name: conv.stride for name, conv in convs.items()} == {
        "conv_a": (1, 1, 1), "conv_b": (1, 2, 2), "conv_c": (1, 1, 1), "shortcut_conv": (1, 2, 2),
    }  # fmt: skip
    assert {name: conv.kernel_size for name, conv in convs.items()} == {
        "conv_a": (3, 1, 1), "conv_b": (1, 3, 3), "conv_c": (1, 1, 1), "shortcut_conv": (1, 1, 1),
    }  # fmt: skip
    assert not any(conv.bias is not None for conv in convs.values())


def test_a_stage_repeats_its_kernels_and_puts_in_what_comes_after():
    stage = Stage((4, 2, 8), 5, (3, 1), 2, True, {1: nn.Identity(), 4: nn.Identity()})
    assert list(dict(stage.named_children())) == ["0", "1", "after1", "2", "3", "4", "after4"]
    spans = [block.conv_a.kernel_size[0] for block in stage if isinstance(block, Bottleneck)]
    assert spans == [3, 1, 3, 1, 3]
    assert stage(torch.randn(1, 4, 3, 8, 8)).shape == (1, 8, 3, 4, 4)
    with pytest.raises(UserError, match="non_local_at names block 5 of a stage that has 5"):
        Stage((4, 2, 8), 5, (1,), 1, True, {5: nn.Identity()})


def test_stem_quarters_space():
    assert Stem(4, 5)(torch.randn(1, 3, 7, 32, 48)).shape == (1, 4, 7, 8, 12)


def test_first_weights():
    torch.manual_seed(0)
    conv = Bottleneck(64, 64, 256, 3, 1, zero_init=False).conv_a
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 3)) ** 0.5, rel=0.05)


def test_depths():
    assert sum(stage_depths(50)) * 3 + 2 == 50 and sum(stage_depths(152)) * 3 + 2 == 152
    with pytest.raises(UserError, match=r"model\.depth is 18; it must be one of 50, 101, 152"):
        stage_depths(18)
