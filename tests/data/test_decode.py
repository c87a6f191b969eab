"""Readers are tested by which frames come back, from files whose frames carry their number."""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch
from make_video import (
    read_numbers,
    write_audio,
    write_packed_avi,
    write_resizing_video,
    write_video,
)
from PIL import Image

from vidtrain.data.decode import open_video
from vidtrain.types import DecodeError, UserError, VideoReader

COUNT = 40
JITTERED = [500 + 40 * i + 13 * (i % 3) for i in range(COUNT)]
INTRA_REFRESH = {"x264-params": "keyint=8:intra-refresh=1:bframes=0:scenecut=0"}


class Case(NamedTuple):
    file: str
    options: dict[str, Any]
    numbers: range = range(COUNT)
    makers: Any = write_video


CASES = {
    "plain": Case("a.mp4", {}),
    "no B frames": Case("a.mp4", {"b_frames": 0}),
    "one group of pictures": Case("a.mp4", {"gop": 250, "b_frames": 3}),
    "sound": Case("a.mp4", {"audio": True}),
    "faststart": Case("a.mp4", {"faststart": True}),
    "open GOP": Case("a.mp4", {"open_gop": True}),
    "open GOP, mkv": Case("a.mkv", {"open_gop": True}),
    "intra refresh": Case("a.mp4", {"codec_options": INTRA_REFRESH}),
    "variable rate": Case("a.mp4", {"pts": JITTERED}),
    "variable rate, mkv": Case("a.mkv", {"pts": JITTERED}),
    "edit list": Case("a.mp4", {"edit": (5, 20)}, range(5, 25)),
    "edit list from a keyframe's middle": Case("a.mov", {"edit": (13, 9)}, range(13, 22)),
    "rotation 90": Case("a.mp4", {"rotation": 90}),
    "rotation 180": Case("a.mp4", {"rotation": 180}),
    "rotation 270": Case("a.mp4", {"rotation": 270}),
    "one frame": Case("a.mp4", {"num_frames": 1}, range(1)),
    "odd size, 4:4:4": Case("a.mp4", {"size": (97, 75), "pix_fmt": "yuv444p"}),
    "10 bit": Case("a.mp4", {"pix_fmt": "yuv420p10le"}),
    "29.97": Case("a.mp4", {"fps": 29.97}),
    "HEVC": Case("a.mp4", {"codec": "libx265"}),
    "HEVC, open GOP": Case("a.mp4", {"codec": "libx265", "open_gop": True}),
    "VP8": Case("a.webm", {"codec": "libvpx"}),
    "VP9": Case("a.webm", {"codec": "libvpx-vp9"}),
    "AV1": Case("a.mp4", {"codec": "libsvtav1"}),
    "MPEG-4 in mp4": Case("a.mp4", {"codec": "mpeg4"}),
    "MPEG-4 in AVI": Case("a.avi", {"codec": "mpeg4", "b_frames": 0}),
    "MPEG-4 in AVI, B frames": Case("a.avi", {"codec": "mpeg4", "audio": True}),
    "packed AVI": Case("a.avi", {}, makers=write_packed_avi),
    "packed AVI, one B frame": Case("a.avi", {"b_frames": 1}, makers=write_packed_avi),
    "H.264 in AVI": Case("a.avi", {}),
    "H.264 in AVI, no B frames": Case("a.avi", {"b_frames": 0}),
    "MJPEG in AVI": Case("a.avi", {"codec": "mjpeg"}),
    "GIF": Case("a.gif", {"codec": "gif"}),
    "flv": Case("a.flv", {}),
    "transport stream": Case("a.ts", {"open_gop": True}),
    "program stream": Case("a.mpg", {"codec": "mpeg2video"}),
    "bare H.264": Case("a.h264", {}),
}


def make(case: Case, folder: Path) -> Path:
    options = {"num_frames": COUNT} | case.options
    return case.makers(folder / case.file, **options)


