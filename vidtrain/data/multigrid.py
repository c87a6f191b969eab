"""Multigrid training: the shape of a step's batch as a pure function of epoch and step.

Wu et al. 2020, "A Multigrid Method for Efficiently Training Video Models", arXiv:1912.00998. Where clips
have fewer and smaller frames, a step takes as many more of them: B · T · H · W, its cost, stays. The long
cycle (section 3) goes through its shapes from coarse to fine, once in each stage of training; the short
cycle changes the size of the crops from step to step. How a stage is divided up is PySlowFast's: each shape
of the long cycle gets as many steps as the others. A shape lasts whole epochs here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from vidtrain.types import Clip, UserError


class Shape(NamedTuple):
    """What a step's batch is made of, on one device."""

    videos: int
    num_frames: int
    stride: int
    size: int  # pixels

    def of(self, clip: Clip) -> Clip:
        """Give the clip of this shape: the stretch of `clip`, at other distances."""
        return replace(clip, num_frames=self.num_frames, stride=self.stride, size=self.size)

    def __str__(self) -> str:
        return f"{self.videos} x {self.num_frames} x {self.size}²"


class Grid(NamedTuple):
    """One shape of the long cycle, and what the short one makes of it."""

    base: Shape
    turns: tuple[Shape, ...]  # in their order, a step each
    factor: int  # videos of the base shape, in those of the default

    @property
    def videos(self) -> float:
        """How many a step has, on average."""
        return sum(shape.videos for shape in self.turns) / len(self.turns)


class Section(NamedTuple):
    """Epochs of one grid."""

    grid: Grid
    first: int  # epoch
    end: int  # the epoch after the last
    begins: float  # share of all steps that come before
    ends: float


