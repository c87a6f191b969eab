"""Clips as pictures: a contact sheet, a small animation, an mp4 file.

Every function takes frames as a worker has them: `(T, C, H, W)` uint8, C of 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

if TYPE_CHECKING:
    from torch import Tensor

MARGIN, GAP, ROW_GAP = 24, 4, 30  # pixels of the contact sheet
PAPER, INK, GREY = "#ffffff", "#1a1a1a", "#666666"


def contact_sheet(
    clips: Sequence[Tensor], captions: Sequence[str], path: Path, *, width: int = 1600
) -> None:
    """Write a PNG with one block per clip: its caption, then its frames from left to right.

    Frames keep their own pixels; only tiny ones are enlarged, by a whole factor and without
    smoothing, so that the sheet shows what the model gets. A clip too long for one line of frames
    goes on in the next.

    Args:
        clips: `(T, C, H, W)` uint8 each; sizes and lengths may differ.
        captions: one per clip. The first line is printed larger; further lines tell the rest.
        path: the PNG file to write.
        width: of the sheet, in pixels; wider only where a single frame is.

    Raises:
        ValueError: no clip, or not one caption for each.
    """
    if not clips or len(clips) != len(captions):
        raise ValueError(f"{len(clips)} clips and {len(captions)} captions: give one for each")
    frames = [_enlarged(clip) for clip in clips]
    inner = max(width - 2 * MARGIN, *(clip.shape[2] for clip in frames))
    blocks = [_block(clip, text, inner) for clip, text in zip(frames, captions, strict=True)]

    height = 2 * MARGIN + sum(block.height for block in blocks) + ROW_GAP * (len(blocks) - 1)
    sheet_width = 2 * MARGIN + max(block.width for block in blocks)
    sheet = Image.new("RGB", (sheet_width, height), PAPER)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + ROW_GAP
    sheet.save(path, format="PNG")


def animation(frames: Tensor, fps: float, *, size: int = 240, quality: int = 60) -> bytes:
    """Encode frames as an endless animated WebP no larger than `size` pixels on its longer side.

    `(T, C, H, W)` uint8. Where Pillow was built without WebP the bytes are those of a GIF.
    """
    images = stills(frames, size=size)
    webp = {"format": "WEBP", "quality": quality, "method": 4}
    options = webp if features.check("webp") else {"format": "GIF"}
    out = io.BytesIO()
    duration = max(20, round(1000 / fps))  # viewers slow down what claims to be faster
    images[0].save(
        out, save_all=True, append_images=images[1:], duration=duration, loop=0, **options
    )
    return out.getvalue()


def stills(frames: Tensor, *, size: int) -> list[Image.Image]:
    """Make a picture of each frame, none larger than `size` on its longer side.

    `(T, C, H, W)` uint8, T at least 1.
    """
    images = [Image.fromarray(frame) for frame in _rgb(frames)]
    for image in images:
        image.thumbnail((size, size), Image.Resampling.BILINEAR)  # never enlarges
    return images


def write_mp4(frames: Tensor, fps: float, path: Path) -> None:
    """Write H.264 that every browser plays: yuv420p, index at the front.

    4:2:0 colour needs even sizes: an odd edge is doubled, never cut.

    Args:
        frames: `(T, C, H, W)` uint8, T at least 1.
        fps: frames per second.
        path: the file to write, whatever its name ends in.
    """
    import av

    pixels = _rgb(frames)
    odd_height, odd_width = pixels.shape[1] % 2, pixels.shape[2] % 2
    pixels = np.pad(pixels, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "fast"})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _rgb(frames: Tensor) -> np.ndarray:
    """(T, C, H, W) uint8 -> (T, H, W, 3) uint8."""
    if frames.ndim != 4 or frames.shape[0] < 1 or frames.shape[1] not in (1, 3):
        raise ValueError(f"frames of shape {tuple(frames.shape)}; expected (T, C, H, W), C 1 or 3")
    pixels = frames.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    return np.ascontiguousarray(pixels.cpu().numpy())


def _enlarged(clip: Tensor, at_least: int = 96) -> np.ndarray:
    """(T, C, H, W) uint8 -> (T, s·H, s·W, 3) uint8, s a whole number."""
    pixels = _rgb(clip)
    scale = max(1, round(at_least / min(pixels.shape[1:3])))
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def _block(frames: np.ndarray, caption: str, width: int) -> Image.Image:
    """(T, H, W, 3) -> a picture `width` wide at most: caption, then lines of frames."""
    _, height, frame_width, _ = frames.shape
    per_line = max(1, (width + GAP) // (frame_width + GAP))
    lines = -(-len(frames) // per_line)
    per_line = -(-len(frames) // lines)  # lines of equal length

    first, *rest = caption.split("\n") or [""]
    text = [(line, 18, INK) for line in _wrapped(first, 18, width)]
    text += [(line, 15, GREY) for part in rest for line in _wrapped(part, 15, width)]
    text_height = sum(size + 7 for _, size, _ in text) + 4
    text_width = max(int(font(size).getlength(line)) + 1 for line, size, _ in text)

    across = per_line * (frame_width + GAP) - GAP
    block = Image.new(
        "RGB", (max(across, text_width), text_height + lines * (height + GAP) - GAP), PAPER
    )
    draw = ImageDraw.Draw(block)
    top = 0
    for line, size, colour in text:
        draw.text((0, top), line, fill=colour, font=font(size))
        top += size + 7
    for i, frame in enumerate(frames):
        line, column = divmod(i, per_line)
        at = (column * (frame_width + GAP), text_height + line * (height + GAP))
        block.paste(Image.fromarray(frame), at)
    return block


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Break a line of text at spaces, and a word longer than the line wherever it must."""
    face, lines, line = font(size), [], ""
    for word in text.split():
        if line and face.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
        while face.getlength(line) > width and len(line) > 1:
            guess = int(len(line) * width / face.getlength(line)) + 8
            fits = min(guess, len(line) - 1)
            while fits > 1 and face.getlength(line[:fits]) > width:
                fits -= 1
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line]


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Take the face that Pillow brings: no font need be installed."""
    return ImageFont.load_default(size=size)
