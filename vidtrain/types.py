"""The words that the rest of vidtrain is written in.

Axis letters, used in every docstring and comment:

    B batch         V views (clips x crops)    C channels      T frames
    H W pixels      K classes                  D width         N tokens
    t h w           T H W after the network's strides

Before the device transform a video is `(B, V, T, C, H, W)` uint8; after it `(B, V, C, T, H, W)` float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


Box = tuple[int, int, int, int]  # top, left, height, width in pixels


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2.

    The message says which file or key, what is wrong, and what to do.
    """


class DecodeError(Exception):
    """A video that cannot be read, or not the frames that were asked of it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both, so that it survives the trip out of a worker
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        """Name the file, then the reason."""
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Clip:
    """What a model eats: the one wire from model to data.

    `num_frames` frames, `stride` apart, cropped to `size` x `size` pixels, then
    `(x / 255 - mean) / std`. With `fps`, a video of another rate is first seen as one of `fps`
    frames per second and the stride is counted there; without, in the video's own frames.
    """

    num_frames: int
    stride: int
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    fps: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no sampler could use."""
        for name in ("num_frames", "stride", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"clip.{name} is {getattr(self, name)}; it must be at least 1")
        if self.fps is not None and self.fps <= 0:
            raise UserError(
                f"clip.fps is {self.fps}; it must be above 0, or null for the video's own rate"
            )
        check_colours("clip.mean", self.mean)
        check_colours("clip.std", self.std)


def check_colours(key: str, values: object) -> None:
    """Refuse what is not a number for each of R, G and B."""
    numbers = values if isinstance(values, list | tuple) else ()
    if len(numbers) != 3 or not all(isinstance(value, int | float) for value in numbers):
        raise UserError(f"{key} is {values!r}; it takes three numbers, for R, G and B")


class Failure(NamedTuple):
    """One row whose video could not be read."""

    row: int  # of the split
    path: str
    reason: str


class Sample(TypedDict, total=False):
    """One video with all its views, as a worker hands it over."""

    video: Tensor  # (V, T, C, H, W) uint8, ready crops (training)
    flow: Tensor  # (V, T, 2, H, W) uint8, the field of each frame, see data/flow.py (training)
    frames: Tensor  # (N, C, H, W) uint8, each wanted frame once (testing; or data/spill.py) ...
    view_frames: Tensor  # (V, T) int64, which of them make a view ...
    fields: Tensor  # (M, 2, H, W) uint8, each wanted field once, of the frames' size (testing) ...
    view_fields: Tensor  # (V, T) int64, which of them make a view ...
    view_crops: np.ndarray  # (V, 3) int64, and where it lies in them: top, left, size
    flow_steps: Tensor  # (V, T, 2) float32, what a byte's step of dx and dy is worth, in bounds
    features: Tensor  # (V, D, T) float32, where these are what is known of a video
    label: Tensor  # () int64, -1 where unknown, or (K,) float32 of zeros and ones
    index: int  # the row of the split
    seed: int  # of this sample's random draws
    fps: float  # frames per second as the model sees them
    extent: tuple[int, float]  # of windows over the whole video: its frames, and its own rate
    failures: list[Failure]  # rows that this sample stands in for, or itself


class Batch(TypedDict, total=False):
    """What the model's task sees, after the device transform."""

    video: Tensor | Views  # (B, V, C, T, H, W) float
    flow: Tensor | Views  # (B, V, 2, T, H, W) float, pixels / data.flow_bound, within -1 and 1
    features: Tensor  # (B, V, D, T) float
    label: Tensor  # (B,) int64, or (B, K) float32
    index: Tensor  # (B,) int64
    failures: list[Failure]


@runtime_checkable
class Views(Protocol):
    """Views that are made when they are asked for, since all together they are too many."""

    shape: torch.Size  # (B, V, C, T, H, W)

    def pieces(self, size: int | None) -> Iterator[Tensor]:
        """Yield the views of one video after another, `size` at a time: `(n, C, T, H, W)` float."""
        ...


@runtime_checkable
class VideoReader(Protocol):
    """An open video. Every decoder of `vidtrain.data.decode` answers to it."""

    path: str  # for messages
    fps: float  # average rate, frames per second

    @property
    def width(self) -> int:
        """Pixels as shown: after rotation."""
        ...

    @property
    def height(self) -> int:
        """Pixels as shown: after rotation."""
        ...

    def __enter__(self) -> VideoReader: ...
    def __exit__(self, *error: object) -> None: ...

    def __len__(self) -> int:
        """Count the frames that a player would show."""
        ...

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Decode frames by number, in any order, repeats allowed.

        Returns:
            `(N, C, H, W)` uint8 RGB, whose memory is `N H W C` (channels last).

        Raises:
            DecodeError: naming the file and what is wrong with it.
            IndexError: an index outside `0 <= i < len(self)`.
        """
        ...

    def pieces(
        self, indices: Sequence[int], choose: Callable[[int, int], Box] | None = None
    ) -> Iterator[Tensor]:
        """Decode frames in one pass and hand them over a piece at a time.

        Args:
            indices: ascending, each once.
            choose: told height and width, it says which part of the frames is wanted: top, left,
                height, width. A reader need not convert the rest.

        Yields:
            `(n, C, h, w)` uint8 RGB with C innermost in memory, as many frames as fit in 4 MiB.
        """
        ...

    def close(self) -> None:
        """Give back the file."""
        ...


@runtime_checkable
class VideoModel(Protocol):
    """What every architecture is to the rest of the house.

    Inputs by their key:

        video      (B, 3, T, H, W) normalised
        flow       (B, 2, T, H, W) from -1 to 1, displacements dx and dy over 20 pixels: field t leads
                   from frame t of the clip to the frame that follows it in the video
        features   (B, D, T)

    A network may answer S times (the steps of an LSTM, the levels of a pyramid, two streams): its
    logits are then `(B, S, K)`. Each answer is compared with the label, and a video's score is the
    mean of theirs, or what the network's own `fuse` makes of them, where it has this method:

        fuse(scores (N, S, K)) -> (N, K)    after the mean over views
    """

    inputs: tuple[str, ...]  # batch keys, in the order of `forward`: ("video",)
    num_features: int  # D of `forward_features`

    def __call__(self, *inputs: Any) -> Tensor:
        """Inputs -> `(B, K)` or `(B, S, K)` logits; `(B, D)` after `reset_classifier(0)`."""
        ...

    def forward_features(self, *inputs: Any) -> Tensor:
        """Inputs -> `(B, D, t, h, w)`."""
        ...

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier; 0 takes it away."""
        ...
