from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from crew_stand_ins import no_space
from make_video import read_numbers, write_audio, write_resizing_video, write_video
from PIL import Image

from vidtrain.data import manifest as manifests
from vidtrain.data import resize as resizing
from vidtrain.data.decode import open_video
from vidtrain.data.encode import Settings, encode, target_size
from vidtrain.data.ledger import PARTS
from vidtrain.data.manifest import Manifest
from vidtrain.data.prepare import folder
from vidtrain.data.resize import Failed, Job, Outcome, cpu_per_clip, make, resize
from vidtrain.types import DecodeError, UserError

SMALL = Settings(short_side=48)


def facts(path: Path) -> tuple[list[int], tuple[int, int], list[Fraction]]:
    """The numbers of all frames, the size as shown, and when each is shown, from 0 on."""
    with open_video(path) as reader:
        numbers = read_numbers(reader.frames(range(len(reader))))
        size = reader.width, reader.height
        order = reader.index.order
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        times = [packets[place].pts * stream.time_base for place in order]
    return numbers, size, [t - times[0] for t in times]


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((340, 256), 320, (340, 256)),
        ((1920, 1080), 320, (568, 320)),
        ((1080, 1920), 256, (256, 456)),
        ((97, 65), 320, (96, 64)),
        ((641, 480), 320, (428, 320)),
        ((3, 3), 320, (2, 2)),
        ((2000, 20), 16, (1600, 16)),
    ],
)
def test_the_size_is_even_and_never_larger(size, short_side, expected) -> None:
    assert target_size(*size, short_side) == expected


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("a.mp4", {}, (64, 48)),
        ("a.mp4", {"rotation": 90, "size": (96, 64)}, (72, 48)),
        ("a.mp4", {"rotation": 180}, (64, 48)),
        ("a.mp4", {"rotation": 270, "size": (64, 96)}, (48, 72)),
        ("a.mp4", {"edit": (5, 20)}, (64, 48)),
        ("a.mp4", {"size": (97, 65), "pix_fmt": "yuv444p"}, (72, 48)),
        ("a.mp4", {"size": (33, 45), "pix_fmt": "yuv444p"}, (32, 44)),
        ("a.mp4", {"pix_fmt": "yuv420p10le"}, (64, 48)),
        ("a.mp4", {"open_gop": True, "gop": 8}, (64, 48)),
        ("a.mp4", {"fps": Fraction(30000, 1001)}, (64, 48)),
        ("a.mp4", {"num_frames": 1}, (64, 48)),
        ("a.avi", {"codec": "mpeg4", "fps": 25}, (64, 48)),
        ("a.mov", {"codec": "mjpeg"}, (64, 48)),
        ("a.gif", {"codec": "gif", "fps": 20}, (64, 48)),
        ("a.ts", {}, (64, 48)),
    ],
)
def test_the_same_frames_at_the_same_times(tmp_path, name, options, size) -> None:
    source = write_video(tmp_path / name, **{"num_frames": 30, **options})
    target = tmp_path / "out"
    made = encode(str(source), str(target), SMALL)
    numbers, _, times = facts(source)
    found, found_size, found_times = facts(target)
    assert found == numbers and -1 not in found
    assert found_size == (made.width, made.height) == size
    assert made.frames == len(numbers)
    assert found_times == pytest.approx(times, abs=1e-3)
    with open_video(source) as before, open_video(target) as after:
        assert after.fps == pytest.approx(before.fps)
        assert after.index.certain and after.index.groups == "closed"
    with av.open(str(target)) as container:
        codec = container.streams.video[0].codec_context
        assert (container.format.name.split(",")[0], codec.name) == ("mov", "h264")
        assert codec.pix_fmt == "yuv420p"


def test_colours_stay(tmp_path: Path) -> None:
    colours = [0, 7, 56, 448, 511, 219]
    for codec, options in (("libx264", {"pix_fmt": "yuvj420p"}), ("libx264", {}), ("mjpeg", {})):
        bt709 = {"colorspace": "bt709"} if codec == "libx264" and not options else {}
        source = write_video(
            tmp_path / "a.mov", 6, codec=codec, numbers=colours, pattern="flat", codec_options=bt709, **options
        )  # fmt: skip
        encode(str(source), str(tmp_path / "out.mp4"), SMALL)
        with open_video(source) as a, open_video(tmp_path / "out.mp4") as b:
            before, after = (r.frames(range(6)).float().mean((2, 3)) for r in (a, b))
        assert (before - after).abs().max() < 4


