"""Write small videos whose every frame carries its own number, and read the numbers back.

A test then says *which* frames came out of a decoder, a sampler or a dataset, not merely how many:

    path = write_video(tmp_path / "a.mp4", num_frames=40, gop=12, b_frames=2)
    with open_video(path) as reader:
        assert read_numbers(reader.frames([7, 3])) == [7, 3]

Two pictures of a number:

- `blocks` (default): a grid of 4 x 4 black and white blocks, 12 bits of the number and 4 of checksum.
  Survives every codec and any resizing of the whole frame. Turned, mirrored, half-decoded or
  mixed frames read as -1 or as another number, so orientation and damage show.
- `flat`: the frame is one colour, the number in base 8 over red, green and blue (0 to 511).
  Survives crops and flips as well: for tests of datasets and augmentation.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder writes a page to stderr otherwise

GRID = 4
FLAT_STEP = 36  # 7 * 36 = 252: eight levels, as far apart as a byte allows


def _checksum(number: int) -> int:
    return (number ^ number >> 4 ^ number >> 8 ^ 0b0101) & 0xF  # number 0 is not all black


def draw_number(number: int, size: tuple[int, int], pattern: str = "blocks") -> np.ndarray:
    """Return the (H, W, 3) uint8 picture of a number; `size` is (width, height)."""
    width, height = size
    if pattern == "flat":
        assert 0 <= number < 512, number
        levels = [number >> 6, number >> 3 & 7, number & 7]
        return np.full((height, width, 3), np.array(levels, np.uint8) * FLAT_STEP, np.uint8)
    assert 0 <= number < 4096, number
    bits = number << 4 | _checksum(number)
    rows = np.arange(height) * GRID // height
    columns = np.arange(width) * GRID // width
    on = bits >> (rows[:, None] * GRID + columns[None, :]) & 1
    return np.repeat(np.where(on, 230, 25).astype(np.uint8)[:, :, None], 3, axis=2)


def read_numbers(frames: Tensor, pattern: str = "blocks") -> list[int]:
    """Read the number of each frame; -1 where there is none to be read.

    Args:
        frames: `(N, C, H, W)` uint8 RGB, any size of at least 16 x 16.
        pattern: what `write_video` drew: `blocks` (whole frames) or `flat` (crops too).
    """
    pixels = frames.permute(0, 2, 3, 1).numpy().astype(np.float32)  # (N, H, W, C)
    if pattern == "flat":
        levels = np.rint(pixels.mean(axis=(1, 2)) / FLAT_STEP).astype(int)
        return [int(r << 6 | g << 3 | b) for r, g, b in levels]
    _, height, width, _ = pixels.shape
    numbers = []
    for picture in pixels.mean(axis=-1):
        bits = 0
        for block in range(GRID * GRID):
            row, column = divmod(block, GRID)
            # the middle half of the block: its borders are blurred by codecs and resizing
            top, left = (row + 0.25) * height / GRID, (column + 0.25) * width / GRID
            bottom, right = top + height / (2 * GRID), left + width / (2 * GRID)
            middle = picture[int(top) : int(bottom) + 1, int(left) : int(right) + 1].mean()
            if 85 < middle < 170:
                bits = -1
                break
            bits |= int(middle > 127) << block
        number = bits >> 4
        numbers.append(number if bits >= 0 and bits & 0xF == _checksum(number) else -1)
    return numbers


def write_video(
    path: str | Path,
    num_frames: int = 32,
    fps: float | Fraction = 24,
    size: tuple[int, int] = (128, 96),
    *,
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 2,
    open_gop: bool = False,
    pts: Sequence[int] | None = None,
    rotation: int = 0,
    audio: bool = False,
    edit: tuple[int, int] | None = None,
    pix_fmt: str | None = None,
    numbers: Sequence[int] | None = None,
    pattern: str = "blocks",
    faststart: bool = False,
    movflags: str = "",
    codec_options: dict[str, str] | None = None,
) -> Path:
    """Write a video whose frame i carries the number i; the name's ending chooses the container.

    Args:
        path: where to; .mp4, .mkv, .avi, .webm, .ts, .gif ...
        num_frames: how many frames the file holds.
        fps: frames per second, as a number or a fraction.
        size: (width, height) as *shown*; odd sizes need `pix_fmt="yuv444p"`.
        codec: libx264, libx265, mpeg4, mpeg2video, libvpx-vp9, libsvtav1, mjpeg, gif ...
        gop: frames from one keyframe to the next.
        b_frames: bidirectional frames between two others (libx264, libx265, mpeg4, mpeg2video).
        open_gop: let frames before a keyframe look behind it (libx264, libx265).
        pts: the times of the frames in milliseconds, rising: variable rate, or a late start.
        rotation: 0, 90, 180 or 270 degrees clockwise that a player must turn the stored frames
            (mp4 and mov). They are stored turned back, so that shown right they read right.
        audio: add a sound track (AAC; MP3 in AVI), as long as the video.
        edit: (first, count): an edit list shows only these frames of those stored (mp4 and mov).
        pix_fmt: the stored pixel format; by default what the codec usually takes.
        numbers: what the frames carry instead of 0, 1, 2 ...
        pattern: `blocks` or `flat`, see the top of this file.
        faststart: the index before the data (mp4 and mov).
        movflags: further flags of the writer of mp4 and mov, such as "+frag_keyframe".
        codec_options: further options of the encoder.

    Returns:
        The path.
    """
    path = Path(path)
    numbers = range(num_frames) if numbers is None else numbers
    rate = Fraction(fps).limit_denominator(1001)
    options = _encoder_options(codec, gop, b_frames, open_gop) | (codec_options or {})
    width, height = size if rotation % 180 == 0 else size[::-1]
    if faststart and path.suffix != ".avi":
        movflags += "+faststart"
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = pix_fmt or {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if codec in ("mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = b_frames
            stream.codec_context.bit_rate = 4_000_000
        time_base = Fraction(1, 1000) if pts is not None else 1 / rate
        stream.codec_context.time_base = time_base
        sound = None
        if audio:
            sound = container.add_stream("mp3" if path.suffix == ".avi" else "aac", rate=16000)
            sound.codec_context.layout = "mono"
        for index in range(num_frames):
            picture = np.rot90(draw_number(numbers[index], size, pattern), rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.time_base = time_base
            frame.pts = index if pts is None else pts[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_tone(container, sound, seconds=float(num_frames / rate))
    if rotation:
        _patch_rotation(path, rotation)
    if edit is not None:
        _patch_edit_list(path, *edit, rate)
    return path


def write_audio(path: str | Path, seconds: float = 1.0) -> Path:
    """Write a file with a sound track and no picture."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        sound.codec_context.layout = "mono"
        _write_tone(container, sound, seconds)
    return Path(path)


