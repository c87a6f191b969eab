"""A corpus of bad and odd videos, and what each must come to with every decoder.

    python tests/corpus.py FOLDER

makes the files; `corpus_outcomes.py` tries them. Every frame carries its number (see `make_video`),
so "right" means these very frames: all at once, one by one, each as the first thing that a reader is
asked, by an index once read, and as a test sample of `VideoDataset`. A bad file must be refused with a `DecodeError` that names it and says why. Of a damaged one every
frame is right or refused, and `check` finds the damage. decord and torchcodec may refuse what they
are known to get wrong, and do not notice damage inside a file.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import random
import struct
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
from make_video import (
    draw_number,
    find_box,
    write_audio,
    write_packed_avi,
    write_resizing_video,
    write_video,
)
from PIL import Image

COUNT = 24
AS_PLAYED = "as played"
MIXED = [i * 1237 % 3000 for i in range(80)]  # each frame differs much from the last
CANARY = 3000  # numbers from here on are those of files that nobody asked for


class Case(NamedTuple):
    """A file and what is expected of it.

    `numbers` alone: these frames; AS_PLAYED: those that decoding it packet by packet from its
    beginning gives. `reason` alone: refused, with this pattern. Both: damaged.
    """

    make: Callable[[Path], object]
    numbers: Sequence[int] | str | None = None
    reason: str | None = None
    fps: float | None = 24.0  # None: nothing sure can be said


def video(**options: Any) -> Callable[[Path], object]:
    """Write a video of COUNT frames with these options of `write_video`."""
    return lambda path: write_video(path, **{"num_frames": COUNT, **options})


def bytes_of(suffix: str, **options: Any) -> bytes:
    """Return a video of 80 frames, groups of 12, as the bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(Path(folder, f"a{suffix}"), 80, numbers=MIXED, **options)
        return path.read_bytes()


FORMS: dict[str, dict[str, Any]] = {
    ".mp4": {"faststart": True},
    ".avi": {"codec": "mpeg4", "b_frames": 0, "size": (320, 256), "gop": 8},
    ".mkv": {},
}


def cut(suffix: str, share: float) -> Callable[[Path], object]:
    """Keep the first part of a sound file."""

    def make(path: Path) -> None:
        data = bytes_of(suffix, **FORMS[suffix])
        path.write_bytes(data[: int(share * len(data))])

    return make


def zeroed(suffix: str, **options: Any) -> Callable[[Path], object]:
    """Write zeros over the middle tenth, as a broken copy or download leaves them."""

    def make(path: Path) -> None:
        data = bytearray(bytes_of(suffix, **FORMS[suffix], **options))
        start, end = int(0.45 * len(data)), int(0.55 * len(data))
        data[start:end] = bytes(end - start)
        path.write_bytes(data)

    return make


def flipped(seed: int) -> Callable[[Path], object]:
    """Flip 6 bits anywhere in the pictures of an mp4."""

    def make(path: Path) -> None:
        data = bytearray(bytes_of(".mp4", b_frames=0, faststart=True))
        chance = random.Random(seed)
        first = data.index(b"mdat") + 4
        for _ in range(6):
            data[chance.randrange(first, len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)

    return make


def patched(patch: Callable[[bytearray], object], **options: Any) -> Callable[[Path], object]:
    """Write a sound file, then change its bytes."""

    def make(path: Path) -> None:
        data = bytearray(write_video(path, **{"num_frames": COUNT, **options}).read_bytes())
        patch(data)
        path.write_bytes(data)

    return make


def scale_durations(factor: Fraction | int, data: bytearray) -> None:
    """Change what the three headers of an mp4 say of its duration (ISO 14496-12, 8.2.2 to 8.4.2)."""
    track = (b"moov", b"trak")
    for names, place in (
        ((b"moov", b"mvhd"), 16),
        ((*track, b"tkhd"), 20),
        ((*track, b"mdia", b"mdhd"), 16),
    ):
        place += find_box(data, *names)
        duration = struct.unpack_from(">I", data, place)[0]
        struct.pack_into(">I", data, place, int(duration * factor))


def no_time_passes(data: bytearray) -> None:
    """Give every frame of an mp4 the duration 0, so that all are shown at once (8.6.1.2)."""
    times = find_box(data, b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts")
    entries = struct.unpack_from(">I", data, times + 4)[0]
    for entry in range(entries):
        struct.pack_into(">I", data, times + 12 + 8 * entry, 0)


def forget_showing_times(data: bytearray) -> None:
    """Take away what says that frames are shown in another order than decoded (8.6.1.3)."""
    place = find_box(data, b"moov", b"trak", b"mdia", b"minf", b"stbl", b"ctts")
    data[place - 4 : place] = b"free"
    place = find_box(data, b"moov", b"trak", b"edts")
    data[place - 4 : place] = b"free"


def break_matrix(data: bytearray) -> None:
    """Make the display matrix as odd as can be: numbers without a positive counterpart."""
    place = find_box(data, b"moov", b"trak", b"tkhd") + 40
    struct.pack_into(">5i", data, place, -(1 << 31), 0, 0, 0, -(1 << 31))


def scale_rate(factor: int, data: bytearray) -> None:
    """Change what Matroska says a frame lasts, in nanoseconds (DefaultDuration)."""
    place = data.index(b"\x23\xe3\x83\x84") + 4
    struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] * factor)


