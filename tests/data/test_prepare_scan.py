from __future__ import annotations

import os
from pathlib import Path

import pytest

from vidtrain.data.prepare.scan import find_videos


def touch(root: Path, *names: str | bytes) -> None:
    for name in names:
        path = Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root: Path, notes: list[str] | None = None) -> dict[str, str]:
    table = find_videos(root, [] if notes is None else notes)
    return dict(zip(table["path"].to_pylist(), table["stem"].to_pylist(), strict=True))


def test_videos_of_any_name_and_depth(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *("b/-x_y_.MP4", "a b/c/#1 (x).avi", "z.webm", "a.b.mkv", "ü.mp4"),
        *("notes.txt", "mp4", ".hidden.mp4", "._b.mp4", ".cache/x.mp4", "a/x.mp4.part"),
    )
    assert found(tmp_path) == {
        "a b/c/#1 (x).avi": "#1 (x)",
        "a.b.mkv": "a.b",
        "b/-x_y_.MP4": "-x_y_",
        "z.webm": "z",
        "ü.mp4": "ü",
    }
    assert list(found(tmp_path)) == sorted(found(tmp_path))


def test_folders_of_frames(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *("frames/v_1.2/img_00001.jpg", "frames/v_1.2/img_00002.jpg", "frames/v_1.2/times.txt"),
        *("clips/a.mp4", "clips/a.jpg"),  # a thumbnail beside its video
        *("covers/sub/b.mp4", "covers/cover.png"),
        "root.jpg",
    )
    assert found(tmp_path) == {
        "clips/a.mp4": "a",
        "covers/sub/b.mp4": "b",
        "frames/v_1.2": "v_1.2",
    }


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "in/a.mp4")
    root = tmp_path / "root"
    touch(root, "x/b.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "x" / "up").symlink_to(root)
    (tmp_path / "elsewhere" / "in" / "again").symlink_to(tmp_path / "elsewhere")
    (root / "dead.mp4").symlink_to(root / "nothing.mp4")
    (root / "self.mp4").symlink_to(root / "self.mp4")
    (root / "file.mp4").symlink_to(root / "x" / "b.mp4")
    paths = found(root)
    assert set(paths) >= {"x/b.mp4", "linked/in/a.mp4", "file.mp4"}
    assert not {"dead.mp4", "self.mp4"} & set(paths)
    assert all(path.count("up") < 2 and path.count("again") < 2 for path in paths)


def test_what_is_no_file_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    touch(tmp_path, "real.mp4")
    assert list(found(tmp_path)) == ["real.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_closed_folder_is_noted(tmp_path: Path) -> None:
    touch(tmp_path, "open/a.mp4", "lost+found/b.mp4")
    (tmp_path / "lost+found").chmod(0)
    notes: list[str] = []
    try:
        assert list(found(tmp_path, notes)) == ["open/a.mp4"]
    finally:
        (tmp_path / "lost+found").chmod(0o700)
    assert len(notes) == 1 and "lost+found" in notes[0]


def test_names_that_are_not_text_are_noted(tmp_path: Path) -> None:
    try:
        touch(tmp_path, b"caf\xe9.mp4", b"caf\xe9/a.mp4", "b.mp4")
    except OSError:
        pytest.skip("a file system that takes UTF-8 only")
    notes: list[str] = []
    assert list(found(tmp_path, notes)) == ["b.mp4"]
    assert notes == ["2 videos are left out: names that are not UTF-8"]
