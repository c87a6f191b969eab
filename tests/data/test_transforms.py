"""Geometry and the device transform, by what comes out of pixels that say where they were."""

import numpy as np
import pytest
import torch

from vidtrain.data.transforms import sample as geometry
from vidtrain.data.transforms.device import (
    DeviceTransform,
    gather_views,
    jitter_colors,
    mean_grey,
)
from vidtrain.data.transforms.sample import Augment, Geometry
from vidtrain.types import UserError


def ramp(height, width, frames=2):
    """Frames whose red is the row and whose green is the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    return picture.repeat(frames, 1, 1, 1)


def test_crop_takes_the_box_and_flips_it():
    frames = ramp(40, 60)
    plain = geometry.crop(frames, Geometry(10, 20, 8, 8, False), 8)
    assert plain[0, 0, :, 0].tolist() == list(range(10, 18))
    assert plain[0, 1, 0].tolist() == list(range(20, 28))
    flipped = geometry.crop(frames, Geometry(10, 20, 8, 8, True), 8)
    assert flipped[0, 1, 0].tolist() == list(range(27, 19, -1))
    assert flipped.dtype == torch.uint8


def test_resize_of_a_constant_is_the_constant_and_of_a_ramp_is_a_ramp():
    assert (geometry.resize(torch.full((1, 3, 40, 60), 77, dtype=torch.uint8), 13, 17) == 77).all()
    small = geometry.resize(ramp(40, 60), 20, 30)
    assert (small[0, 0, 1:-1, 5].diff() == 2).all()


def test_random_geometry_stays_inside_and_covers_the_frame():
    rng = np.random.default_rng(0)
    for augment in (Augment(scale=[1.0, 1.5]), Augment(area=[0.2, 1.0]), Augment()):
        boxes = [geometry.random_geometry(90, 120, 64, augment, rng) for _ in range(300)]
        for box in boxes:
            assert box.top >= 0 and box.top + box.height <= 90
            assert box.left >= 0 and box.left + box.width <= 120
            assert not box.flip
    assert boxes[0] == Geometry(0, 15, 90, 90, False)  # no augmentation: the middle square
    sides = [
        geometry.random_geometry(90, 120, 64, Augment(scale=[1, 1.5]), rng).height
        for _ in range(300)
    ]
    assert min(sides) <= 62 and max(sides) >= 88  # 90 / 1.5 to 90 / 1
    flips = [geometry.random_geometry(9, 9, 8, Augment(hflip=0.5), rng).flip for _ in range(400)]
    assert 150 < sum(flips) < 250


def test_sides_are_neighbours_at_thirteen_places():
    rng, sides = np.random.default_rng(0), [1, 0.875, 0.75, 0.66]
    boxes = [geometry.random_geometry(90, 120, 64, Augment(sides=sides), rng) for _ in range(3000)]
    lengths = [90, 78, 67, 59]  # rounded down
    shapes = {(box.height, box.width) for box in boxes}
    near = {(h, w) for i, h in enumerate(lengths) for j, w in enumerate(lengths) if abs(i - j) < 2}
    assert shapes == near and len(near) == 10
    for height, width in near:  # steps of a quarter of what is left, rounded down
        down, right = (90 - height) // 4, (120 - width) // 4
        places = {(b.top, b.left) for b in boxes if (b.height, b.width) == (height, width)}
        even = {(i * down, j * right) for i in (0, 2, 4) for j in (0, 2, 4)}
        odd = {(i * down, j * right) for i in (1, 3) for j in (1, 3)}
        assert places == even | odd
    assert len(geometry.PLACES) == len(set(geometry.PLACES)) == 13


@pytest.mark.parametrize("sides", [[], "1", [1.2], [0], [True], 0.5, ["a"]])
def test_sides_that_cannot_be_are_refused(sides):
    with pytest.raises(UserError, match=r"augment\.sides is .* takes numbers above 0, at most 1"):
        Augment(sides=sides)


@pytest.mark.parametrize(
    "knobs",
    [
        {"scale": [0.5, 1]},
        {"scale": [2, 1]},
        {"area": [0.1, 1.2]},
        {"hflip": 2},
        {"scale": [1, 2], "area": [0.1, 1]},
    ],
)
def test_knobs_that_cannot_be_turned_that_way_are_refused(knobs):
    with pytest.raises(UserError, match="augment"):
        Augment(**knobs)


def test_region_in_pixels():
    # The mouth of the GRID speaker, 360 x 288.
    assert geometry.region_box([0.28, 0.58, 0.30, 0.30], 288, 360) == (167, 101, 86, 108)
    assert geometry.region_box([0, 0, 1, 1], 288, 360) == (0, 0, 288, 360)
    for bad in ([0.5, 0, 0.6, 1], [-0.1, 0, 0.5, 0.5], [0, 0, 0, 1]):
        with pytest.raises(UserError, match=r"data\.region"):
            geometry.region_box(bad, 10, 10)


def test_crops_spread_over_the_longer_side():
    assert geometry.spread_crops(64, 100, 64, 3) == [(0, 0), (0, 18), (0, 36)]
    assert geometry.spread_crops(100, 64, 64, 3) == [(0, 0), (18, 0), (36, 0)]
    assert geometry.spread_crops(72, 100, 64, 1) == [(4, 18)]
    with pytest.raises(UserError, match="short_side"):
        geometry.spread_crops(50, 100, 64, 1)


def test_short_side():
    assert geometry.short_side_size(288, 360, 144) == (144, 180)
    assert geometry.short_side_size(360, 288, 144) == (180, 144)


def test_gathered_views_are_the_frames_and_crops_that_the_table_names():
    frames = ramp(8, 12, frames=5)
    frames[:, 2] = torch.arange(5, dtype=torch.uint8).view(5, 1, 1)  # blue is the frame's number
    views = gather_views(frames, torch.tensor([[0, 2], [4, 4]]), np.array([[0, 0, 8], [0, 4, 8]]))
    assert views.shape == (2, 2, 3, 8, 8)
    assert views[:, :, 2, 0, 0].tolist() == [[0, 2], [4, 4]]
    assert views[0, 0, 1, 0].tolist() == list(range(8))
    assert views[1, 0, 1, 0].tolist() == list(range(4, 12))


def test_device_transform_normalises_and_swaps_time_and_colour_once():
    transform = DeviceTransform([0.1, 0.2, 0.3], [0.5, 0.25, 1.0]).eval()
    video = torch.randint(0, 256, (2, 3, 4, 3, 5, 6), dtype=torch.uint8)
    out = transform({"video": video})["video"]
    assert out.shape == (2, 3, 3, 4, 5, 6)
    expected = (video[1, 2, 3, 1].float() / 255 - 0.2) / 0.25
    torch.testing.assert_close(out[1, 2, 1, 3], expected)


def test_colours_change_in_training_alone_and_alike_over_a_clip():
    video = (torch.rand(4, 1, 1, 3, 5, 5) * 255).to(torch.uint8).expand(4, 1, 6, 3, 5, 5)
    factors = torch.tensor([1.2, 0.8, 1.3]).view(3, 1, 1).expand(3, 4, 1)
    out = jitter_colors(video.transpose(2, 3).float(), factors, mean_grey(video))
    assert out.min() >= 0 and out.max() <= 255
    torch.testing.assert_close(out[:, :, :, :1].expand_as(out), out)
    same = jitter_colors(video.transpose(2, 3).float(), torch.ones(3, 4, 1), mean_grey(video))
    torch.testing.assert_close(same, video.transpose(2, 3).float())
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 1, 1, 3, 1, 1)
    grey = (video.float() * luma).sum(3).mean((2, 3, 4))
    torch.testing.assert_close(mean_grey(video), grey)
    transform = DeviceTransform([0] * 3, [1] * 3, augment=Augment(color=0.4))
    plain = transform.eval()({"video": video})["video"]
    torch.testing.assert_close(plain.transpose(2, 3), video.float() / 255)
    drawn = transform.train()({"video": video, "seed": 3})["video"]
    assert not torch.allclose(drawn, plain)
    assert torch.equal(drawn, transform({"video": video, "seed": 3})["video"])
    assert not torch.equal(drawn, transform({"video": video, "seed": 4})["video"])