def claim_size(data: bytearray) -> None:
    """Make the pictures of a GIF, an mp4 or an AVI of MJPEG claim to be huge."""
    size = 20000, 15000
    if data.startswith(b"GIF"):
        struct.pack_into("<HH", data, 6, *size)
    elif b"avc1" in data:
        struct.pack_into(">HH", data, data.rindex(b"avc1") + 28, *size)  # in `stsd`
    start = data.find(b"\xff\xc0")
    while start >= 0:
        struct.pack_into(">HH", data, start + 5, *size[::-1])
        start = data.find(b"\xff\xc0", start + 2)


def set_block_times(times: dict[int, int], data: bytearray) -> None:
    """Write other times, in milliseconds after the cluster's, into blocks of Matroska."""
    with av.open(io.BytesIO(data)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    for frame, time in times.items():
        struct.pack_into(">h", data, places[frame] + 1, time)  # behind the number of the track


def point_elsewhere(data: bytearray) -> None:
    """Make an mp4 name `canary.mp4` as the file that its pictures lie in (an alias; 8.7.2)."""
    path = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")
    start = find_box(data, *path) + 8
    size = struct.unpack_from(">I", data, start)[0]
    alias = bytes(4) + bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16)
    alias += struct.pack(">HH", 1, 1) + bytes(16)  # levels to go up, and down again
    alias += struct.pack(">HH", 2, 10) + b"canary.mp4" + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I4s", 8 + len(alias), b"alis") + alias
    data[start : start + size] = entry
    for depth in range(len(path)):
        place = find_box(data, *path[: depth + 1]) - 8
        old = struct.unpack_from(">I", data, place)[0]
        struct.pack_into(">I", data, place, old + len(entry) - size)


def write_tracks(
    path: Path,
    *tracks: Sequence[int],
    sizes: Sequence[tuple[int, int]] = ((128, 96), (64, 48)),
) -> None:
    """Write several video streams into one file, the frames numbered as given."""
    with av.open(str(path), "w") as container:
        streams = []
        for _, (width, height) in zip(tracks, sizes, strict=True):
            streams.append(container.add_stream("libx264", rate=24))
            streams[-1].width, streams[-1].height, streams[-1].pix_fmt = width, height, "yuv420p"
        for stream, numbers, size in zip(streams, tracks, sizes, strict=True):
            for place, number in enumerate(numbers):
                frame = av.VideoFrame.from_ndarray(draw_number(number, size), format="rgb24")
                frame.pts, frame.time_base = place, Fraction(1, 24)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


def write_cover(path: Path, with_video: bool) -> None:
    """Write sound, or a small video, with a big cover picture."""
    with tempfile.TemporaryDirectory() as folder:
        jpeg = write_video(
            Path(folder, "a.jpg"), 1, size=(640, 480), codec="mjpeg", numbers=[CANARY]
        ).read_bytes()
        inner = write_video(Path(folder, "a.mp4"), COUNT) if with_video else None
        inner = inner or write_audio(Path(folder, "a.mp4"))
        with av.open(str(inner)) as source, av.open(str(path), "w") as target:
            copy = target.add_stream_from_template(source.streams[0])
            cover = target.add_stream("mjpeg")
            cover.width, cover.height, cover.pix_fmt = 640, 480, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
            for packet in source.demux():
                if packet.size:
                    packet.stream = copy
                    target.mux(packet)
            packet = av.Packet(jpeg)
            packet.stream, packet.pts, packet.dts = cover, 0, 0
            target.mux(packet)


