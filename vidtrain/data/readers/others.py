"""Read frames with decord or torchcodec, where they are known to show the right ones.

Both are wrong on some files and do not say so (`tests/data/test_decode.py` shows which). The packets
tell these files apart without decoding, so PyAV looks at them first, and such files are refused.
Damage inside a file, though, goes unnoticed: both hand out what the codec makes of it. Only PyAV
and `vidtrain data action=check` see that.
"""

from __future__ import annotations

import io
import operator
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from vidtrain.data.readers.index import NO_TIME
from vidtrain.data.readers.pieces import by_frames
from vidtrain.data.readers.pyav import PyAVReader
from vidtrain.types import DecodeError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vidtrain.data.readers.index import FrameIndex
    from vidtrain.data.readers.pieces import ChooseBox

CONTAINERS = {"mov", "matroska", "webm", "flv"}  # the others came out wrong with one or the other


class _Reader:
    """What the two have in common."""

    decoder: str

    def __init__(
        self, source: str | bytes, name: str | None = None, index: FrameIndex | None = None
    ) -> None:
        """Look at the packets, then open the file with the decoder asked for.

        Raises:
            DecodeError: no video can be read from it, or not rightly by this decoder.
            UserError: the decoder is not installed.
        """
        with PyAVReader(source, name, index) as exact:
            self.path, self.fps, self._count = exact.path, exact.fps, len(exact)
            trouble = self._trouble(exact.container, exact.index)
        if trouble:
            reason = f"{self.decoder} may show wrong frames of {trouble}; use data.decoder=pyav"
            raise DecodeError(self.path, reason)
        self._size: tuple[int, int] | None = None
        if isinstance(source, str):
            source = os.path.abspath(source)  # "concat:a.mp4" would be an address
        self._reader = self._call(self._open, source)
        if self._call(len, self._reader) != self._count:
            reason = f"{self.decoder} counts {len(self._reader)} frames where a player shows "
            raise DecodeError(self.path, f"{reason}{self._count}; use data.decoder=pyav")

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back the file."""
        self._reader = None

    @property
    def width(self) -> int:
        """Width in pixels, as shown."""
        return self._shown_size()[0]

    @property
    def height(self) -> int:
        """Height in pixels, as shown."""
        return self._shown_size()[1]

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Decode frames by number, in any order, repeats allowed; each is decoded once.

        Returns:
            `(N, C, H, W)` uint8 RGB, whose memory is `N H W C` (channels last).

        Raises:
            DecodeError: what the decoder said.
            IndexError: an index outside `0 <= i < len(self)`.
        """
        import torch

        indices = [operator.index(index) for index in indices]
        for index in indices:
            if not 0 <= index < self._count:
                raise IndexError(f"{self.path}: frame {index} asked of {self._count}")
        if not indices:
            return torch.empty((0, self.height, self.width, 3), dtype=torch.uint8).permute(
                0, 3, 1, 2
            )
        unique = sorted(set(indices))
        pictures = self._call(self._decode, unique)  # (U, H, W, C)
        if unique != indices:
            place = {index: row for row, index in enumerate(unique)}
            pictures = pictures[[place[index] for index in indices]]
        return pictures.permute(0, 3, 1, 2)

    def pieces(self, indices: Sequence[int], choose: ChooseBox | None = None) -> Iterator[Tensor]:
        """Hand frames over a piece at a time. See `vidtrain.types.VideoReader`."""
        return by_frames(self, indices, choose)

    def _shown_size(self) -> tuple[int, int]:
        if self._size is None:
            _, _, height, width = self.frames([0]).shape
            self._size = width, height
        return self._size

    def _trouble(self, container: str, index: FrameIndex) -> str | None:
        """Name what makes this decoder err, if the file has it."""
        if container.split(",")[0] not in CONTAINERS:
            return f"a file of this kind ({container.split(',')[0]})"
        if index.missing:
            return f"a damaged file ({index.missing})"
        if index.changes:
            return "a video whose size changes on the way"
        times = index.seek[index.order]
        # of flv the index knows only when packets are decoded
        if (times == NO_TIME).any() or (container != "flv" and (np.diff(times) <= 0).any()):
            return "a video whose timestamps are missing or do not rise"
        return None

    def _open(self, source: str | bytes) -> Any:
        raise NotImplementedError

    def _decode(self, indices: list[int]) -> Tensor:
        raise NotImplementedError

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError:
            raise
        except Exception as error:  # they raise what comes: RuntimeError, IndexError, their own
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            said = re.sub(r"^(\[[\d:]+\] \S+: |\w+, \S+:\d+, )+", "", said)[:200]  # whence in C++
            raise DecodeError(self.path, f"{self.decoder} cannot read it: {said}") from None


class DecordReader(_Reader):
    """A video read with decord. See `vidtrain.types.VideoReader`."""

    decoder = "decord"

    def _trouble(self, container: str, index: FrameIndex) -> str | None:
        if index.edited:
            return "a file with an edit list"
        if index.groups != "closed":
            return "a video without closed groups of pictures (open GOP or intra refresh)"
        return super()._trouble(container, index)

    def _open(self, source: str | bytes) -> Any:
        try:
            import decord
        except ImportError as error:
            raise UserError(
                f"data.decoder=decord: decord is not installed ({error}); "
                "`pip install decord` (Linux x86-64 only), or use data.decoder=auto"
            ) from None
        decord.logging.set_level(decord.logging.QUIET)
        return decord.VideoReader(
            io.BytesIO(source) if isinstance(source, bytes) else source, num_threads=1
        )

    def _decode(self, indices: list[int]) -> Tensor:
        import torch

        return torch.from_numpy(self._reader.get_batch(indices).asnumpy())


class TorchcodecReader(_Reader):
    """A video read with torchcodec. See `vidtrain.types.VideoReader`."""

    decoder = "torchcodec"

    def _trouble(self, container: str, index: FrameIndex) -> str | None:
        if index.groups == "refresh":
            return "a video with intra refresh"
        return super()._trouble(container, index)

    def _open(self, source: str | bytes) -> Any:
        try:
            from torchcodec.decoders import VideoDecoder

            return VideoDecoder(
                source, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
            )
        except (ImportError, RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and "Could not load libtorchcodec" not in str(error):
                raise
            raise UserError(
                "data.decoder=torchcodec: torchcodec cannot be loaded; "
                "`pip install vidtrain[torchcodec]` and install FFmpeg's shared libraries, "
                "or use data.decoder=auto"
            ) from None

    def _decode(self, indices: list[int]) -> Tensor:
        return self._reader.get_frames_at(indices).data
