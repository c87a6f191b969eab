"""Optical flow: what a field means, how it is written in bytes, and the methods that compute it.

A field says for each pixel of a frame where what is seen there has gone in another frame, in pixels:

    I_other(x + dx, y + dy) = I(x, y)

The other frame is the next one (forward) or the one before (backward). Displacements up to a bound of
20 pixels are kept as bytes, as Wang et al. 2016 (TSN) and Carreira & Zisserman 2017 (I3D) have it; 128
is no motion, exactly, and one step is bound / 127.5, so that rounding brings an error of 0.078 pixels at
most. What moves farther than the bound counts as moving so far.

The methods:

    tvl1        Zach et al. 2007, with OpenCV's parameters, as TSN and I3D take it; slow
    dis         Kroeger et al. 2016, medium preset; nearly as good, a hundredth of the time
    farneback   Farneback 2003; smooth fields
    raft        Teed & Deng 2020, of torchvision; a network, on a GPU where there is one
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vidtrain.types import UserError

if TYPE_CHECKING:
    import torch

METHODS = ("tvl1", "dis", "farneback", "raft")
DIRECTIONS = ("forward", "both")
BOUND = 20.0  # pixels
ZERO = 128  # the byte of no motion
STEPS = 127.5  # of a byte from no motion to the bound

LEAST_SIDE = 16  # pixels: DIS refuses smaller frames
FINE_BELOW = 160  # pixels of the shorter side up to which DIS goes down to single pixels
RAFT_SIDE = 128  # pixels: RAFT refuses smaller frames
RAFT_PAIRS = 8  # that go through it at once

Frames = npt.NDArray[np.uint8]  # (N, H, W, 3) RGB
Fields = npt.NDArray[np.float32]  # (M, H, W, 2), dx and dy in pixels
Estimator = Callable[[Frames, Sequence[tuple[int, int]]], Fields]


def to_bytes(fields: Fields, bound: float | Fields) -> npt.NDArray[np.uint8]:
    """Round displacements in pixels to bytes, 1 to 255; what is farther than the bound stops there."""
    codes = np.rint(fields * np.asarray(STEPS / bound, np.float32) + ZERO)
    return np.asarray(codes.clip(1, 255).astype(np.uint8))  # 0 would have no mirror image


def to_pixels(codes: npt.NDArray[np.uint8], bound: float) -> Fields:
    """Give the displacements that bytes stand for."""
    return np.asarray((codes.astype(np.float32) - ZERO) * np.float32(bound / STEPS))


def file_of(path: str, backward: bool = False) -> str:
    """Name the file of a video's stored flow, below the folder of flow, by the video's row."""
    return f"{'backward' if backward else 'forward'}/{path}.mp4"


def default_root(root: str | Path) -> Path:
    """Say where the flow of a dataset lies unless `data.flow_root` says: beside its folder."""
    return Path(root).with_name(f"{Path(root).name}-flow")


def check_method(method: str, key: str, weights: str | None = None) -> None:
    """Refuse a method that there is not, or that cannot work here.

    Args:
        method: one of METHODS.
        key: the setting that names it.
        weights: RAFT's file; None: where torchvision would have put it.

    Raises:
        UserError: a name that is none, a package or a file that is not there.
    """
    if method not in METHODS:
        raise UserError(f"{key} is {method!r}; it is one of {', '.join(METHODS)}")
    if method == "raft":
        raft_file(weights)
    else:
        _opencv(method)


def estimator(method: str, weights: str | None = None) -> Estimator:
    """Give what computes flow: called with frames and pairs of their places, (from, to), it gives fields.

    One of each is made a process. On a CPU each works with a single thread, since there are many
    processes.

    Raises:
        UserError: see `check_method`.
    """
    return _estimator(method, None if weights is None else str(weights))


@lru_cache(maxsize=4)
def _estimator(method: str, weights: str | None) -> Estimator:
    check_method(method, "the method of flow", weights)
    if method == "raft":
        return _Raft(raft_file(weights))
    return _OpenCV(method)


def _opencv(method: str) -> Any:
    """Import OpenCV.

    Raises:
        UserError: it is not there, or without what TV-L1 needs.
    """
    try:
        import cv2
    except ImportError:
        raise UserError(
            f"flow by {method} needs OpenCV, which is not installed; pip install vidtrain[flow]"
        ) from None
    if method == "tvl1" and not hasattr(cv2, "optflow"):
        raise UserError(
            "flow by tvl1 needs OpenCV with its contrib modules, and this one has none; pip install"
            " vidtrain[flow] in place of other opencv packages, or take dis"
        )
    # No threads: workers fill the cores, and a process that has had some must not be forked.
    cv2.setNumThreads(1)
    return cv2


class _OpenCV:
    """A method of OpenCV, on grey frames."""

    def __init__(self, method: str) -> None:
        self.cv2 = _opencv(method)
        self.between = getattr(self, f"_{method}")
        if method == "tvl1":
            self.method = self.cv2.optflow.DualTVL1OpticalFlow_create()
        elif method == "dis":
            self.method = self.cv2.DISOpticalFlow_create(self.cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, frames: Frames, pairs: Sequence[tuple[int, int]]) -> Fields:
        height, width = frames.shape[1:3]
        grey = {place: self._grey(frames[place]) for place in {p for pair in pairs for p in pair}}
        fields = np.empty((len(pairs), height, width, 2), np.float32)
        for field, (first, other) in zip(fields, pairs, strict=True):
            field[:] = self.between(grey[first], grey[other])[:height, :width]
        return np.nan_to_num(fields, copy=False)

    def _grey(self, frame: Frames) -> npt.NDArray[np.uint8]:
        grey = self.cv2.cvtColor(np.ascontiguousarray(frame), self.cv2.COLOR_RGB2GRAY)
        below, beside = (max(0, LEAST_SIDE - side) for side in grey.shape)
        return np.pad(grey, ((0, below), (0, beside)), mode="edge") if below or beside else grey

    def _tvl1(self, first: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> Any:
        return self.method.calc(first, other, None)

    def _dis(self, first: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> Any:
        # The preset stops at every second pixel. On a frame as small as a clip's that loses what
        # there is to see, and the last step costs little.
        self.method.setFinestScale(0 if min(first.shape) <= FINE_BELOW else 1)
        return self.method.calc(first, other, None)

    def _farneback(self, first: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> Any:
        return self.cv2.calcOpticalFlowFarneback(
            first, other, None, pyr_scale=0.5, levels=5, winsize=15, iterations=3, poly_n=5,
            poly_sigma=1.2, flags=0,
        )  # fmt: skip


class _Raft:
    """RAFT, large or small as its weights say."""

    def __init__(self, file: Path) -> None:
        import torch

        self.device = raft_device()
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file} holds no weights of RAFT ({said})") from None
        self.model = raft_network(state, str(file)).to(self.device).eval()

    def __call__(self, frames: Frames, pairs: Sequence[tuple[int, int]]) -> Fields:
        import torch
        import torch.nn.functional as F

        height, width = frames.shape[1:3]
        # It works on eighths of the frame: to the right and below, the last pixel is repeated.
        below, beside = (max(RAFT_SIDE, -(-side // 8) * 8) - side for side in (height, width))
        fields = np.empty((len(pairs), height, width, 2), np.float32)
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            for start in range(0, len(pairs), RAFT_PAIRS):
                some = np.array(pairs[start : start + RAFT_PAIRS])
                first, other = (
                    F.pad(
                        pixels[places].to(self.device).float() / 127.5 - 1,
                        (0, beside, 0, below),
                        mode="replicate",
                    )
                    for places in some.T.copy()
                )
                found = self.model(first, other)[-1]  # of 12 updates, the last; (n, 2, H, W)
                field = found[..., :height, :width].permute(0, 2, 3, 1)
                fields[start : start + RAFT_PAIRS] = field.float().cpu().numpy()
        return fields


def raft_network(state: dict[str, torch.Tensor], source: str) -> torch.nn.Module:
    """Build the RAFT that a state dict belongs to.

    Raises:
        UserError: it belongs to none of torchvision's.
    """
    from torchvision.models.optical_flow import raft_large, raft_small

    try:
        stem = state["feature_encoder.convnormrelu.0.weight"]
        build = raft_small if len(stem) == 32 else raft_large
        network: torch.nn.Module = build(weights=None)
        network.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, AttributeError):
        raise UserError(
            f"{source} holds no weights of torchvision's raft_large or raft_small"
        ) from None
    return network


def raft_device() -> torch.device:
    """Choose a GPU where there is one that this process may use: a fork of one that used it may not.

    Of several, processes are spread over all.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda._is_in_bad_fork():
        return torch.device("cpu")
    return torch.device("cuda", os.getpid() % torch.cuda.device_count())


def raft_file(weights: str | None) -> Path:
    """Find RAFT's weights.

    Args:
        weights: their file; None: where torchvision puts those of raft_large.

    Raises:
        UserError: they are not there; says what to download and where to put it.
    """
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"data.flow_weights={weights}: there is no such file")
        return path
    import torch
    from torchvision.models.optical_flow import Raft_Large_Weights

    url: str = Raft_Large_Weights.DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        raise UserError(
            f"flow by raft needs its weights: download {url} to {path}, or to any file that"
            " data.flow_weights names"
        )
    return path
