"""Opening good and bad files for hours costs neither memory nor file handles."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from corpus import CASES
from corpus_outcomes import DECODERS, installed
from make_video import write_video

FILES = (
    *("sound.mp4", "MPEG-4.avi", "packed.avi", "H.264.flv", "VP9.webm", "open GOP.mp4"),
    *("edit list.mp4", "rotated 90.mp4", "one frame.mkv", "folder", "non-monotonic timestamps.mkv"),
    *("empty.mp4", "text.mp4", "missing.mp4", "sound only.mp4", "missing moov.mp4", "random.avi"),
    *("cut at 60 %.mp4", "cut at 60 %.avi", "zeroed middle.mp4", "zeroed middle.mkv"),
    *("flipped bits 0.mp4", "flipped bits 1.mp4", "huge.gif", "playlist.m3u8"),
)
SCRIPT = Path(__file__).with_name("open_often.py")
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks /proc")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for name in FILES:
        CASES[name].make(folder / name)
    return [folder / name for name in FILES]


def growth(files: list[Path], decoders: str, start: str, count: int) -> tuple[int, float]:
    """Return how many files were left open, and the bytes of memory that an open leaves behind."""
    said = subprocess.check_output(
        [sys.executable, SCRIPT, decoders, start, str(count), *files],
        cwd=SCRIPT.parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return judge(json.loads(said), count)


def judge(held: list[dict[str, int]], count: int) -> tuple[int, float]:
    rounds = [after["memory"] - before["memory"] for before, after in pairwise(held)]
    return held[-1]["files"] - held[0]["files"], statistics.median(rounds) / count


@linux
def test_some_hundred_opens(files: list[Path]) -> None:
    left_open, leaked = growth(files, "pyav", "spawn", 100)
    assert left_open == 0
    assert leaked < 500
    decoders = "pyav,decord" if installed("decord", files[0]) else "pyav"
    left_open, leaked = growth(files[::2], decoders, "fork", 100)
    assert left_open == 0
    assert leaked < 5000  # decord's comes and goes; `slow` tells that from a leak


@linux
@pytest.mark.slow
@pytest.mark.parametrize("start", ["here", "fork", "spawn"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_five_thousand_opens(decoder: str, start: str, files: list[Path]) -> None:
    if not installed(decoder, files[0]):
        pytest.skip(f"{decoder} is not installed")
    left_open, leaked = growth(files, decoder, start, 1000)
    assert left_open == 0
    assert leaked < (500 if decoder == "decord" else 100)


@linux
@pytest.mark.slow
def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    """The same script with a reader that keeps 2 KiB and a file of each open."""
    leaky = tmp_path / "leaky.py"
    leaky.write_text(
        "import sys, runpy\n"
        "import vidtrain.data.decode as decode\n"
        "kept, honest = [], decode.open_video\n"
        "def leak(path, decoder):\n"
        "    kept.append((bytes(2048), open(path, 'rb')))\n"
        "    return honest(path, decoder)\n"
        "decode.open_video = leak\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    video = write_video(tmp_path / "a.mp4", 3)
    command = [sys.executable, leaky, "pyav", "here", "100", video]
    said = subprocess.check_output(command, cwd=SCRIPT.parents[2], text=True)
    left_open, leaked = judge(json.loads(said), 100)
    assert left_open == 500
    assert leaked > 2000
