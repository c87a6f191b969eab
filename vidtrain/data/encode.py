"""Re-encode a video so that clips of it are quick to decode: H.264 in mp4, a keyframe often."""

from __future__ import annotations

import errno
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from vidtrain.data.decode import open_video
from vidtrain.data.readers.pyav import ANY_TEXT
from vidtrain.types import DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from av.container import InputContainer, OutputContainer

    from vidtrain.data.readers.index import FrameIndex
    from vidtrain.types import VideoReader

LIBAV_ERRORS = (av.error.FFmpegError, OSError, ValueError)
FULL = (errno.ENOSPC, errno.EDQUOT)
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower")
TUNES = ("fastdecode", "film", "animation", "grain")
HELD = ("aac", "mp3", "mp2", "ac3", "eac3", "opus", "alac", "flac")  # sound that mp4 can hold
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
GRAIN = 100  # units of time in a frame, where frames come at an even rate
PICTURES = 32  # of a folder, in memory at once
RGB = 0  # as a matrix of colours: none (ITU-T H.273, table 4)
LEAST_RATE = 32_000  # bits per second that any video may take


class Settings(NamedTuple):
    """How videos are re-encoded."""

    short_side: int = 320  # pixels; a smaller video keeps its size
    keyframe_every: int = 32  # frames, at most
    crf: float = 24
    preset: str = "medium"
    tune: str | None = "fastdecode"


class Encoded(NamedTuple):
    """What came out."""

    frames: int
    width: int
    height: int
    sound: str | None  # what became of it; None where there is none


def encode(source: str, target: str, settings: Settings) -> Encoded:
    """Write a video anew: the same frames at the same times, smaller, turned upright.

    It takes about as many bits as the source at most: a clip that was small stays so. Sound is
    copied where mp4 can hold its codec.

    Args:
        source: a video file, or a folder of pictures.
        target: an mp4 file, whatever its name ends in.
        settings: how.

    Raises:
        DecodeError: the source is damaged, or what was written is not what it should be.
        OSError: the target cannot be written.
    """
    with open_video(source) as reader:
        index = getattr(reader, "index", None)
        fault = None if index is None else reader.check().reason
        if fault is not None:
            raise DecodeError(source, fault)
        frames, size = len(reader), (reader.width, reader.height)
        size = target_size(*size, settings.short_side)
        if index is None:
            sound = None
            _encode_pictures(reader, target, settings, size)
        else:  # `check` has replaced the index by what decoding showed
            sound = _encode_file(source, reader.index, reader.fps, target, settings, size)
    with open_video(target) as made:
        fault = made.check().reason
        found = len(made), (made.width, made.height)
    if fault is not None:
        raise DecodeError(source, f"its copy came out damaged: {fault}")
    if found != (frames, size):
        raise DecodeError(
            source,
            f"its copy has {found[0]} frames of {found[1][0]}x{found[1][1]}, and should have"
            f" {frames} of {size[0]}x{size[1]}",
        )
    return Encoded(frames, *size, sound)


