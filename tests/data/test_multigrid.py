"""The shapes of multigrid training: the paper's table, PySlowFast's epochs, each row once, the same stretch."""

import math

import numpy as np
import pytest
from make_video import read_numbers, write_video
from torch import nn

from vidtrain.data.collate import collate
from vidtrain.data.dataset import Files, VideoDataset
from vidtrain.data.loader import Loader
from vidtrain.data.multigrid import Multigrid, Pace, Shape, refuse_shapes
from vidtrain.data.order import TrainingOrder
from vidtrain.data.transforms.sample import Augment
from vidtrain.types import Clip, UserError

LONG = [[0.25, 0.7071], [0.5, 0.7071], [0.5, 1], [1, 1]]
SHORT = [0.5, 0.7071, 1]
STAGES = [94 / 239, 154 / 239, 196 / 239]  # PySlowFast, SLOWFAST_8x8_R50_stepwise


def clip(frames: int = 32, stride: int = 2, size: int = 224) -> Clip:
    return Clip(frames, stride, size, [0.5] * 3, [0.5] * 3)


def both(**settings) -> Multigrid:
    plan = {"long": LONG, "short": SHORT, "stages": STAGES, **settings}
    return Multigrid(
        plan.pop("clip", clip()), plan.pop("batch", 8), plan.pop("epochs", 358), **plan
    )


def test_the_shapes_are_those_of_the_papers_table():
    plan = both()
    long = [section.grid.base for section in plan.sections[:4]]
    assert long == [(64, 8, 8, 158), (32, 16, 4, 158), (16, 16, 4, 224), (8, 32, 2, 224)]
    assert [section.grid.factor for section in plan.sections[:4]] == [8, 4, 2, 1]
    turns = [[(s.videos, s.size) for s in section.grid.turns] for section in plan.sections[:4]]
    assert turns == [
        [(128, 112), (64, 158), (64, 158)],  # crops never larger than the long cycle's
        [(64, 112), (32, 158), (32, 158)],
        [(64, 112), (32, 158), (16, 224)],
        [(32, 112), (16, 158), (8, 224)],
    ]
    alone = Multigrid(clip(), 8, None, short=SHORT)
    assert alone.cycle(0) == alone.cycle(6) == plan.cycle(357)
    assert alone.cycle(1) == [*alone.cycle(0)[1:], alone.cycle(0)[0]]
    assert [section.grid.turns for section in both(short=None).sections[:4]] == [(s,) for s in long]
    assert {s.size for s in both(multiple=32).shapes()} == {128, 160, 224}  # 112 lies in the middle


@pytest.mark.parametrize("frames", [2, 4, 8, 13, 16, 32, 50])
def test_all_shapes_cost_the_same(frames):
    plan = both(clip=clip(frames))
    for shape in plan.shapes():
        cost = shape.videos * shape.num_frames * shape.size**2 / (8 * frames * 224**2)
        assert 0.85 < cost < 1.15, shape
        assert abs(shape.num_frames * shape.stride - frames * 2) <= shape.num_frames


def test_the_epochs_are_those_of_the_reference():
    """Worked out from PySlowFast's `get_long_cycle_schedule`, by hand.

    A long cycle's four shapes have 10.67, 5.33, 4.67 and 2.33 times the videos: 23 together. Stage one's 94
    epochs are divided up so; the last 43 of 239 count 2.33 / 23 * 4 for one. 1.5 * 239 epochs in all.
    """
    ends = [section.end for section in both().sections]
    epochs = [n * v / 23 for n in (94, 60, 42) for v in (32 / 3, 16 / 3, 14 / 3, 7 / 3)]
    epochs.append(43 * 4 * 7 / 3 / 23)
    by_hand = np.cumsum(epochs) / sum(epochs) * 358
    assert ends == by_hand.round().tolist()
    assert ends[:5] == [73, 110, 142, 158, 204] and ends[-2:] == [329, 358]


@pytest.mark.parametrize("epochs", [1, 2, 5, 20])
def test_a_short_run_ends_with_the_default_shape(epochs):
    plan = both(epochs=epochs)
    assert (8, 32, 2, 224) in plan.cycle(epochs - 1)
    assert [plan.section(epoch).first <= epoch for epoch in range(epochs)] == [True] * epochs
    assert plan.sections[-1].end == epochs


