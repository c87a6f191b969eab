"""Masks of clips: how much is hidden, where, and what the decoder is asked for."""

import pytest
import torch

from vidtrain.layers import masking
from vidtrain.types import UserError

GRID = (8, 14, 14)  # 16 x 224 x 224 in tubelets of 2 x 16 x 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_tube_hides_the_same_176_places_in_all_slots():
    flags, count = masking.tube(3, GRID, 0.9, generator(0))
    slots = flags.unflatten(1, (8, 196))
    assert (slots.sum(2) == 176).all() and count == 8 * 176
    assert (slots == slots[:, :1]).all()
    assert not torch.equal(slots[0, 0], slots[1, 0])  # each clip has its own


def test_the_same_seed_hides_the_same_and_another_does_not():
    first, again, other = (masking.tube(2, GRID, 0.9, generator(s)).flags for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_random_tokens_leave_156_anywhere():
    flags, count = masking.random(64, GRID, 0.9, generator(0))
    assert ((~flags).sum(1) == 156).all() and count == 1568 - 156
    slots = flags.unflatten(1, (8, 196))
    assert not (slots == slots[:, :1]).flatten(1).all(1).any()  # no tubes
    # Evenly over all 1,568: a place is seen in a tenth of the clips, 6.4 of 64 with a deviation of 2.4.
    seen = (~flags).sum(0).float()
    assert abs(seen.mean() - 64 * 156 / 1568) < 1e-4 and seen.max() < 6.4 + 6 * 2.4
    assert (seen.unflatten(0, (8, 196)).sum(1) / (64 * 156)).sub(1 / 8).abs().max() < 0.02


def test_running_cells_keep_half_of_every_slot_and_every_place_half_of_the_time():
    flags, count = masking.running_cells(64, GRID, 0.5, generator(0))
    kept = ~flags.unflatten(1, GRID)
    assert count == 784
    assert (kept.flatten(2).sum(2) == 98).all()
    assert (kept.sum(1) == 4).all()
    # The pattern of a cell moves on by one place of its ring, row by row, at each slot.
    cells = kept[:, :, :2, :2].flatten(2).int()
    assert torch.equal(cells[:, 1:], cells[:, :-1].roll(-1, 2))
    # All cells are alike, and there are four beginnings.
    assert torch.equal(kept[:, :, 2:, 2:], kept[:, :, :-2, :-2])
    assert len({tuple(clip.flatten().tolist()) for clip in kept}) == 4


@pytest.mark.parametrize("side, hidden, counted", [(14, 176, 704), (16, 230, 920)])
def test_what_is_hidden_from_both_does_not_hang_on_the_tubes(side, hidden, counted):
    grid = (8, side, side)
    for seed in range(5):
        tubes = masking.tube(4, grid, 0.9, generator(seed))
        mask = masking.make_mask(tubes, masking.running_cells(4, grid, 0.5, generator(seed)))
        assert mask.visible.shape == (4, 8 * (side**2 - hidden))
        assert mask.predicted.shape == (4, 4 * side**2)
        assert (mask.counted.sum(1) == counted).all()
        # What counts is exactly what is asked for and not seen.
        for clip in range(4):
            seen = set(mask.visible[clip].tolist())
            asked = mask.predicted[clip].tolist()
            assert [number not in seen for number in asked] == mask.counted[clip].tolist()


def test_visible_and_predicted_are_all_tokens_in_their_order():
    mask = masking.make_mask(masking.random(3, (4, 6, 6), 0.75, generator(1)))
    both = torch.cat([mask.visible, mask.predicted], 1).sort(1).values
    assert torch.equal(both, torch.arange(144).expand(3, -1))
    assert (mask.visible.diff() > 0).all() and (mask.predicted.diff() > 0).all()
    assert mask.counted.all()


def test_tokens_are_picked_by_number():
    tokens = torch.arange(12.0).view(2, 3, 2)
    numbers = torch.tensor([[2, 0], [1, 1]])
    assert masking.pick(tokens, numbers).tolist() == [
        [[4.0, 5.0], [0.0, 1.0]],
        [[8.0, 9.0], [8.0, 9.0]],
    ]
    table = torch.arange(3.0).view(1, 3, 1)  # one for all clips
    assert masking.pick(table, numbers).flatten(1).tolist() == [[2, 0], [1, 1]]


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, True, "much", None])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(UserError, match=r"model.mask_ratio is .* between 0 and 1"):
        masking.check_share(ratio)


def test_masks_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(UserError, match=r"hides 0 of 4 patches.*clip.size"):
        masking.tube(1, (2, 2, 2), 0.2)
    with pytest.raises(UserError, match=r"hides 8 of 8 patches"):
        masking.random(1, (2, 2, 2), 0.9)
    with pytest.raises(UserError, match="multiple of two patches"):
        masking.running_cells(1, (2, 3, 4), 0.5)
    with pytest.raises(UserError, match=r"0\.25, 0\.5 or 0\.75"):
        masking.running_cells(1, (2, 4, 4), 0.6)