def open_or_skip(path: Path | bytes, decoder: str) -> VideoReader:
    try:
        return open_video(path, decoder)
    except UserError as error:
        pytest.skip(str(error))


def check_all_orders(reader: VideoReader, numbers: range) -> None:
    """Every frame, then some in random order with repeats, then single ones, from one reader."""
    assert len(reader) == len(numbers)
    everything = range(len(numbers))
    assert read_numbers(reader.frames(everything)) == list(numbers)
    chance = random.Random(0)
    for count in (1, 1, 1, 4, 4, 4, 16, 16, 1, 2):
        indices = [chance.randrange(len(numbers)) for _ in range(count)]
        assert read_numbers(reader.frames(indices)) == [numbers[i] for i in indices]


@pytest.mark.parametrize("name", CASES)
def test_the_frames_a_player_shows(name: str, tmp_path: Path) -> None:
    path = make(CASES[name], tmp_path)
    numbers = CASES[name].numbers
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(numbers)
    with open_video(path) as reader:
        check_all_orders(reader, numbers)
        width, height = CASES[name].options.get("size", (128, 96))
        assert (reader.width, reader.height) == (width, height)
        assert reader.check() == (len(numbers), None)
    # a fresh reader each, so that a frame is the first thing ever decoded
    for index in random.Random(1).sample(range(len(numbers)), min(8, len(numbers))):
        with open_video(path) as reader:
            assert read_numbers(reader.frames([index])) == [numbers[index]]


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
@pytest.mark.parametrize("name", CASES)
def test_other_decoders_are_right_or_refuse(name: str, decoder: str, tmp_path: Path) -> None:
    path = make(CASES[name], tmp_path)
    try:
        with open_or_skip(path, decoder) as reader:
            check_all_orders(reader, CASES[name].numbers)
    except DecodeError as error:
        assert decoder in error.reason
        assert name not in ("plain", "no B frames", "rotation 90", "rotation 270", "variable rate")


@pytest.mark.parametrize(
    ("file", "codec"),
    [("a.mp4", "libx264"), ("a.ts", "libx264"), ("a.mp4", "libx265"), ("a.mkv", "libx265"),
     ("a.mp4", "mpeg4"), ("a.avi", "mpeg4")],
)  # fmt: skip
def test_pictures_that_nobody_wants_are_not_decoded(
    file: str, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / file, COUNT, codec=codec, b_frames=2, gop=250)
    with open_video(path) as reader:
        wanted = [
            rank for rank in range(COUNT) if not reader.index.skippable[reader.index.order[rank]]
        ]
        assert len(wanted) < COUNT * 3 / 4
        decoded = []
        real = reader._feed

        def feed(*arguments: Any) -> Any:
            for frame in real(*arguments):
                decoded.append(frame.pts)
                yield frame

        monkeypatch.setattr(reader, "_feed", feed)
        assert read_numbers(reader.frames(wanted)) == wanted
        assert len(decoded) == len(wanted)


def test_frames_are_channels_last_uint8_rgb(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12, pattern="flat", numbers=[448 + i for i in range(12)])
    with open_video(path) as reader:
        frames = reader.frames([3, 7, 3])
    assert frames.shape == (3, 3, 96, 128)
    assert frames.dtype == torch.uint8
    assert frames.permute(0, 2, 3, 1).is_contiguous()
    assert frames[:, 0].float().mean() > 240  # 448 is 700 in base 8: red
    assert frames[:, 1].float().mean() < 60
    assert torch.equal(frames[0], frames[2])


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
def test_indices_repeated_none_and_outside(decoder: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 12)
    with open_or_skip(path, decoder) as reader:
        assert read_numbers(reader.frames([5, 5, 0, 5])) == [5, 5, 0, 5]
        assert read_numbers(reader.frames(np.array([11, 2]))) == [11, 2]
        assert reader.frames([]).shape == (0, 3, 96, 128)
        for outside in (12, -1):
            with pytest.raises(IndexError, match=r"a\.mp4.*12"):
                reader.frames([0, outside])


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
def test_bytes_as_well_as_a_path(decoder: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30, fps=20, audio=True)
    with open_or_skip(path.read_bytes(), decoder) as reader:
        assert reader.fps == pytest.approx(20)
        check_all_orders(reader, range(30))