@pytest.mark.parametrize(
    ("rows", "world", "batch"), [(240, 1, 2), (1000, 3, 8), (3, 2, 4), (50, 1, 1), (17, 4, 1)]
)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_each_row_comes_once_an_epoch_in_batches_of_all_sizes(
    rows, world, batch, accumulate, drop_last
):
    plan = both(batch=batch, epochs=12, accumulate=accumulate)
    orders = [
        TrainingOrder(rows, batch, 0, rank, world, drop_last=drop_last, cycle=plan.cycle)
        for rank in range(world)
    ]
    for epoch in range(12):
        for order in orders:
            order.set_epoch(epoch)
        ranks = [list(order) for order in orders]
        assert {len(batches) for batches in ranks} == {len(orders[0])}
        cycle = plan.cycle(epoch)
        for number, together in enumerate(zip(*ranks, strict=True)):
            (shape,) = {shape for keys in together for *_, shape in keys}
            assert shape == cycle[number % len(cycle)]
            assert shape == cycle[number % len(cycle) // accumulate * accumulate]
            sizes = {len(keys) for keys in together}
            assert max(sizes) <= shape.videos and max(sizes) - min(sizes) <= 1
            if drop_last and len(ranks[0]) > 1:
                assert sizes == {shape.videos}
        seen = [row for batches in ranks for keys in batches for row, *_ in keys]
        assert len(seen) == len(set(seen))
        if not drop_last:
            assert len(seen) >= rows - (world if batch == 1 else 0)
            assert world > 1 or len(seen) == rows


def test_a_stopped_epoch_goes_on_with_the_shapes_that_were_left():
    plan = both(batch=2)
    order = TrainingOrder(300, 2, 0, 0, 1, cycle=plan.cycle)
    order.set_epoch(120)
    whole = list(order)
    order.start = 4
    assert list(order) == whole[4:] and len(order) == len(whole)


def test_the_rate_follows_the_batch_and_milestones_fall_on_the_changes():
    plan = both(epochs=40)
    order = TrainingOrder(5000, 8, 0, 0, 1, cycle=plan.cycle)

    def batches(epoch: int) -> int:
        order.set_epoch(epoch)
        return len(order)

    pace = Pace(plan, batches)
    assert pace.total == sum(map(batches, range(40)))
    step = 0
    for section in plan.sections:
        for epoch in range(section.first, section.end):
            done, factor = pace(step)
            assert factor == section.grid.factor
            if epoch == section.first:
                assert done == pytest.approx(section.begins)
            step += batches(epoch)
            assert pace(step - 1)[1] == factor and pace(step - 1)[0] < section.ends
    assert pace(step) == (1.0, 1.0)
    # shares of steps, not of epochs
    assert np.abs(np.array([pace(s)[0] for s in range(step)]) - np.arange(step) / step).max() < 0.03
    assert Pace(plan, batches, "sqrt")(0)[1] == math.sqrt(8)
    counts = plan.steps(batches)
    assert sum(count for _, count in counts) == step
    first = {epoch: batches(epoch) for epoch in range(40) if plan.section(epoch).grid.factor == 8}
    every = sum(len(range(-epoch % 3, count, 3)) for epoch, count in first.items())
    assert counts[0] == (Shape(128, 8, 8, 112), every)


def test_norms_split_the_long_cycles_batch():
    plan = both()
    assert [plan.splits(epoch, 1) for epoch in (0, 80, 120, 150, 357)] == [8, 4, 2, 1, 1]
    assert plan.splits(0, 2) == 16 and plan.splits(None, 1) == 1
    assert both(norm_clips=None).splits(0, 1) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_frames_of_all_shapes_span_the_same_stretch(tmp_path, workers):
    path = write_video(
        tmp_path / "a.mp4", num_frames=64, size=(64, 48), pattern="flat", gop=12, b_frames=2
    )
    plan = both(clip=clip(16, 4, 32), batch=1, epochs=24)
    dataset = VideoDataset(Files([path] * 40), clip(16, 4, 32), augment=Augment(), on_error="raise")
    order = TrainingOrder(40, 1, 0, 0, 1, cycle=plan.cycle)
    loader = Loader(dataset, order, collate, workers=workers)
    seen = set()
    try:
        for epoch in {section.first for section in plan.sections}:
            order.set_epoch(epoch)
            cycle = plan.cycle(epoch)
            for number, batch in enumerate(loader):
                shape = cycle[number % len(cycle)]
                video = batch["video"]
                assert video.shape[1:] == (1, shape.num_frames, 3, shape.size, shape.size)
                for views in video[:, 0]:
                    # 64 frames hold just one clip of 16 frames, 4 apart: its last is at most 60 to 63
                    numbers = np.array(read_numbers(views, "flat"))
                    assert set(np.diff(numbers)) == {64 // shape.num_frames}
                    assert numbers[0] < 64 // shape.num_frames
                seen.add(shape)
    finally:
        loader.close()
    assert seen == set(plan.shapes())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"long": [[0.25]]}, "two shares"),
        ({"long": [[2, 1]]}, "above 0, at most 1"),
        ({"short": []}, "takes shares"),
        ({"stages": [0.5, 0.4]}, "above the one before"),
        ({"stages": [0.5, 1.0]}, "the last below 1"),
        ({"stages": []}, "takes shares"),
        ({"multiple": 0}, "whole number, at least 1"),
        ({"norm_clips": -1}, "multigrid.norm_clips is -1"),
        ({"epochs": None}, "set trainer.max_epochs"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        both(**settings)


def test_a_network_of_one_shape_is_refused():
    class Fixed(nn.Module):
        inputs = ("video",)

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 4 * 16 * 16, 2)

        def forward(self, video):
            return self.fc(video.flatten(1))

    plan = both(clip=clip(4, 1, 16), epochs=10)
    with pytest.raises(UserError, match="Fixed does not take clips of 1 x 8² frames"):
        refuse_shapes(Fixed(), plan)
    refuse_shapes(Fixed(), Multigrid(clip(4, 1, 16), 2, None))