def write_picture(path: Path) -> None:
    """Write a single picture, whose number is 0."""
    Image.fromarray(draw_number(0, (128, 96))).save(path)


def write_folder(path: Path, broken: bool = False) -> None:
    """Write pictures, one a frame."""
    path.mkdir()
    for number in ALL:
        Image.fromarray(draw_number(number, (128, 96))).save(path / f"img_{number}.png")
    if broken:
        (path / "img_7.png").write_bytes(b"no picture")


def text(words: str) -> Callable[[Path], object]:
    """Write a text."""
    return lambda path: path.write_text(words)


def playlist(target: str) -> str:
    """Return the text of an HLS playlist of one file or address."""
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"


def script(target: str) -> str:
    """Return the text that makes libav play another file."""
    return f"ffconcat version 1.0\nfile {target}\n"


def write_attachment(path: Path) -> None:
    """Write a Matroska file that carries a script."""
    with tempfile.TemporaryDirectory() as folder:
        plain = write_video(Path(folder, "a.mkv"), COUNT)
        with av.open(str(plain)) as source, av.open(str(path), "w") as target:
            copy = target.add_stream_from_template(source.streams.video[0])
            target.add_attachment("a.ffconcat", "text/plain", script("canary.mp4").encode())
            for packet in source.demux():
                if packet.size:
                    packet.stream = copy
                    target.mux(packet)