def write_resizing_video(
    path: str | Path, sizes: Sequence[tuple[int, int]], frames_each: int = 12, fps: int = 24
) -> Path:
    """Write H.264 whose size changes on the way: `frames_each` frames of each size, numbered on."""
    with av.open(str(path), "w") as container:
        stream = None
        for part, size in enumerate(sizes):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, fps), Fraction(fps)
            # each keyframe brings its own headers, for they are not those of the container
            encoder.options = {
                "x264-params": "keyint=12:scenecut=0:bframes=0:repeat-headers=1:threads=1"
            }
            if stream is None:
                stream = container.add_stream("libx264", rate=fps)
                stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            packets = []
            for index in range(part * frames_each, (part + 1) * frames_each):
                picture = av.VideoFrame.from_ndarray(draw_number(index, size), format="rgb24")
                picture.pts, picture.time_base = index, Fraction(1, fps)
                packets += encoder.encode(picture)
            for packet in packets + encoder.encode():
                packet.stream = stream
                packet.time_base = Fraction(1, fps)
                container.mux(packet)
    return Path(path)


def write_packed_avi(path: str | Path, num_frames: int = 32, b_frames: int = 2) -> Path:
    """Write MPEG-4 in AVI with "packed" B frames, as DivX did and as UCF-101 is.

    The first of a run of B frames travels in the packet of the frame that they all look ahead to;
    the place it leaves at the end of the run is filled with a frame that is marked as not coded.
    """
    path = Path(path)
    plain = write_video(
        path.with_suffix(".plain.avi"), num_frames, codec="mpeg4", b_frames=b_frames
    )
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        pictures = [bytes(packet) for packet in source.demux(stream) if packet.size]
        kinds = ["IPBS"[data[data.index(b"\0\0\1\xb6") + 4] >> 6] for data in pictures]
        start = pictures[0].index(b"\0\0\1\xb6")
        pictures[0] = (
            pictures[0][:start] + b"\0\0\1\xb2DivX503b1393p\0" + pictures[0][start:]
        )  # by this name decoders know the trick
        not_coded = b"\0\0\1\xb6" + bytes([0b01010000, 0b01001111])
        packed: list[tuple[bytes, bool]] = []
        for place, (data, kind) in enumerate(zip(pictures, kinds, strict=True)):
            before = kinds[place - 1] if place else ""
            after = kinds[place + 1] if place + 1 < len(kinds) else ""
            if kind != "B":
                packed.append((data + (pictures[place + 1] if after == "B" else b""), kind == "I"))
            elif before == "B":
                packed.append((data, False))
            if kind == "B" and after != "B":
                packed.append((not_coded, False))
        for place, (data, is_keyframe) in enumerate(packed):
            packet = av.Packet(data)
            packet.stream, packet.time_base = copy, stream.time_base
            packet.pts = packet.dts = place
            packet.is_keyframe = is_keyframe
            target.mux(packet)
    plain.unlink()
    return path