def target_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Scale so that the shorter side is at most `short_side`; both sides even, neither enlarged."""
    scale = min(1.0, short_side / min(width, height))

    def even(length: int) -> int:
        return max(2, min(round(length * scale / 2), length // 2) * 2)

    return even(width), even(height)


class _Timing(NamedTuple):
    """When frames are shown."""

    times: list[int]  # of each frame, in units of `step`, from 0 on or a little later
    step: Fraction  # seconds
    last: int  # how long the last one is shown
    start: Fraction  # seconds of the source's clock that became 0
    bit_rate: float | None  # of the source's picture; bits per second


def _encode_pictures(
    reader: VideoReader, target: str, settings: Settings, size: tuple[int, int]
) -> None:
    fps = Fraction(reader.fps).limit_denominator(1001)
    timing = _Timing(list(range(len(reader))), 1 / fps, 1, Fraction(0), None)
    with _open_target(target) as out:
        video = _Video(out, settings, size, timing)
        for start in range(0, len(reader), PICTURES):
            pictures = reader.frames(range(start, min(start + PICTURES, len(reader))))
            for picture in pictures.permute(0, 2, 3, 1).numpy():
                video.take(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24"))
        video.finish()


def _encode_file(
    source: str,
    index: FrameIndex,
    fps: float,
    target: str,
    settings: Settings,
    size: tuple[int, int],
) -> str | None:
    """Encode picture and sound; where the sound resists it is converted, then left out."""
    with _open_source(source) as container:
        timing = _timing(container, index, fps)
        sound = container.streams.best("audio")
        codec = (
            None
            if sound is None or sound.codec_context is None
            else sound.codec_context.codec.canonical_name
        )
    ways: list[Callable[..., _Copy] | None] = [None]
    if codec is not None:
        ways = [_Copy, _Convert, None] if codec in HELD else [_Convert, None]
    for way in ways:
        try:
            _transcode(source, index, timing, target, settings, size, way)
        except LIBAV_ERRORS as error:
            if way is None or getattr(error, "errno", None) in FULL:
                raise
            continue
        if codec is None:
            return None
        return f"{codec} {way.did}" if way else f"{codec} left out, since it cannot be read"
    raise AssertionError("the last way returns or raises")


def _timing(container: InputContainer, index: FrameIndex, fps: float) -> _Timing:
    """Take the frames' times from their packets; even ones where those are missing or do not rise.

    Times that are even but for rounding, as in a file that counts milliseconds, become even.
    """
    stream = container.streams.best("video")
    packets = [
        (packet.pts, packet.dts, packet.duration, packet.size)
        for packet in container.demux(stream)
        if not _is_end(packet)
    ]
    bit_rate = 8 * sum(size for *_, size in packets) * fps / len(index.order)
    begin = max(Fraction(0), Fraction(container.start_time or 0, av.time_base))
    rate = Fraction(fps).limit_denominator(1001)
    for column in (0, 1):
        times = [packets[place][column] for place in index.order]
        if None not in times and all(a < b for a, b in pairwise(times)):
            step = stream.time_base
            first = times[0] * step
            break
    else:
        times, step, first = list(range(len(index.order))), 1 / rate, begin
    start = min(begin, first)
    if all(abs((time - times[0]) * step - n / rate) <= step for n, time in enumerate(times)):
        step = 1 / rate / GRAIN
        times = [round((first - start) / step) + n * GRAIN for n in range(len(times))]
        return _Timing(times, step, GRAIN, start, bit_rate)
    last = packets[index.order[-1]][2] or times[-1] - times[-2]
    return _Timing([t - round(start / step) for t in times], step, last, start, bit_rate)


def _transcode(
    source: str,
    index: FrameIndex,
    timing: _Timing,
    target: str,
    settings: Settings,
    size: tuple[int, int],
    way: Callable[..., _Copy] | None,
) -> None:
    with _open_source(source) as container, _open_target(target) as out:
        stream = container.streams.best("video")
        video = _Video(out, settings, size, timing, stream, index.turn)
        if way is None:
            for frame in _frames(container, [stream], index):
                video.take(frame)
        else:
            track = container.streams.best("audio")
            sound = way(out, track, timing.start)
            for frame in _frames(container, [stream, track], index, sound.take):
                video.take(frame)
            sound.finish()
        video.finish()


def _frames(
    container: InputContainer,
    streams: list,
    index: FrameIndex,
    other: Callable[[av.Packet], None] | None = None,
) -> Iterator[av.VideoFrame]:
    """Decode the first of the streams in showing order; `other` is given the second's packets."""
    stream = streams[0]
    codec = stream.codec_context
    codec.thread_type, codec.thread_count = "NONE", 1
    place = rank = 0

    def wanted(frames: list[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        nonlocal rank
        for frame in frames:
            # what an edit list hides has no rank, and what is shown twice has had it
            if frame.pts is not None and index.ranks[frame.pts] == rank:
                rank += 1
                yield frame

    for packet in container.demux(*streams):
        if _is_end(packet):
            continue
        if packet.stream.index != stream.index:
            other(packet)
            continue
        packet.pts = packet.dts = place
        place += 1
        yield from wanted(codec.decode(packet))
    yield from wanted(codec.decode(None))


class _Video:
    """The picture of the output: takes the frames in showing order."""

    def __init__(
        self,
        out: OutputContainer,
        settings: Settings,
        size: tuple[int, int],
        timing: _Timing,
        source: av.VideoStream | None = None,
        turn: tuple[bool, bool, bool] | None = None,
    ) -> None:
        self.out, self.turn = out, turn or (False, False, False)
        self.times = iter(timing.times)
        ends = [*timing.times[1:], timing.times[-1] + timing.last]
        self.durations = {a: b - a for a, b in zip(timing.times, ends, strict=True)}
        self.size = size[::-1] if self.turn[0] else size  # before turning
        self.reformatter = VideoReformatter()
        options = {"crf": str(settings.crf), "preset": settings.preset}
        if settings.tune is not None:
            options["tune"] = settings.tune
        if settings.tune == "fastdecode":
            # Seven pictures of eight that no other refers to: a clip leaves out those it does not
            # want. And no bits for what pleases the eye alone, since bits are decoding time.
            options |= {"bf": "7", "b_strategy": "0", "b-pyramid": "none", "psy": "0"}
        if timing.bit_rate is not None:
            before = source.codec_context.width * source.codec_context.height or 1
            # fewer pixels need more bits each
            share = min(1.0, size[0] * size[1] / before) ** 0.75
            rate = round(max(LEAST_RATE, timing.bit_rate * share))
            options |= {"maxrate": str(rate), "bufsize": str(2 * rate)}
        rate = Fraction(len(timing.times), sum(self.durations.values())) / timing.step
        self.stream = out.add_stream(
            "libx264", rate=rate.limit_denominator(100_000), options=options
        )
        self.stream.width, self.stream.height, self.stream.pix_fmt = *size, "yuv420p"
        self.stream.time_base = timing.step
        codec = self.stream.codec_context
        codec.time_base, codec.gop_size = timing.step, settings.keyframe_every
        codec.thread_count = 1  # workers fill the cores
        codec.color_range = ColorRange.MPEG
        if source is not None:
            self._describe(codec, source)

    def _describe(self, codec: av.VideoCodecContext, source: av.VideoStream) -> None:
        given = source.codec_context
        aspect = source.sample_aspect_ratio
        if aspect and aspect > 0:
            codec.sample_aspect_ratio = 1 / aspect if self.turn[0] else aspect
        if given.colorspace != RGB:
            codec.colorspace = given.colorspace
        codec.color_primaries, codec.color_trc = given.color_primaries, given.color_trc

    def take(self, frame: av.VideoFrame) -> None:
        picture = self.reformatter.reformat(
            frame,
            *self.size,
            "yuv420p",
            interpolation=Interpolation.BICUBIC,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        picture = _turned(picture, self.turn)
        picture.pts, picture.time_base = next(self.times), self.stream.codec_context.time_base
        picture.pict_type = PictureType.NONE  # where the source had its keyframes does not matter
        self._mux(picture)

    def finish(self) -> None:
        self._mux(None)

    def _mux(self, picture: av.VideoFrame | None) -> None:
        for packet in self.stream.encode(picture):
            packet.duration = self.durations[packet.pts]
            self.out.mux(packet)


class _Copy:
    """The sound of the output: the source's packets."""

    did = "copied"

    def __init__(self, out: OutputContainer, source: av.AudioStream, start: Fraction) -> None:
        self.out, self.track = out, out.add_stream_from_template(source)
        self.shift = round(start / source.time_base)
        self.last: int | None = None

    def take(self, packet: av.Packet) -> None:
        if packet.dts is None or (self.last is not None and packet.dts <= self.last):
            return  # mp4 holds rising times only
        self.last = packet.dts
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - self.shift
        packet.dts -= self.shift
        packet.stream = self.track
        self.out.mux(packet)

    def finish(self) -> None:
        pass


class _Convert(_Copy):
    """The sound of the output: the source's, as AAC."""

    did = "converted to AAC"

    def __init__(self, out: OutputContainer, source: av.AudioStream, start: Fraction) -> None:
        rate = source.codec_context.sample_rate
        self.out = out
        self.track = out.add_stream("aac", rate=rate if rate in AAC_RATES else 48000)
        self.track.layout = "mono" if source.codec_context.channels == 1 else "stereo"
        self.shift = round(start / source.time_base)

    def take(self, packet: av.Packet) -> None:
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            return  # a moment of silence
        for frame in frames:
            if frame.pts is not None:
                frame.pts -= self.shift
            self.out.mux(self.track.encode(frame))

    def finish(self) -> None:
        self.out.mux(self.track.encode(None))


def _turned(picture: av.VideoFrame, turn: tuple[bool, bool, bool]) -> av.VideoFrame:
    """Turn a yuv420p picture as `FrameIndex.turn` says."""
    transposed, mirrored, flipped = turn
    if not any(turn):
        return picture
    width, height = picture.width, picture.height
    pixels = picture.to_ndarray().reshape(-1)
    planes = []
    for w, h in ((width, height), (width // 2, height // 2), (width // 2, height // 2)):
        plane, pixels = pixels[: w * h].reshape(h, w), pixels[w * h :]
        plane = plane.swapaxes(0, 1) if transposed else plane
        planes.append(plane[:: -1 if flipped else 1, :: -1 if mirrored else 1].reshape(-1))
    if transposed:
        width, height = height, width
    return av.VideoFrame.from_ndarray(
        np.concatenate(planes).reshape(height * 3 // 2, width), "yuv420p"
    )


def _is_end(packet: av.Packet) -> bool:
    """Tell PyAV's mark for the end of a stream."""
    return packet.size == 0 and packet.pts is None and packet.dts is None


def _open_source(path: str) -> InputContainer:
    return av.open(  # as the reader opens it
        f"file:{path}", **ANY_TEXT, container_options={"protocol_whitelist": "file"}
    )


def _open_target(path: str) -> OutputContainer:
    # the index first: who reads over a network need not ask for the end of the file
    options = {"movflags": "+faststart"}
    return av.open(f"file:{path}", "w", format="mp4", container_options=options)