NOT_A_VIDEO = "not a video but text"
NOBODY = "http://127.0.0.1:9"
SESSION = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=x
c=IN IP4 127.0.0.1
t=0 0
m=video 5004 RTP/AVP 96
a=rtpmap:96 H264/90000
"""
ALL = range(COUNT)
JITTERED = [500 + 40 * i + 13 * (i % 3) for i in range(COUNT)]

CASES: dict[str, Case] = {
    # nothing that could be read
    "empty.mp4": Case(lambda path: path.write_bytes(b""), None, r"empty file \(0 bytes\)"),
    "text.mp4": Case(text("this is text\n" * 400), None, NOT_A_VIDEO),
    "text.txt": Case(text("this is text\n" * 400), None, NOT_A_VIDEO),
    "zeros.mp4": Case(lambda path: path.write_bytes(bytes(9000)), None, "begins with zeros only"),
    "random.avi": Case(
        lambda path: path.write_bytes(random.Random(0).randbytes(9000)),
        None,
        "not a video, or damaged",
    ),
    "missing.mp4": Case(lambda path: None, None, "file not found"),
    "pipe.mp4": Case(os.mkfifo, None, "a named pipe, not a file"),
    "device.mp4": Case(lambda path: path.symlink_to("/dev/zero"), None, "a device, not a file"),
    "directory.mp4": Case(Path.mkdir, None, "a folder without images"),
    "loop of links.mp4": Case(lambda path: path.symlink_to(path), None, "cannot be opened"),
    "link to nothing.mp4": Case(lambda path: path.symlink_to("nothing"), None, "a link to nothing"),
    "no permission.mp4": Case(
        lambda path: write_video(path, 3).chmod(0), None, "no permission to read it"
    ),
    "sound only.mp4": Case(write_audio, None, r"no video stream \(sound only\)"),
    "sound and cover.mp4": Case(
        functools.partial(write_cover, with_video=False), None, r"no video stream \(sound only\)"
    ),
    "missing moov.mp4": Case(
        lambda path: path.write_bytes(bytes_of(".mp4")[:-3000]), None, r"the index \(moov\)"
    ),
    "truncated header.mp4": Case(
        lambda path: path.write_bytes(bytes_of(".mp4", faststart=True)[:300]),
        None,
        r"cut off inside its index \(moov\)",
    ),
    # damaged
    "cut at 10 %.mp4": Case(cut(".mp4", 0.1), None, r"cut off inside its index"),
    "cut at 60 %.mp4": Case(cut(".mp4", 0.6), MIXED, "of its 80 frames can be found"),
    "cut at 95 %.mp4": Case(cut(".mp4", 0.95), MIXED, "of its 80 frames can be found"),
    "cut at 10 %.avi": Case(cut(".avi", 0.1), None, "damaged or cut off near its beginning"),
    "cut at 60 %.avi": Case(cut(".avi", 0.6), MIXED, "frames can be found"),
    "cut at 95 %.avi": Case(cut(".avi", 0.95), MIXED, "frames can be found"),
    "cut at 10 %.mkv": Case(cut(".mkv", 0.1), MIXED, "cut off"),
    "cut at 60 %.mkv": Case(cut(".mkv", 0.6), MIXED, "cut off"),
    "cut at 95 %.mkv": Case(cut(".mkv", 0.95), MIXED, "cut off"),
    "zeroed middle.mp4": Case(zeroed(".mp4"), MIXED, "frames do not decode"),
    "zeroed middle.avi": Case(zeroed(".avi"), MIXED, "frames can be found"),
    "zeroed middle.mkv": Case(
        zeroed(".mkv", b_frames=0), AS_PLAYED, "frames do not decode|no frame between"
    ),
    **{
        f"flipped bits {seed}.mp4": Case(flipped(seed), MIXED, "frames do not decode")
        for seed in range(5)
    },
    # odd in time
    "one frame.mp4": Case(video(num_frames=1), range(1)),
    "one frame.mkv": Case(video(num_frames=1), range(1)),
    "zero duration.mp4": Case(patched(functools.partial(scale_durations, 0)), ALL),
    "all frames at once.mp4": Case(patched(no_time_passes, b_frames=0), ALL, fps=None),
    "no showing times.mp4": Case(patched(forget_showing_times), ALL),
    "ten times too long.mp4": Case(patched(functools.partial(scale_durations, 10)), ALL),
    "a tenth as long.mp4": Case(patched(functools.partial(scale_durations, Fraction(1, 10))), ALL),
    "wrong rate.mkv": Case(patched(functools.partial(scale_rate, 10)), ALL),
    "negative timestamps.mp4": Case(video(movflags="+negative_cts_offsets"), ALL),
    "negative timestamps.mkv": Case(
        patched(functools.partial(set_block_times, {0: -40, 1: -20}), b_frames=0), ALL
    ),
    "non-monotonic timestamps.mkv": Case(
        patched(functools.partial(set_block_times, {3: 210, 5: 125, 14: 250}), b_frames=0), ALL
    ),
    "variable rate.mp4": Case(video(pts=JITTERED), ALL, fps=24.3),
    "variable rate.mkv": Case(video(pts=JITTERED), ALL),
    "edit list.mp4": Case(video(edit=(5, 13)), range(5, 18)),
    "29.97.mp4": Case(video(fps=29.97), ALL, fps=30000 / 1001),
    # odd in shape
    "rotated 90.mp4": Case(video(rotation=90), ALL),
    "rotated 180.mp4": Case(video(rotation=180), ALL),
    "rotated 270.mp4": Case(video(rotation=270), ALL),
    "rotated and enlarged.mp4": Case(patched(break_matrix, rotation=180), ALL),
    "odd size.mp4": Case(video(size=(97, 75), pix_fmt="yuv444p"), ALL),
    "odd size.webm": Case(video(size=(97, 75), codec="libvpx-vp9"), ALL),
    "10 bit.mp4": Case(video(pix_fmt="yuv420p10le"), ALL),
    "4:2:2.mp4": Case(video(pix_fmt="yuv422p"), ALL),
    "4:4:4.mp4": Case(video(pix_fmt="yuv444p"), ALL),
    "grey.mp4": Case(video(pix_fmt="gray"), ALL),
    "alpha.webm": Case(video(codec="libvpx-vp9", pix_fmt="yuva420p"), ALL),
    "alpha.mov": Case(video(codec="png", pix_fmt="rgba"), ALL),
    "interlaced.mp4": Case(video(codec_options={"flags": "+ildct+ilme"}), ALL),
    "interlaced.mpg": Case(
        video(codec="mpeg2video", codec_options={"flags": "+ildct+ilme"}, fps=25), ALL, fps=25
    ),
    "huge in the header.mp4": Case(patched(claim_size), ALL),
    "huge.gif": Case(patched(claim_size, codec="gif"), None, "not one frame can be decoded"),
    "huge.avi": Case(patched(claim_size, codec="mjpeg"), (), "24 of 24 frames do not decode"),
    "8K.mkv": Case(video(num_frames=1, size=(7680, 4320), codec="mjpeg"), range(1)),
    "size changes.mp4": Case(
        lambda path: write_resizing_video(path, [(128, 96), (160, 64), (128, 96)], 8), ALL
    ),
    # codecs and containers
    "HEVC.mp4": Case(video(codec="libx265"), ALL),
    "VP8.webm": Case(video(codec="libvpx"), ALL),
    "VP9.webm": Case(video(codec="libvpx-vp9"), ALL),
    "AV1.mp4": Case(video(codec="libsvtav1"), ALL),
    "MPEG-1.mpg": Case(video(codec="mpeg1video", fps=25), ALL, fps=25),
    "MPEG-2.ts": Case(video(codec="mpeg2video", fps=25), ALL, fps=25),
    "MPEG-4.avi": Case(video(codec="mpeg4"), ALL),
    "packed.avi": Case(lambda path: write_packed_avi(path, COUNT), ALL),
    "MJPEG.avi": Case(video(codec="mjpeg"), ALL),
    "animation.gif": Case(video(codec="gif", fps=25), ALL, fps=25),
    "H.264.flv": Case(video(), ALL),
    "H.264.ts": Case(video(open_gop=True), ALL),
    "bare.h264": Case(video(fps=25), ALL, fps=25),
    "open GOP.mp4": Case(video(open_gop=True), ALL),
    "intra refresh.mp4": Case(
        video(codec_options={"x264-params": "keyint=8:intra-refresh=1:bframes=0:scenecut=0"}), ALL
    ),
    "fragmented.mp4": Case(video(movflags="+frag_keyframe+empty_moov"), ALL),
    # more than one thing inside
    "sound.mp4": Case(video(audio=True), ALL),
    "two video streams.mkv": Case(
        lambda path: write_tracks(path, ALL, range(CANARY, CANARY + COUNT)), ALL
    ),
    "cover picture.mp4": Case(functools.partial(write_cover, with_video=True), ALL),
    "attachment.mkv": Case(write_attachment, ALL),
    "folder": Case(write_folder, ALL, fps=30.0),
    "folder with a broken picture": Case(
        functools.partial(write_folder, broken=True), ALL, r"frame 7 of 24 \(img_7.png\)", fps=30.0
    ),
    # reaching for other files: the canary must not come through
    "playlist.m3u8": Case(text(playlist("canary.ts")), None, NOT_A_VIDEO),
    "playlist.mp4": Case(text(playlist("canary.ts")), None, NOT_A_VIDEO),
    "playlist of the web.m3u8": Case(text(playlist(f"{NOBODY}/canary.ts")), None, NOT_A_VIDEO),
    "script.ffconcat": Case(text(script("canary.mp4")), None, NOT_A_VIDEO),
    "script.mp4": Case(text(script(f"{NOBODY}/canary.mp4")), None, NOT_A_VIDEO),
    "session.sdp": Case(text(SESSION), None, NOT_A_VIDEO),
    "pattern %d.png": Case(write_picture, None, "not a video, or damaged"),
    "concat:canary.mp4": Case(video(), ALL),
    "data elsewhere.mp4": Case(patched(point_elsewhere), None, "0 of its 24 frames can be found"),
}


def make_corpus(folder: Path) -> dict[str, Path]:
    """Write every file, and the canaries that some of them reach for; return paths by name."""
    write_video(folder / "canary.mp4", COUNT, numbers=range(CANARY, CANARY + COUNT))
    write_video(folder / "canary.ts", COUNT, numbers=range(CANARY, CANARY + COUNT))
    for number in (1, 2):
        picture = Image.fromarray(draw_number(CANARY + number, (128, 96)))
        picture.save(folder / f"pattern {number}.png")
    for name, case in CASES.items():
        case.make(folder / name)
    return {name: folder / name for name in CASES}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    print(len(make_corpus(target)), "files")