def test_colours_by_the_matrix_the_file_names(tmp_path: Path) -> None:
    red = np.zeros((96, 128, 3), np.uint8)
    red[:] = (200, 40, 40)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=24, options={"x264-params": "colormatrix=bt709"}
        )
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.colorspace = 1
        frame = av.VideoFrame.from_ndarray(red, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    with open_video(path) as reader:
        mean = reader.frames([0]).float().mean(dim=(0, 2, 3))
    assert torch.allclose(mean, torch.tensor([200.0, 40.0, 40.0]), atol=4)


def test_another_size_on_the_way_is_scaled_to_the_first(tmp_path: Path) -> None:
    path = write_resizing_video(tmp_path / "a.mp4", [(128, 96), (160, 64), (128, 96)])
    for order in (range(36), [30, 14, 3], [14]):
        with open_video(path) as reader:
            frames = reader.frames(order)
            assert read_numbers(frames) == list(order)
            assert frames.shape[2:] == (96, 128)
    for decoder in ("decord", "torchcodec"):
        with pytest.raises(DecodeError, match=f"{decoder}.*size changes"):
            open_or_skip(path, decoder)


def test_an_index_once_read_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", COUNT, rotation=90)
    with open_video(path) as reader:
        assert reader.width == 128
        index = reader.index
    monkeypatch.setattr("vidtrain.data.readers.pyav.read_index", None)
    with open_video(path, index=index) as reader:
        check_all_orders(reader, range(COUNT))


def test_an_index_of_another_file_does_no_harm(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", COUNT)
    with open_video(write_video(tmp_path / "b.mp4", COUNT, gop=7, b_frames=0)) as reader:
        other = reader.index
    with open_video(path, index=other) as reader:
        assert read_numbers(reader.frames([17, 30])) == [17, 30]
    with open_video(write_video(tmp_path / "c.avi", COUNT, codec="mpeg4")) as reader:
        other = reader.index
    with open_video(path, index=other) as reader:
        assert read_numbers(reader.frames([17, 30])) == [17, 30]


@pytest.mark.parametrize("file", ["a.mp4", "a.avi"])
@pytest.mark.parametrize("order", ["all at once", "one by one", "backwards"])
def test_a_zeroed_middle(file: str, order: str, tmp_path: Path) -> None:
    codec = "libx264" if file == "a.mp4" else "mpeg4"
    path = write_video(tmp_path / file, 80, codec=codec, b_frames=0, faststart=True)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0)]
    data = bytearray(path.read_bytes())
    start, end = packets[28][0] + 12, packets[31][0] + packets[31][1]  # keyframes: 24, 36, 48 ...
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with open_video(path) as reader:
        assert len(reader) == 80
        wanted = {"one by one": range(80), "backwards": range(79, -1, -1)}.get(order, range(80))
        if order == "all at once":
            with pytest.raises(DecodeError, match=r"frame (28|29) of 80"):
                reader.frames(wanted)
        lost = set()
        for index in wanted:
            try:
                assert read_numbers(reader.frames([index])) == [index]
            except DecodeError as error:
                assert f"frame {index} of 80" in str(error)
                lost.add(index)
    if file == "a.mp4":
        assert lost == set(range(28, 36))  # until the next keyframe, all are made from the lost
    else:
        assert set(range(28, 36)) <= lost  # the chunks are lost, too: what follows has no number


