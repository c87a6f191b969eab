"""What a masked autoencoder made of clips, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vidtrain.visualize.clips import GAP, INK, MARGIN, PAPER, font

ROWS = ("original", "seen", "predicted", "mean alone")
FRAMES = 8  # of a clip, spread over it
SIDE = 112  # pixels that a frame has at least
LABEL = 96  # pixels for the names of rows
LINE = 20  # pixels of a caption's line


class Block(NamedTuple):
    """A clip: `(3, T, H, W)` each, 0 to 1, in the order of `ROWS`."""

    caption: str
    clips: Sequence[Tensor]


def reconstruction_sheet(blocks: Sequence[Block], path: Path) -> None:
    """Write a PNG: of each clip a caption and four rows of frames, below one another.

    Rows are the clip; what the network saw of it; what it made of the rest, in the mean and contrast
    that each hidden box had; and that mean alone. What the third row has over the fourth is the network's own.

    Args:
        blocks: One for each clip, all of one size.
        path: Of the PNG.
    """
    images = [[_row(clip) for clip in block.clips] for block in blocks]
    height = LINE + sum(row.height + GAP for row in images[0])
    width = LABEL + images[0][0].width
    sheet = Image.new("RGB", (width + 2 * MARGIN, len(blocks) * (height + MARGIN) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for block, rows in zip(blocks, images, strict=True):
        draw.text((MARGIN, top), block.caption, INK, font(14))
        y = top + LINE
        for name, row in zip(ROWS, rows, strict=True):
            draw.text((MARGIN, y + row.height // 2 - 8), name, INK, font(12))
            sheet.paste(row, (MARGIN + LABEL, y))
            y += row.height + GAP
        top += height + MARGIN
    sheet.save(path)


def _row(clip: Tensor) -> Image.Image:
    """Put frames side by side; small ones are enlarged by a whole factor, without smoothing."""
    count = clip.shape[1]
    chosen = torch.linspace(0, count - 1, min(count, FRAMES)).round().long()
    frames = (clip[:, chosen] * 255).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    height, width = frames.shape[1:3]
    factor = max(1, -(-SIDE // width))
    row = Image.new("RGB", ((width * factor + GAP) * len(frames) - GAP, height * factor), PAPER)
    for place, frame in enumerate(frames):
        image = Image.fromarray(frame)
        row.paste(
            image.resize((width * factor, height * factor), Image.Resampling.NEAREST),
            (place * (width * factor + GAP), 0),
        )
    return row
