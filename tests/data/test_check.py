from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from check_stand_ins import look_at
from make_video import write_audio, write_video

from vidtrain.data.check import Leak, Probe, check_files, leaks, probe, write_table
from vidtrain.types import UserError


def test_a_sound_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 30, fps=20, size=(96, 64), rotation=90)
    expected = Probe(str(path), True, 30, 20.0, 96, 64, 1.5, None)
    for decoder in ("auto", "pyav", "decord"):
        assert probe(path, decoder) == expected


def bad_files(folder: Path) -> dict[Path, str]:
    """One of each kind, and a part of the reason it must be named with."""
    plain = write_video(folder / "plain.mp4", 80, b_frames=0).read_bytes()
    fast = write_video(folder / "fast.mp4", 80, faststart=True).read_bytes()
    mkv = write_video(folder / "sound.mkv", 80).read_bytes()
    avi = write_video(folder / "sound.avi", 80, codec="mpeg4").read_bytes()
    frames = folder / "frames"
    frames.mkdir()
    (frames / "img_1.jpg").write_bytes(b"no picture")
    os.mkfifo(folder / "pipe.mp4")

    def file(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def zeroed(data: bytes, start: float = 0.45, end: float = 0.55) -> bytes:
        start, end = int(start * len(data)), int(end * len(data))
        return data[:start] + bytes(end - start) + data[end:]

    return {
        file("empty.mp4", b""): "empty file",
        file("text.mp4", b"this is text\n" * 99): "not a video but text",
        file("cut.mp4", plain[: len(plain) * 6 // 10]): "cut off: the index (moov)",
        file("cut fast.mp4", fast[: len(fast) * 6 // 10]): "of its 80 frames can be found",
        file("cut.mkv", mkv[: len(mkv) * 6 // 10]): "bytes are there",
        file("cut.avi", avi[: len(avi) * 6 // 10]): "frames can be found",
        write_audio(folder / "audio.mp4"): "sound only",
        file("zeroed.mp4", zeroed(plain)): "frames do not decode",
        file("zeroed.mkv", zeroed(mkv, 0.35, 0.4)): "of 3.3 seconds",
        file("zeroed.avi", zeroed(avi)): "frames can be found",
        folder / "missing.mp4": "file not found",
        folder / "pipe.mp4": "a named pipe",
        Path("/dev/zero"): "a device",
        frames: "frame 0 of 1 (img_1.jpg)",
        file("half.mp4", random.Random(0).randbytes(999)): "not a video",
    }


def test_bad_files_are_named_each_with_its_reason(tmp_path: Path) -> None:
    reasons = bad_files(tmp_path)
    sound = [tmp_path / name for name in ("plain.mp4", "fast.mp4", "sound.mkv", "sound.avi")]
    paths = [*reasons, *sound]
    probes = list(check_files(paths, workers=2, time_limit=30))
    assert [result.path for result in probes] == [str(path) for path in paths]
    for result, reason in zip(probes, reasons.values(), strict=False):
        assert not result.ok
        assert reason in (result.error or ""), result
    assert all(result.ok and result.frames == 80 for result in probes[len(reasons) :])


def test_damage_is_found_whatever_the_decoder(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, gop=12, b_frames=0)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(data)
    for decoder in ("auto", "decord"):
        result = probe(path, decoder)
        assert not result.ok
        assert "frames do not decode" in result.error
        assert result.frames == 60
    refused = probe(write_video(tmp_path / "b.mp4", open_gop=True), "decord")
    assert "decord may show wrong frames" in refused.error


def test_time_without_frames_where_no_index_tells_of_it(tmp_path: Path) -> None:
    """Matroska has no list of frames: a lost stretch shows only as a gap."""
    times = [40 * i if i < 20 else 40 * i + 3000 for i in range(40)]
    result = probe(write_video(tmp_path / "a.mkv", 40, pts=times))
    assert result.error == "damaged: no frame between 0.8 and 3.8 seconds"
    assert probe(write_video(tmp_path / "a.mp4", 40, pts=times)).ok


def test_what_hangs_or_crashes_is_named_and_the_rest_goes_on() -> None:
    paths = [
        "slow1",
        "hang",
        "good1",
        "crash",
        "good2",
        "kill",
        "exit",
        *[f"x{i}" for i in range(9)],
    ]
    seen = []
    results = list(check_files(paths, 2, time_limit=1.0, progress=seen.append, look=look_at))
    assert [result.path for result in results] == paths
    assert sorted(seen) == sorted(results)
    errors = {result.path: result.error for result in results if not result.ok}
    assert errors == {
        "hang": "took longer than 1 s",
        "crash": "the decoder crashed (signal 11)",
        "kill": "the process was killed (signal 9): out of memory, perhaps",
        "exit": "the decoder ended the process (exit code 3)",
    }
    assert multiprocessing.active_children() == []


def test_leaving_the_loop_ends_all_processes() -> None:
    results = check_files(
        (f"{kind}{i}" for i in range(999) for kind in ("x", "hang")), 2, look=look_at
    )
    next(results)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert multiprocessing.active_children() == []


def test_no_file_and_a_wrong_decoder() -> None:
    assert list(check_files([], 2)) == []
    with pytest.raises(UserError, match="did you mean 'pyav'"):
        check_files([], 2, decoder="pyva")


def alive_in_group(group: int) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = status.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(status.parent.name)
    return found


def test_ctrl_c_leaves_no_process_and_no_noise(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from check_stand_ins import look_at\n"
        "from vidtrain.data.check import check_files\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        for result in check_files(['x', 'hang', 'hang'], 2, look=look_at):\n"
        "            print(result.path, flush=True)\n"
        "    except KeyboardInterrupt:\n"
        "        sys.exit(130)\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "x\n"
    assert len(alive_in_group(process.pid)) >= 3
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == ""
    for _ in range(50):
        if not alive_in_group(process.pid):
            return
        time.sleep(0.1)
    pytest.fail(f"processes left: {alive_in_group(process.pid)}")


def test_the_table(tmp_path: Path) -> None:
    probes = [
        Probe("a, b.mp4", True, 300, 29.97, 340, 256, 10.01),
        Probe('c "d".mp4', False, error="empty file (0 bytes)"),
        Probe(os.fsdecode(b"\xff.mp4"), True),
    ]
    write_table(iter(probes), tmp_path / "table.csv")
    with open(
        tmp_path / "table.csv", newline="", encoding="utf-8", errors="surrogateescape"
    ) as file:
        first, second, third = csv.DictReader(file)
    assert list(first) == ["path", "ok", "frames", "fps", "width", "height", "duration", "error"]
    assert list(first.values()) == ["a, b.mp4", "True", "300", "29.97", "340", "256", "10.01", ""]
    assert (second["path"], second["ok"], second["frames"]) == ('c "d".mp4', "False", "")
    assert second["error"] == "empty file (0 bytes)"
    assert third["path"] == os.fsdecode(b"\xff.mp4")


def test_a_group_in_two_splits_is_a_leak() -> None:
    rows = [
        ("a", "train", "g1", 0),
        ("b", "train", "g1", 0),
        ("c", "train", "g2", 0),
        ("d", "test", "g2", 0),
        ("e", "val", "g2", 0),
        ("f", "train", None, 0),
        ("g", "test", None, 0),
    ]
    assert leaks(rows) == [Leak("group", "group 'g2' is in test, train and val", ("c", "d", "e"))]


def test_copies_of_a_file(tmp_path: Path) -> None:
    big = random.Random(0).randbytes(100_000)
    contents = {
        "one": b"1234",
        "same size": b"5678",
        "one again": b"1234",
        "big": big,
        "big again": big,
        "same beginning": big[:-1] + b"x",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    path = {name: str(tmp_path / name) for name in [*contents, "missing", "missing too"]}

    def found(*rows: tuple[str, str, list[int]]) -> list[tuple[str, set[str]]]:
        result = leaks((path[name], split, None, labels) for name, split, labels in rows)
        return [(leak.kind, {Path(each).name for each in leak.paths}) for leak in result]

    all_train = [(name, "train", [0]) for name in path]
    assert found(*all_train) == []
    across = [("one", "train", [0]), ("same size", "test", [0]), ("one again", "test", [0])]
    assert found(*across) == [("content", {"one", "one again"})]
    assert found(("big", "train", [0]), ("same beginning", "test", [0])) == []
    assert found(("big", "train", [0]), ("big again", "val", [1])) == [
        ("content", {"big", "big again"}),
        ("label", {"big", "big again"}),
    ]
    # many labels of one file, a row each, are no contradiction; the same file in two splits leaks
    assert found(("one", "train", [0]), ("one", "train", [1])) == []
    assert found(("one", "train", [0]), ("one", "test", [0])) == [("content", {"one"})]


def test_real_videos(shared: Path) -> None:
    paths = sorted((shared / "videos").iterdir())
    assert len(paths) >= 5
    results = list(check_files(paths, 2))
    assert [(result.path, result.error) for result in results] == [(str(p), None) for p in paths]
    assert [result.frames for result in results] == [57, 280, 300, 300, 164]