def test_a_variable_rate_and_a_late_start(tmp_path: Path) -> None:
    pts = [500, 540, 600, 630, 700, 1100, 1110, *range(1300, 3000, 100)]
    source = write_video(tmp_path / "a.mkv", len(pts), pts=pts, audio=True)
    encode(str(source), str(tmp_path / "out.mp4"), SMALL)
    assert facts(tmp_path / "out.mp4")[2] == [Fraction(p - 500, 1000) for p in pts]
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.start_time * video.time_base == Fraction(1, 2)
        assert audio.start_time * audio.time_base == pytest.approx(0, abs=0.001)


def test_pixels_that_are_not_square_and_a_size_that_changes(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 8, codec_options={"aspect": "2:1"}, size=(96, 96))
    with av.open(str(source)) as container:
        expected = container.streams.video[0].sample_aspect_ratio
    encode(str(source), str(tmp_path / "out.mp4"), SMALL)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == expected
    source = write_resizing_video(tmp_path / "b.mp4", [(128, 96), (64, 48)])
    assert encode(str(source), str(tmp_path / "out.mp4"), Settings(short_side=64))[:3] == (
        24,
        86,
        64,
    )
    assert facts(tmp_path / "out.mp4")[0] == list(range(24))


def test_sound_is_copied_or_converted(tmp_path: Path) -> None:
    def sound(path: Path) -> tuple[str, list[bytes]]:
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            return stream.codec_context.codec.canonical_name, [
                bytes(packet) for packet in container.demux(stream) if packet.size
            ]

    for name, codec in (("a.mp4", "libx264"), ("a.avi", "mpeg4")):
        source = write_video(tmp_path / name, 30, codec=codec, audio=True)
        made = encode(str(source), str(tmp_path / "out.mp4"), SMALL)
        assert sound(tmp_path / "out.mp4") == sound(source)
        assert made.sound == f"{sound(source)[0]} copied"
    with av.open(str(tmp_path / "b.mov"), "w") as container:
        video = container.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=22050)
        audio.layout = "stereo"
        wave = np.sin(np.arange(22050) / 10) * 9000
        frame = av.AudioFrame.from_ndarray(
            np.repeat(wave.astype(np.int16), 2)[None], format="s16", layout="stereo"
        )
        frame.sample_rate = 22050
        container.mux(audio.encode(frame))
        for _ in range(24):
            container.mux(video.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux([*video.encode(), *audio.encode()])
    made = encode(str(tmp_path / "b.mov"), str(tmp_path / "out.mp4"), SMALL)
    assert made.sound == "pcm_s16le converted to AAC"
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
        samples = np.concatenate(frames, 1)
        assert container.streams.audio[0].codec_context.sample_rate == 22050
    assert samples.shape[1] == pytest.approx(22050, rel=0.1)
    loudness = np.sqrt(np.mean(samples**2))  # of a sine its height by the root of two
    assert loudness == pytest.approx(9000 / 32768 / 2**0.5, rel=0.1)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    from make_video import draw_number

    (tmp_path / "frames").mkdir()
    for number in range(40):
        Image.fromarray(draw_number(number, (64, 48))).save(tmp_path / f"frames/{number:03}.png")
    made = encode(str(tmp_path / "frames"), str(tmp_path / "out.mp4"), Settings())
    assert made == (40, 64, 48, None)
    assert facts(tmp_path / "out.mp4")[0] == list(range(40))


def test_clips_of_it_decode_fast(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 120, gop=250)
    encode(str(source), str(tmp_path / "out.mp4"), Settings(keyframe_every=16))
    with open_video(tmp_path / "out.mp4") as reader:
        index = reader.index
    assert np.diff([*index.key_ranks, 120]).max() <= 16
    assert index.skippable.mean() > 0.6  # never decoded, unless wanted
    assert (tmp_path / "out.mp4").read_bytes()[32:].find(b"moov") < 200  # before the data


def test_a_gain_is_measured(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 200, gop=250, size=(320, 240))
    encode(str(source), str(tmp_path / "out.mp4"), Settings(short_side=64))
    before, after = cpu_per_clip([(str(source), str(tmp_path / "out.mp4"))], clips=3)
    assert 0 < 1.2 * after < before < 1
    assert cpu_per_clip([(str(source), str(source))], 1, 1)[0] > 0


def test_damaged_sources_are_refused(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", 80, b_frames=0).read_bytes()
    middle = len(whole) // 2
    (tmp_path / "b.mp4").write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    (tmp_path / "c.mp4").write_bytes(whole[:middle])
    for name, reason in (("b.mp4", "do not decode"), ("c.mp4", "cut off")):
        with pytest.raises(DecodeError, match=reason):
            encode(str(tmp_path / name), str(tmp_path / "out.mp4"), SMALL)
        job = Job(name, str(tmp_path / name), str(tmp_path / "part"), str(tmp_path / "o/x"), SMALL)
        result = make(job)
        assert isinstance(result, Failed) and reason in result.reason and not result.full
        assert not (tmp_path / "part").exists() and not (tmp_path / "o").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_is_told_from_a_bad_video(tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.mp4", 30, audio=True)
    os.symlink("/dev/full", tmp_path / "part")
    result = make(Job("a", str(source), str(tmp_path / "part"), str(tmp_path / "o"), SMALL))
    assert isinstance(result, Failed) and result.full


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A table of pieces, several of one file, with groups, classes and splits."""
    root = tmp_path / "videos"
    (root / "sub").mkdir(parents=True)
    write_video(root / "a.avi", 40, codec="mpeg4", fps=20)
    write_video(root / "sub" / "b.mp4", 30)
    write_video(root / "sub" / "c.d.mkv", 20)
    (root / "videos.csv").write_text(
        "path,label,split,start,end,group\n"
        "a.avi,jump,train,0,1,g1\n"
        "a.avi,run,train,1,2,g1\n"
        "sub/b.mp4,run,train,,,g2\n"
        "sub/c.d.mkv,jump,test,,,g3\n"
    )
    return root


def manifest_of(root: Path, path: Path) -> Manifest:
    manifests.save(folder.prepare(root, val_fraction=0), path, "folder", root)
    return Manifest(path)


def rows_of(found: Manifest) -> list[tuple]:
    rows = [found.row(i) for i in range(len(found))]
    return [
        (r.path, [found.label_names[k] for k in r.labels], r.split, r.start, r.end, r.group)
        for r in rows
    ]


def run(root: Path, output: Path, split: str | None = None, settings: Settings = SMALL) -> Outcome:
    return resize(manifest_of(root, root.parent / "m.arrow"), split, output, settings, workers=2)


def test_the_result_is_a_dataset(dataset: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    before = manifest_of(dataset, tmp_path / "m.arrow")
    outcome = resize(
        before, None, tmp_path / "o", SMALL, workers=2, progress=lambda *n: seen.append(n)
    )
    assert (outcome.made, outcome.failed) == (3, [])
    assert seen == [(1, 3), (2, 3), (3, 3)]
    after = manifest_of(tmp_path / "o", tmp_path / "n.arrow")
    names = {"a.avi": "a.mp4", "sub/b.mp4": "sub/b.mp4", "sub/c.d.mkv": "sub/c.d.mp4"}
    assert rows_of(after) == [(names[path], *rest) for path, *rest in rows_of(before)]
    assert after.label_names == before.label_names
    files = {str(p.relative_to(tmp_path / "o")) for p in (tmp_path / "o").rglob("*") if p.is_file()}
    assert files == {*names.values(), "videos.parquet", resizing.LEDGER}


def test_what_is_there_is_not_made_again(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    assert run(dataset, output, "test").made == 1
    assert rows_of(manifest_of_rows(output))[0][0] == "sub/c.d.mp4"
    first = (output / "sub/c.d.mp4").stat().st_mtime_ns
    assert run(dataset, output).made == 2
    assert run(dataset, output).made == 0
    assert (output / "sub/c.d.mp4").stat().st_mtime_ns == first
    os.utime(dataset / "a.avi", ns=(1, 1))  # another source
    assert run(dataset, output).made == 1
    (output / "a.mp4").write_bytes(b"not as it was left")
    assert run(dataset, output).made == 1
    (output / "a.mp4").unlink()
    with (output / resizing.LEDGER).open("a") as ledger:
        ledger.write('{"path": "sub/b.m')  # a line cut off
    assert run(dataset, output).made == 1
    assert run(dataset, output).made == 0
    outcome = run(dataset, output, settings=Settings(short_side=32))
    assert outcome.made == 3
    with open_video(output / "sub/b.mp4") as reader:
        assert reader.height == 32


def manifest_of_rows(output: Path) -> Manifest:
    """The table alone, where one class is too few for `prepare`."""
    found = folder.from_table(output, output / "videos.parquet", dict(folder.COLUMNS))
    manifests.save(found, output.parent / "rows.arrow", "folder", output)
    return Manifest(output.parent / "rows.arrow")


def test_a_damaged_source_is_named_and_the_others_go_on(dataset: Path, tmp_path: Path) -> None:
    write_audio(dataset / "sub" / "b.mp4")
    outcome = run(dataset, tmp_path / "o")
    assert outcome.failed == [("sub/b.mp4", "no video stream (sound only)", False)]
    assert outcome.made == 2
    assert not (tmp_path / "o/sub/b.mp4").exists()
    assert [row[0] for row in rows_of(manifest_of(tmp_path / "o", tmp_path / "n"))] == [
        "a.mp4", "a.mp4", "sub/c.d.mp4"
    ]  # fmt: skip
    write_video(dataset / "sub" / "b.mp4", 30)
    assert run(dataset, tmp_path / "o").made == 1
    for name in ("a.avi", "sub/b.mp4", "sub/c.d.mkv"):
        (dataset / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"not one video could be made; .*: empty file"):
        run(dataset, tmp_path / "p")


def test_a_full_disk_stops_the_run(dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(resizing, "make", no_space)
    with pytest.raises(UserError, match="No space left on device; make room, and the same command"):
        run(dataset, tmp_path / "o")
    assert not (tmp_path / "o" / PARTS).exists()


def test_folders_that_are_refused(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(dataset)
    (tmp_path / "file").write_text("")
    for output, message in (
        (dataset, "within one another"),
        (dataset / "small", "within one another"),
        (tmp_path, "within one another"),
        (tmp_path / "link", "within one another"),
        (tmp_path / "full", "has other things in it"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            run(dataset, output)
    assert not list(tmp_path.rglob(resizing.LEDGER))


def test_names_that_would_clash_and_settings_that_are_wrong(tmp_path: Path) -> None:
    (tmp_path / "v.mp4.d").mkdir()
    names = resizing.target_names(str(tmp_path), ["x/a.avi", "b.tar", "v.mp4.d"])
    assert names == {"x/a.avi": "x/a.mp4", "b.tar": "b.tar.mp4", "v.mp4.d": "v.mp4.d.mp4"}
    with pytest.raises(UserError, match=r"a.avi and a.mkv under .* become a.mp4"):
        resizing.target_names(str(tmp_path), ["a.avi", "b.avi", "a.mkv"])
    for wrong, message in (
        ({"short_side": 8}, "resize.short_side is 8"),
        ({"crf": "low"}, "resize.crf is 'low'"),
        ({"keyframe_every": 1.5}, "resize.keyframe_every is 1.5"),
        ({"preset": "quick"}, "resize.preset is 'quick'; choose from ultrafast"),
        ({"tune": "fast"}, "resize.tune is 'fast'; choose from fastdecode, .*null"),
    ):
        with pytest.raises(UserError, match=message):
            resizing.check_settings(Settings(**wrong))


def test_two_runs_at_once_are_refused(dataset: Path, tmp_path: Path) -> None:
    with (
        resizing.ledger_of(tmp_path / "o", SMALL),
        pytest.raises(UserError, match="another action=resize is writing"),
    ):
        run(dataset, tmp_path / "o")


SCRIPT = """
import sys
from pathlib import Path
from vidtrain.data.encode import Settings
from vidtrain.data.manifest import Manifest
from vidtrain.data.resize import resize
if __name__ == "__main__":
    source = Manifest(Path(sys.argv[1]))
    resize(source, None, Path(sys.argv[2]), Settings(preset="slower"), workers=1)
"""


def start(output: Path, *words: str) -> subprocess.Popen:
    """Start a run, and come back as soon as it has made two videos."""
    environment = os.environ | {"VIDTRAIN_CACHE": str(output.parent / "cache")}
    process = subprocess.Popen(
        [sys.executable, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    ledger = output / resizing.LEDGER
    for _ in range(1200):
        if ledger.exists() and ledger.read_text().count("\n") >= 2:
            return process
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing was made in a minute")


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    root = tmp_path / "videos"
    for number in range(12):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        write_video(root / "ab"[number % 2] / f"{number}.mp4", 50, size=(160, 120))
    return root


def test_ctrl_c_stops_and_the_same_command_goes_on(twelve: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    process = start(
        output, "-c", "from vidtrain.cli import main; main()", "data", "action=resize",
        "data=folder", f"data.root={twelve}", f"output={output}", "data.workers=1",
        "resize.preset=slower",
    )  # fmt: skip
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on with the rest" in said and "Traceback" not in said
    assert not (output / PARTS).exists()
    made = whole_videos(output)
    assert 2 <= made < 12
    outcome = run(twelve, output, settings=Settings(preset="slower"))
    assert (len(outcome.videos), outcome.made, whole_videos(output)) == (12, 12 - made, 12)


def test_a_run_that_is_killed_leaves_whole_videos(twelve: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    manifest_of(twelve, tmp_path / "m.arrow")
    (tmp_path / "script.py").write_text(SCRIPT)
    process = start(output, str(tmp_path / "script.py"), str(tmp_path / "m.arrow"), str(output))
    os.kill(process.pid, signal.SIGKILL)  # the process that it started finishes what it is at
    process.communicate(timeout=30)
    assert 2 <= whole_videos(output) < 12
    outcome = run(twelve, output, settings=Settings(preset="slower"))
    assert outcome.made < 12 == len(outcome.videos) == whole_videos(output)
    assert not (output / PARTS).exists()


def whole_videos(output: Path) -> int:
    paths = list(output.glob("?/*"))
    for path in paths:
        with open_video(path) as reader:
            assert len(reader) == 50 and reader.check().reason is None
    return len(paths)