@pytest.mark.parametrize("file", ["a.mp4", "a.avi"])
def test_cut_off_at_60_percent(file: str, tmp_path: Path) -> None:
    codec = "libx264" if file == "a.mp4" else "mpeg4"
    path = write_video(tmp_path / file, 80, codec=codec, faststart=True)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    sound, lost = set(), set()
    with open_video(path) as reader:
        assert 80 <= len(reader) <= 81  # an AVI writer counts one too many
        for index in range(len(reader)):
            try:
                assert read_numbers(reader.frames([index])) == [index]
                sound.add(index)
            except DecodeError as error:
                assert "cut off" in error.reason or "damaged" in error.reason
                lost.add(index)
        assert "can be found" in reader.check().reason
    assert max(sound) < min(lost)
    assert len(sound) > 20


def test_a_bit_flipped_in_one_packet_is_not_shown_as_if_sound(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 80, b_frames=0, codec_options={"crf": "10"})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0)]
    data = bytearray(path.read_bytes())
    data[packets[40][0] + 4] ^= 0x1F  # the kind of the picture: no longer a picture
    path.write_bytes(data)
    with open_video(path) as reader:
        for index in (39, 48, 79):
            assert read_numbers(reader.frames([index])) == [index]
        for index in (40, 41, 47):
            with pytest.raises(DecodeError, match=f"frame {index} of 80"):
                reader.frames([index])
        assert reader.check() == (72, reader.check().reason)
        assert "8 of 80 frames" in reader.check().reason