def _encoder_options(codec: str, gop: int, b_frames: int, open_gop: bool) -> dict[str, str]:
    if codec in ("libx264", "libx265"):
        family = codec.removeprefix("lib")
        # nothing adaptive: where keyframes and B-frames lie is the test's choice
        params = {
            "keyint": gop,
            "min-keyint": min(gop, 250),
            "scenecut": 0,
            "bframes": b_frames,
            "b-adapt": 0,
            "open-gop": int(open_gop),
        }
        if codec == "libx265":
            params |= {"log-level": "none", "pools": "none", "frame-threads": 1}
        joined = ":".join(f"{key}={value}" for key, value in params.items())
        return {f"{family}-params": joined, "crf": "20", "preset": "veryfast"}
    if codec.startswith("libvpx"):
        return {"crf": "20", "b": "0", "deadline": "realtime", "cpu-used": "8"}
    if codec == "libsvtav1":
        return {"preset": "12", "crf": "30", "svtav1-params": "lp=1"}
    return {}


def _write_tone(
    container: av.container.OutputContainer, sound: av.AudioStream, seconds: float
) -> None:
    samples = np.arange(int(seconds * 16000))
    tone = (0.2 * np.sin(samples * (2 * np.pi * 440 / 16000))).astype(np.float32)
    for start in range(0, len(tone), 1024):
        frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, start
        frame.time_base = Fraction(1, 16000)
        container.mux(sound.encode(frame))
    container.mux(sound.encode())


def find_box(data: bytes | bytearray, *names: bytes) -> int:
    """Return where the payload of the box reached by these names begins; the first of each."""
    start, end = 0, len(data)
    for name in names:
        while True:
            size, kind = struct.unpack_from(">I4s", data, start)
            head = 8
            if size == 1:
                size, head = struct.unpack_from(">Q", data, start + 8)[0], 16
            if kind == name:
                start, end = start + head, start + size
                break
            start += size
            assert start < end, f"no box {name!r}"
    return start


def _patch_rotation(path: Path, rotation: int) -> None:
    """Write the matrix of a clockwise turn into the first track's header (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    header = find_box(data, b"moov", b"trak", b"tkhd")
    matrix = header + (52 if data[header] == 1 else 40)
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[rotation]
    struct.pack_into(">9i", data, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def _patch_edit_list(path: Path, first: int, count: int, rate: Fraction) -> None:
    """Make the first track's edit list show `count` frames from `first` (ISO 14496-12, 8.6.6)."""
    data = bytearray(path.read_bytes())
    movie_scale = struct.unpack_from(">I", data, find_box(data, b"moov", b"mvhd") + 12)[0]
    media_header = find_box(data, b"moov", b"trak", b"mdia", b"mdhd")
    assert data[media_header] == 0, "a 32-bit header is expected"
    media_scale = struct.unpack_from(">I", data, media_header + 12)[0]
    edits = find_box(data, b"moov", b"trak", b"edts", b"elst")
    version, entries = data[edits], struct.unpack_from(">I", data, edits + 4)[0]
    assert (version, entries) == (0, 1), "one 32-bit edit is expected"
    shown_from = struct.unpack_from(">i", data, edits + 12)[0] + round(first * media_scale / rate)
    # rounded down: a part of a millisecond more would show one frame more
    struct.pack_into(">Ii", data, edits + 8, int(count * movie_scale / rate), shown_from)
    path.write_bytes(data)
