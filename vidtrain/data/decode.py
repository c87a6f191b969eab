"""Open a video: from a path, from bytes or from a folder of pictures, with the decoder asked for."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vidtrain.data.readers.files import is_folder
from vidtrain.types import DecodeError, UserError

if TYPE_CHECKING:
    from vidtrain.data.readers.index import FrameIndex
    from vidtrain.types import VideoReader

DECODERS = ("auto", "pyav", "decord", "torchcodec")


def open_video(
    source: str | Path | bytes,
    decoder: str = "auto",
    *,
    name: str | None = None,
    fps: float = 30.0,
    index: FrameIndex | None = None,
) -> VideoReader:
    """Open a video for reading frames by number.

    The reader is a context manager; see `vidtrain.types.VideoReader` for what it does. Frames are
    numbered as a player shows them: after the edit list, in showing order, turned as the display
    matrix says.

    A damaged file can be opened as long as anything of it can be read; `len()` is then what its own
    index promises, and only frames that cannot be had raise. That a frame is damaged is known only
    to PyAV; decord and torchcodec hand out what the codec makes of it.

    Args:
        source: a file, a folder of pictures, or the bytes of a file.
        decoder: `auto`, `pyav`, `decord` or `torchcodec`; folders need none.
        name: what messages call it; the path, if left out.
        fps: frames per second of a folder of pictures, which does not say it itself.
        index: `reader.index` of an earlier PyAV reader of the same file, which saves reading all
            packets again.

    Raises:
        DecodeError: no video can be read from it, and why.
        UserError: a decoder that is not known or not installed.
    """
    check_decoder(decoder)
    if isinstance(source, bytes):
        if not source:
            raise DecodeError(name or "<bytes>", "empty file (0 bytes)")
    else:
        source = os.fspath(source)
        try:
            if is_folder(source):
                from vidtrain.data.readers.folder import FolderReader

                return FolderReader(source, name, fps)
        except DecodeError as error:
            raise DecodeError(name or source, error.reason) from None
    if decoder == "decord":
        from vidtrain.data.readers.others import DecordReader

        return DecordReader(source, name, index)
    if decoder == "torchcodec":
        from vidtrain.data.readers.others import TorchcodecReader

        return TorchcodecReader(source, name, index)
    # auto: of the three only PyAV gave the right frames of every file it was tried on, and with
    # the index and what need not be decoded left out it is the fastest as well
    from vidtrain.data.readers.pyav import PyAVReader

    return PyAVReader(source, name, index)


def check_decoder(decoder: str) -> None:
    """Refuse a decoder that there is not.

    Raises:
        UserError: naming the nearest one that there is.
    """
    if decoder not in DECODERS:
        near = difflib.get_close_matches(str(decoder), DECODERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(DECODERS)}"
        raise UserError(f"data.decoder={decoder}: no such decoder; {hint}")
