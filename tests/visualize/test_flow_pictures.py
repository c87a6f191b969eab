"""Pictures of flow: direction is hue, length is strength."""

from __future__ import annotations

import colorsys

import pytest
import torch

from vidtrain.visualize.flow import color_wheel, flow_pictures


def hue_of(across: float, down: float) -> float:
    """The hue, from 0 to 1, of one displacement at full strength."""
    flow = torch.tensor([across, down]).float().view(1, 2, 1, 1)
    pictures, _ = flow_pictures(flow, brightest=float(flow.norm()))
    red, green, blue = (pictures[0, :, 0, 0] / 255).tolist()
    hue, _, value = colorsys.rgb_to_hsv(red, green, blue)
    assert value == pytest.approx(1, abs=0.02)
    return hue


def test_each_direction_has_a_colour_of_its_own():
    hues = [hue_of(*way) for way in ((1, 0), (0.7, 0.7), (0, 1), (-1, 0.01), (0, -1), (0.7, -0.7))]
    assert hues[0] == 0  # right is red
    assert hues == sorted(hues) and len({round(hue, 1) for hue in hues}) == 6  # once around
    assert hue_of(1, -0.05) > 0.95  # and the circle closes
    assert color_wheel().shape == (55, 3)


def test_length_is_strength():
    flow = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0]).view(1, 1, 1, 5)
    flow = torch.cat([flow, torch.zeros_like(flow)], 1)
    pictures, brightest = flow_pictures(flow, brightest=4)
    assert brightest == 4 and pictures.shape == (1, 3, 1, 5) and pictures.dtype == torch.uint8
    red, green, blue = pictures[0, :, 0].tolist()
    assert red[:4] == [255] * 4 and green == blue  # still is white, then redder
    assert green[:4] == [255, 191, 128, 0]
    assert (red[4], green[4]) == (191, 0)  # beyond, darker


def test_an_outlier_does_not_bleach_the_rest():
    flow = torch.ones(2, 2, 30, 30)
    flow[0, :, 0, 0] = 500
    pictures, brightest = flow_pictures(flow)
    assert brightest == pytest.approx(2**0.5)
    assert (pictures[1].float().std((1, 2)) == 0).all() and pictures[1, :, 0, 0].min() < 10
    still, _ = flow_pictures(torch.zeros(1, 2, 4, 4))
    assert (still == 255).all()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 4\); expected \(T, 2, H, W\)"):
        flow_pictures(torch.zeros(2, 4, 4))
