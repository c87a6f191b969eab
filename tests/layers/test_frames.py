"""Folding keeps frames apart; clips of the wrong shape are refused."""

import pytest
import torch

from vidtrain.layers.frames import check_clip, fold_time, unfold_time
from vidtrain.types import UserError


def test_folding_and_back():
    x = torch.rand(2, 3, 5, 4, 6)
    folded = fold_time(x)
    assert torch.equal(folded[7], x[1, :, 2])
    assert torch.equal(unfold_time(folded, 5), x)


def test_a_clip_of_the_wrong_shape_is_refused():
    check_clip(torch.empty(1, 3, 8, 32, 32), 8, 32)
    with pytest.raises(UserError, match="8 frames and got 4"):
        check_clip(torch.empty(1, 3, 4, 32, 32), 8, 32)
    with pytest.raises(UserError, match="32 x 32 pixels and got 32 x 40"):
        check_clip(torch.empty(1, 3, 8, 32, 40), 8, 32)