class Multigrid:
    """The grids of a run, and which epoch has which.

    Args:
        clip: the default shape, with ...
        batch_size: ... so many videos a device and step.
        epochs: of the run; None where nothing is counted in epochs, as with the short cycle alone.
        accumulate: batches of an optimizer step, which all have one shape.
        long: shares of `clip.num_frames` and of `clip.size`, coarse to fine; None: no long cycle.
        short: shares of `clip.size`; None: no short cycle.
        stages: shares of all steps at which a long cycle ends. What comes after the last one is trained
            at the default shape.
        multiple: crops have sides that are multiples of it, in pixels; the default shape stays.
        norm_clips: clips over which batch norm's statistics are taken at the long cycle's shape; those that
            the short cycle adds come on top, as in PySlowFast. None: all of a device's.

    Raises:
        UserError: a setting out of its range.
    """

    def __init__(
        self,
        clip: Clip,
        batch_size: int,
        epochs: int | None,
        *,
        accumulate: int = 1,
        long: Sequence[Sequence[float]] | None = None,
        short: Sequence[float] | None = None,
        stages: Sequence[float] = (),
        multiple: int = 2,
        norm_clips: int | None = 8,
    ) -> None:
        clips = 1 if norm_clips is None else norm_clips
        for key, number in (("multiple", multiple), ("norm_clips", clips)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise UserError(f"multigrid.{key} is {number!r}; it is a whole number, at least 1")
        _check_shares("short", short)
        if long is not None and (not isinstance(long, Sequence) or isinstance(long, str) or not long):
            raise UserError(f"multigrid.long is {long!r}; it is a list of pairs of shares, or null")
        for pair in long or ():
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise UserError(
                    f"multigrid.long has {pair!r}; each is two shares: of the frames, of the size"
                )
            _check_shares("long", pair)
        if long is not None:
            _check_shares("stages", stages)
            if list(stages) != sorted(set(stages)) or stages[-1] >= 1:
                raise UserError(
                    f"multigrid.stages is {list(stages)}; they are shares of training, each above"
                    " the one before, the last below 1"
                )
            if epochs is None or epochs < 1:
                raise UserError(
                    "multigrid's long cycle counts epochs: set trainer.max_epochs, and not max_steps"
                )
        self.clip, self.batch_size, self.accumulate = clip, batch_size, accumulate
        self.epochs = epochs
        self.multiple, self.norm_clips = multiple, norm_clips
        self.default = self._grid(1, 1, short)
        self.sections = [Section(self.default, 0, epochs or 1, 0.0, 1.0)]
        if long is not None:
            grids = [self._grid(*pair, short) for pair in long]
            self.sections = self._divide(grids, list(stages), epochs or 1)

    def _grid(self, frames: float, size: float, short: Sequence[float] | None) -> Grid:
        clip = self.clip
        count = max(1, round(clip.num_frames * frames))
        stride = max(1, round(clip.stride * clip.num_frames / count))
        base = self._side(size)
        factor = max(1, round(clip.num_frames * clip.size**2 / (count * base**2)))
        turns = []
        for share in short or (1,):
            side = min(base, self._side(share))
            videos = self.batch_size * factor * max(1, round((base / side) ** 2))
            turns.append(Shape(videos, count, stride, side))
        return Grid(Shape(self.batch_size * factor, count, stride, base), tuple(turns), factor)

    def _side(self, share: float) -> int:
        if share == 1:
            return self.clip.size
        return max(1, round(self.clip.size * share / self.multiple)) * self.multiple

    def _divide(self, grids: list[Grid], stages: list[float], epochs: int) -> list[Section]:
        """Divide the epochs up so that the steps come in the shares that are asked for."""
        edges = [0.0]
        for begins, ends in pairwise([0.0, *stages]):
            edges += [
                begins + (ends - begins) * n / len(grids) if n < len(grids) else ends
                for n in range(1, len(grids) + 1)
            ]
        edges.append(1.0)
        of = [*grids * len(stages), self.default]
        # An epoch has fewer steps, the more videos a step has.
        passes = [(b - a) * grid.videos for grid, (a, b) in zip(of, pairwise(edges), strict=True)]
        ends = np.rint(np.cumsum(passes) * (epochs / sum(passes))).astype(int)
        ends = [*ends[:-1].clip(max=epochs - 1).tolist(), epochs]  # the last shape is the default
        sections = [
            Section(grid, first, end, begins, finish)
            for grid, (first, end), (begins, finish) in zip(
                of, pairwise([0, *ends]), pairwise(edges), strict=True
            )
        ]
        return [section for section in sections if section.first < section.end]

    def section(self, epoch: int) -> Section:
        """Find where an epoch lies; after the last one it is the last."""
        found = (section for section in self.sections if epoch < section.end)
        return next(found, self.sections[-1])

    def turns(self, epoch: int) -> tuple[Shape, ...]:
        """Give the shapes of an epoch's steps, which come in this order again and again.

        Each epoch begins with another one: where there are few steps, all have their turn.
        """
        turns = self.section(epoch).grid.turns
        first = epoch % len(turns)
        return turns[first:] + turns[:first]

    def cycle(self, epoch: int) -> list[Shape]:
        """Give the shapes of an epoch's batches: those of a step are alike."""
        return [shape for shape in self.turns(epoch) for _ in range(self.accumulate)]

    def shapes(self) -> list[Shape]:
        """List all shapes of the run, in the order of their first use."""
        every = [shape for section in self.sections for shape in section.grid.turns]
        return list(dict.fromkeys(every))

    def splits(self, epoch: int | None, repeats: int) -> int:
        """Say in how many parts batch norm takes a batch; `epoch` None: one of the default shape."""
        if self.norm_clips is None:
            return 1
        grid = self.default if epoch is None else self.section(epoch).grid
        return max(1, grid.base.videos * repeats // self.norm_clips)

    def steps(self, batches: Callable[[int], int]) -> list[tuple[Shape, int]]:
        """Count the optimizer steps of each shape; `batches` says how many an epoch has."""
        counts = dict.fromkeys(self.shapes(), 0)
        for section in self.sections:
            for epoch in range(section.first, section.end):
                every = math.ceil(batches(epoch) / self.accumulate)
                turns = self.turns(epoch)
                for turn, shape in enumerate(turns):
                    counts[shape] += len(range(turn, every, len(turns)))
        return [(shape, count) for shape, count in counts.items() if count]


class Pace:
    """How far training is at a step, and what the rate is multiplied by there.

    `Pace(...)(step)` gives the share of training that is done, by which a schedule goes: shares of
    `multigrid.stages` fall on the very epochs at which shapes change; and the factor.

    Args:
        plan: with a number of epochs.
        batches: says how many an epoch has.
        rule: `linear` (section 3: the rate grows as the long cycle's batch) or `sqrt`.

    Attributes:
        total: optimizer steps of the run.
    """

    def __init__(
        self, plan: Multigrid, batches: Callable[[int], int], rule: str = "linear"
    ) -> None:
        steps, shares, self.factors = [0], [0.0], []
        for section in plan.sections:
            count = section.end - section.first
            length = section.ends - section.begins
            for epoch in range(section.first, section.end):
                steps.append(steps[-1] + math.ceil(batches(epoch) / plan.accumulate))
                done = (epoch + 1 - section.first) / count
                shares.append(section.begins + length * done if done < 1 else section.ends)
                factor = section.grid.factor
                self.factors.append(float(factor) if rule == "linear" else math.sqrt(factor))
        self.steps, self.shares = np.array(steps), np.array(shares)
        self.total = steps[-1]

    def __call__(self, step: int) -> tuple[float, float]:
        """Give the share of training that is done before a step, and the factor of its rate."""
        epoch = int(np.searchsorted(self.steps, step, "right")) - 1
        last = len(self.factors) - 1
        return float(np.interp(step, self.steps, self.shares)), self.factors[min(epoch, last)]


CHANNELS = {"video": 3, "flow": 2}


def refuse_shapes(network: nn.Module, plan: Multigrid) -> None:
    """Refuse a network that does not take clips of all shapes of a plan.

    It runs on the meta device, where nothing is computed.

    Raises:
        UserError: naming the shape.
    """
    for count, size in sorted({(shape.num_frames, shape.size) for shape in plan.shapes()}):
        try:
            run_on_meta(network, count, size)
        except Exception as error:
            why = next(iter(str(error).splitlines()), "").split(";")[0] or type(error).__name__
            raise UserError(
                f"multigrid: {type(network).__name__} does not take clips of {count} x {size}²"
                f" frames and pixels ({why}); use multigrid=short, another multigrid.multiple or a"
                " network that takes any shape"
            ) from None


def run_on_meta(network: nn.Module, num_frames: int, size: int) -> None:
    """Run a network on the meta device on two clips of a shape; its own state stays as it is."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    state = {name: tensor.detach().to("meta") for name, tensor in tensors}
    kinds: Any = network.inputs
    clips = [torch.empty(2, CHANNELS[k], num_frames, size, size, device="meta") for k in kinds]
    with torch.no_grad():
        functional_call(network, state, tuple(clips))


def _check_shares(key: str, values: Any) -> None:
    if values is None:
        return
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or any(
        isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1
        for value in values
    ):
        raise UserError(f"multigrid.{key} has {values!r}; it takes shares, above 0, at most 1")
