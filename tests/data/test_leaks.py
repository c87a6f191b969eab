"""Opening good and bad files for hours costs neither memory nor file handles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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


def growth(files: list[Path], runs: list[tuple[str, str]], count: int) -> Iterator[dict[str, int]]:
    """Run the script for each (decoder, start), two at a time."""
    for first in range(0, len(runs), 2):
        processes = [
            subprocess.Popen(
                [sys.executable, SCRIPT, *run, str(count), *files],
                stdout=subprocess.PIPE,
                text=True,
                cwd=SCRIPT.parents[2],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for run in runs[first : first + 2]
        ]
        for process in processes:
            said, _ = process.communicate()
            assert process.returncode == 0
            before, after = json.loads(said)
            yield {what: after[what] - before[what] for what in before}


def check(files: list[Path], starts: list[tuple[str, str]], count: int, most: int) -> None:
    runs = [run for run in starts if installed(run[0], files[0])]
    found = dict(zip(runs, growth(files, runs, count), strict=True))
    assert {run: grown["files"] for run, grown in found.items() if grown["files"]} == {}
    assert {run: grown["memory"] for run, grown in found.items() if grown["memory"] > most} == {}


@linux
def test_some_hundred_opens(files: list[Path]) -> None:
    starts = [*((decoder, "fork") for decoder in DECODERS), ("pyav", "spawn")]
    check(files, starts, 400, most=256 << 10)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("start", ["here", "fork", "spawn"])
def test_five_thousand_opens(start: str, files: list[Path]) -> None:
    check(files, [(decoder, start) for decoder in DECODERS], 5000, most=512 << 10)


@linux
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
    command = [sys.executable, leaky, "pyav", "here", "400", video]
    before, after = json.loads(subprocess.check_output(command, cwd=SCRIPT.parents[2], text=True))
    assert after["files"] - before["files"] == 400
    assert after["memory"] - before["memory"] > 256 << 10
