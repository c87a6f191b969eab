"""The wheel holds what the checkout does, and works from an empty folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_ships_conf_and_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in ((ROOT / "vidtrain", "vidtrain"), (ROOT / "conf", "vidtrain/conf")):
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            if path.is_file() and "__pycache__" not in path.parts and "local" not in inside.parts:
                assert f"{prefix}/{inside.as_posix()}" in names


def test_the_wheel_runs_where_there_is_no_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import vidtrain.cli; vidtrain.cli.main()"
    done = subprocess.run(
        # -P keeps the current folder off the path; the wheel's copy goes before the checkout's
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}",
         "summary", "model=toy_3d_cnn", "data=demo", "format=json"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"model": "toy_3d_cnn"' in done.stdout
    where = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(site)!r}); from vidtrain.config import conf_dir; print(conf_dir())",
        ],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.strip() == str(site / "vidtrain" / "conf")
