"""Say in plain words why something cannot be opened as a video."""

from __future__ import annotations

import io
import os
import stat
import struct
from pathlib import Path
from typing import BinaryIO

from vidtrain.types import DecodeError

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# What libav may take a file for, by libav's names: what holds pictures or sound of its own, and
# nothing that makes it read other files (hls, concat, dash, image2 ...) or paint text (tty).
FORMATS = (
    *("mov", "matroska", "avi", "flv", "live_flv", "asf", "ogg", "rm", "wtv", "nut", "mxf", "gxf"),
    *("mpeg", "mpegts", "mpegvideo", "m4v", "h261", "h263", "h264", "hevc", "vvc", "av1", "obu"),
    *("ivf", "dv", "vc1", "vc1test", "dirac", "cavsvideo", "mjpeg", "mpjpeg", "yuv4mpegpipe"),
    *("gif", "apng", "nsv", "swf", "flic", "smk", "bink", "roq", "amv", "dhav", "nuv", "r3d"),
    *("jpeg_pipe", "png_pipe", "bmp_pipe", "webp_pipe", "tiff_pipe"),
    *("wav", "w64", "aiff", "au", "caf", "mp3", "aac", "ac3", "eac3", "dts", "flac", "ape", "wv"),
)
BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx"}


def is_folder(path: str) -> bool:
    """Tell a folder from a file, without opening what might hang.

    Raises:
        DecodeError: not found, no permission, empty, or no ordinary file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        link = Path(path).is_symlink()
        raise DecodeError(path, "a link to nothing" if link else "file not found") from None
    except PermissionError:
        raise DecodeError(path, "no permission to read it") from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a null character
        raise DecodeError(path, f"cannot be opened ({_words(error)})") from None
    if stat.S_ISDIR(status.st_mode):
        return True
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no ordinary file")
        raise DecodeError(path, f"{kind}, not a file")
    if status.st_size == 0:
        raise DecodeError(path, "empty file (0 bytes)")
    return False


def why_not_video(source: str | bytes, error: Exception) -> str:
    """Explain why libav could not open a source that is there and not empty."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            return _explain(file, error)
    except PermissionError:
        return "no permission to read it"
    except OSError as reading:
        return f"cannot be read ({_words(reading)})"


def _explain(file: BinaryIO, error: Exception) -> str:
    head = file.read(4096)
    if not head.strip(b"\0"):
        return "not a video: it begins with zeros only"
    if head[4:8] in BOXES:
        boxes, cut = _boxes(file)
        if b"moov" not in boxes and b"moof" not in boxes:
            return "cut off: the index (moov) that an mp4 file ends with is missing"
        return "cut off inside its index (moov)" if cut else "an mp4 file whose index is damaged"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as broken:  # it may only end within a character
        text = head[: broken.start].decode("utf-8") if broken.start > len(head) - 4 else "\0"
    if all(letter.isprintable() or letter in "\r\n\t\f\ufeff" for letter in text):
        return f"not a video but text: {' '.join(text[:40].split())!r}"
    return f"not a video, or damaged or cut off near its beginning ({_words(error)})"


def _boxes(file: BinaryIO) -> tuple[list[bytes], bool]:
    """Return the names of the outermost boxes, and whether the last goes beyond the end."""
    end = file.seek(0, io.SEEK_END)
    names: list[bytes] = []
    start = 0
    while start + 8 <= end and len(names) < 10_000:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        if size == 0:
            size = end - start
        if size < 8:
            break
        names.append(name)
        start += size
    return names, start > end


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
