"""What every test may lean on: the command line, configs, small videos, and real ones where at hand."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["WANDB_MODE"] = "disabled"  # a test that wants W&B says so itself
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside their own workers

# A shell that runs the tests in the background has programs ignore Ctrl-C, ours and those we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real videos and datasets; they are not on every machine."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared on this machine")
    return SHARED


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def vidtrain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Result]]:
    """Run the real command line in this process, in an empty folder: `vidtrain("train", "model=c3d")`."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    from vidtrain import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: str) -> Result:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["vidtrain", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        finally:
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    yield run


@pytest.fixture
def compose() -> Iterator[Callable[..., object]]:
    """Compose a config as a verb would: `compose("train", "model=c3d")`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        yield lambda verb, *overrides: hydra_compose(verb, list(overrides))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per split and class: 3 classes x (8 train, 2 val, 2 test), told apart by their colour.

    Do not write into it.
    """
    from make_video import write_video

    root = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for color, label in ((448, "apple"), (56, "it's (a) pear"), (7, "zebra")):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                frames = 10 + number
                write_video(
                    folder / f"{number}.mp4",
                    num_frames=frames,
                    size=(64, 48),
                    numbers=[color] * frames,
                    pattern="flat",
                )
    return root
