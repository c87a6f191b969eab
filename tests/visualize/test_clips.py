from __future__ import annotations

import io

import av
import numpy as np
import pytest
import torch
from PIL import Image, features

from vidtrain.visualize.clips import animation, contact_sheet, stills, write_mp4

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def flat(colours, height=112, width=112):
    """One frame of each colour."""
    pixels = torch.tensor(colours, dtype=torch.uint8).view(-1, 3, 1, 1)
    return pixels.expand(-1, 3, height, width)


def boxes(sheet, colour):
    """Count the connected rectangles of a colour, and give the size of the first."""
    mask = (np.array(sheet) == np.array(colour)).all(-1)
    starts = mask & ~np.pad(mask, ((1, 0), (0, 0)))[:-1] & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    rows, columns = np.nonzero(starts)
    if not len(rows):
        return 0, None
    top, left = rows[0], columns[0]
    height = np.argmin(np.append(mask[top:, left], False))
    width = np.argmin(np.append(mask[top, left:], False))
    return len(rows), (int(width), int(height))


def test_a_sheet_shows_every_frame_in_its_own_pixels(tmp_path):
    clips = [flat([RED, GREEN, RED]), flat([BLUE] * 2, 120, 160)]
    contact_sheet(clips, ["first\nframes 0 2 4", "second"], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert boxes(sheet, RED) == (2, (112, 112))
        assert boxes(sheet, GREEN) == (1, (112, 112))
        assert boxes(sheet, BLUE) == (2, (160, 120))
        dark = np.array(sheet.convert("L")) < 100
        assert dark[:60].sum() > 100  # the caption is written


def test_a_long_clip_goes_on_in_the_next_line_and_the_sheet_keeps_its_width(tmp_path):
    clip = flat([RED] * 32)
    contact_sheet([clip], ["long"], tmp_path / "sheet.png", width=800)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert boxes(sheet, RED)[0] == 32
        assert sheet.width <= 800


def test_tiny_frames_are_enlarged_by_whole_pixels(tmp_path):
    clip = flat([RED, GREEN], 32, 40)
    clip = clip.clone()
    clip[0, :, 0, 0] = torch.tensor(BLUE, dtype=torch.uint8)
    contact_sheet([clip], ["tiny"], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert boxes(sheet, GREEN) == (1, (120, 96))
        assert boxes(sheet, BLUE) == (1, (3, 3))


def test_captions_of_any_length_fit(tmp_path):
    captions = ["a/very/long/path" * 40 + "\n" + "word " * 200, "", "中文 <b>"]
    contact_sheet([flat([RED])] * 3, captions, tmp_path / "sheet.png", width=400)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width <= 400 and boxes(sheet, RED)[0] == 3


def test_clips_and_captions_come_in_pairs(tmp_path):
    with pytest.raises(ValueError, match="2 clips and 1 captions"):
        contact_sheet([flat([RED])] * 2, ["one"], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"\(4, 112, 112\)"):
        contact_sheet([torch.zeros(4, 112, 112, dtype=torch.uint8)], ["x"], tmp_path / "sheet.png")


@pytest.mark.parametrize("webp", [True, False])
def test_an_animation_is_small_and_plays_at_its_rate(monkeypatch, webp):
    if webp and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    monkeypatch.setattr(features, "check", lambda name: webp)
    data = animation(flat([RED, GREEN, BLUE], 300, 400), fps=5, size=200)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == ("WEBP" if webp else "GIF")
        assert image.size == (200, 150) and image.n_frames == 3
        assert image.info.get("loop") == 0
        for i, colour in enumerate((RED, GREEN, BLUE)):
            image.seek(i)
            image.load()
            assert image.info["duration"] == 200
            assert np.abs(np.array(image.convert("RGB")).mean((0, 1)) - colour).max() < 12


def test_grey_frames_become_pictures():
    (image,) = stills(torch.full((1, 1, 10, 20), 77, dtype=torch.uint8), size=100)
    assert image.size == (20, 10) and image.getpixel((3, 3)) == (77, 77, 77)


@pytest.mark.parametrize(("height", "width"), [(64, 48), (63, 47), (1, 1)])
@pytest.mark.parametrize("fps", [8, 29.97])
def test_an_mp4_plays_what_was_written(tmp_path, height, width, fps):
    levels = [10, 60, 120, 180, 240]
    frames = torch.tensor(levels, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, height, width)
    write_mp4(frames, fps, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert (stream.height, stream.width) == (height + height % 2, width + width % 2)
        assert float(stream.average_rate) == pytest.approx(fps, abs=0.01)
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert [round(float(f.mean())) for f in found] == pytest.approx(levels, abs=3)
    head = (tmp_path / "clip.mp4").read_bytes()
    assert head.index(b"moov") < head.index(b"mdat")  # plays before it is loaded whole


def test_a_frame_in_colour_keeps_its_colour(tmp_path):
    write_mp4(flat([RED] * 3, 32, 32), 10, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(frame.mean((0, 1)) - RED).max() < 8
