"""Damaged videos by the thousand: nothing crashes, hangs or is misread (see scripts/fuzz.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from av.container import InputContainer
from av.video.stream import VideoStream
from make_video import write_packed_avi, write_video

from vidtrain.data.readers.index import read_index

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"


def fuzz(videos: list[Path], count: int, seed: int = 0) -> str:
    command = [sys.executable, SCRIPT, *videos, f"--count={count}", f"--seed={seed}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class EndsBadly:
    """A container whose reading ends as PyAV's does where streams have turned up on the way."""

    def __init__(self, container: InputContainer) -> None:
        self.container = container

    def __getattr__(self, name: str) -> object:
        return getattr(self.container, name)

    def demux(self, stream: VideoStream) -> Iterator[av.Packet]:
        yield from self.container.demux(stream)
        raise IndexError("list index out of range")


def test_streams_that_turn_up_on_the_way_are_no_damage(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", 12)
    with av.open(str(path)) as container:
        expected = read_index(container, container.streams.video[0])
    with av.open(str(path)) as container:
        index = read_index(EndsBadly(container), container.streams.video[0])  # type: ignore[arg-type]
    assert index.missing is None
    assert index.order.tolist() == expected.order.tolist()
    assert len(index.order) == 12


@pytest.mark.slow
def test_two_thousand_mutations_of_real_videos(shared: Path) -> None:
    said = fuzz(sorted((shared / "videos").iterdir()), 2000)
    assert "check_files: 2000 files" in said
    assert "training: 2000 clips" in said


@pytest.mark.slow
def test_mutations_of_other_kinds_of_video(tmp_path: Path) -> None:
    kinds = {
        "open.mp4": {"open_gop": True, "audio": True},
        "hevc.mp4": {"codec": "libx265"},
        "vp9.webm": {"codec": "libvpx-vp9"},
        "av1.mp4": {"codec": "libsvtav1"},
        "a.ts": {},
        "a.flv": {},
        "a.mpg": {"codec": "mpeg2video", "fps": 25},
        "a.gif": {"codec": "gif"},
        "mjpeg.avi": {"codec": "mjpeg"},
    }
    videos = [write_video(tmp_path / name, 40, **options) for name, options in kinds.items()]
    fuzz([*videos, write_packed_avi(tmp_path / "packed.avi")], 1000)