def test_what_is_no_video(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    mp4 = write_video(tmp_path / "a.mp4", 24, faststart=True).read_bytes()
    plain = write_video(tmp_path / "b.mp4", 24).read_bytes()
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.mp4")
    reasons = {
        tmp_path / "missing.mp4": "file not found",
        tmp_path / "link": "a link to nothing",
        tmp_path / "loop": "cannot be opened",
        tmp_path / "empty folder": "a folder without images",
        tmp_path / "pipe.mp4": "a named pipe, not a file",
        Path("/dev/zero"): "a device, not a file",
        file("empty.mp4", b""): r"empty file \(0 bytes\)",
        file("text.mp4", "Grüße, no video\n".encode() * 400): "not a video but text: 'Grüße, no",
        file("zeros.mp4", bytes(9000)): "begins with zeros only",
        file("random.mp4", random.Random(0).randbytes(9000)): "not a video, or damaged",
        file("no index.mp4", plain[: len(plain) * 6 // 10]): r"cut off: the index \(moov\)",
        file("half index.mp4", mp4[:300]): r"cut off inside its index \(moov\)",
        write_audio(tmp_path / "sound.mp4"): r"no video stream \(sound only\)",
    }
    for path, reason in reasons.items():
        for decoder in ("auto", "decord"):
            with pytest.raises(DecodeError, match=reason) as caught:
                open_video(path, decoder)
            assert caught.value.path == str(path)
    with pytest.raises(DecodeError, match="row 7: empty file"):
        open_video(b"", name="row 7")
    with pytest.raises(DecodeError, match="row 7: not a video but text"):
        open_video(b"hello there\n" * 9, name="row 7")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    path.chmod(0)
    with pytest.raises(DecodeError, match="no permission"):
        open_video(path)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    picture = write_video(tmp_path / "a.jpg", 1, codec="mjpeg").read_bytes()
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        cover = container.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 128, 96, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
        packet = av.Packet(picture)
        packet.stream, packet.pts, packet.dts = cover, 0, 0
        container.mux(packet)
    with pytest.raises(DecodeError, match="no video stream"):
        open_video(path)


@pytest.mark.parametrize("name", ["a:b #1 %20.mp4", "日本.mp4", "-x.mp4", os.fsdecode(b"\xff.mp4")])
def test_names_that_libav_could_misread(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("plain.mp4", 6).rename(name)
    for path in (name, tmp_path / name):
        with open_video(path) as reader:
            assert read_numbers(reader.frames([4])) == [4]


def test_nothing_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "a.mp4", 60)
    data = bytearray(path.read_bytes())
    for place in random.Random(0).sample(range(1000, len(data) // 2), 40):
        data[place] ^= 0x55
    path.write_bytes(data)
    capfd.readouterr()
    for decoder in ("pyav", "decord"):
        with open_or_skip(path, decoder) as reader:
            for index in range(60):
                try:
                    reader.frames([index])
                except DecodeError as error:
                    lost = error
    assert lost
    assert capfd.readouterr().err == ""


def test_no_handle_is_left_open(tmp_path: Path) -> None:
    good = write_video(tmp_path / "a.mp4", 8)
    text = tmp_path / "b.mp4"
    text.write_text("no video")
    gc.collect()  # of what other tests left behind
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(40):
        with open_video(good) as reader:
            reader.frames([3])
        for path in (text, write_audio(tmp_path / "c.mp4", 0.1)):
            with pytest.raises(DecodeError):
                open_video(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_decoder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    with pytest.raises(UserError, match=r"data.decoder=decrod: .*did you mean 'decord'"):
        open_video(path, "decrod")
    with pytest.raises(UserError, match="choose from auto, pyav"):
        open_video(path, "x")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="decord is not installed"):
        open_video(path, "decord")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match=r"vidtrain\[torchcodec\].*FFmpeg"):
        open_video(path, "torchcodec")


def test_a_folder_of_frames(tmp_path: Path) -> None:
    for number in range(1, 13):
        size = (64, 48) if number != 4 else (32, 24)
        picture = np.full((size[1], size[0], 3), number * 20, np.uint8)
        Image.fromarray(picture).save(tmp_path / f"img_{number}.png")  # 10 comes after 9
        Image.fromarray(picture).save(tmp_path / f"flow_x_{number}.jpg")
    (tmp_path / "notes.txt").write_text("no frame")
    with open_video(tmp_path, fps=12.5) as reader:
        assert (len(reader), reader.fps, reader.width, reader.height) == (12, 12.5, 64, 48)
        frames = reader.frames([9, 0, 3, 9])
        assert frames.shape == (4, 3, 48, 64)
        assert frames.permute(0, 2, 3, 1).is_contiguous()
        assert frames[:, 0, 0, 0].tolist() == [200, 20, 80, 200]
        with pytest.raises(IndexError, match="frame 12 asked of 12"):
            reader.frames([12])
    (tmp_path / "img_6.png").write_bytes((tmp_path / "img_6.png").read_bytes()[:50])
    with open_video(tmp_path) as reader:
        assert reader.frames([4]).shape[0] == 1
        with pytest.raises(DecodeError, match=r"frame 5 of 12 \(img_6.png\)"):
            reader.frames([5])


def sequential(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


REAL = [
    "ava_like_6fps.mp4",
    "kinetics_arm_wrestling.mp4",
    "kinetics_test.mp4",
    "structuralize_29.97fps.mp4",
    "ucf_test.avi",
]


@pytest.mark.parametrize("file", REAL)
def test_real_videos(file: str, shared: Path) -> None:
    path = shared / "videos" / file
    expected = sequential(path)
    chance = random.Random(0)
    indices = [chance.randrange(len(expected)) for _ in range(12)]
    with open_video(path) as reader:
        assert len(reader) == len(expected)
        assert reader.check() == (len(expected), None)
        frames = reader.frames(indices).permute(0, 2, 3, 1).numpy()
        assert (frames == expected[indices]).all()
    for decoder in ("decord", "torchcodec"):
        try:
            reader = open_video(path, decoder)
        except (DecodeError, UserError) as error:
            assert "pyav" in str(error) or isinstance(error, UserError)
            continue
        with reader:
            assert len(reader) == len(expected)
            others = reader.frames(indices).permute(0, 2, 3, 1).numpy()
            # colours are converted a little differently; another frame would be far off
            assert abs(others.astype(int) - expected[indices]).mean() < 2
