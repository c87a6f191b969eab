"""Frames of a video under test that are too many for memory: they lie in a file meanwhile.

Decoded once, piece by piece, they are written as they come; their views go to the device a few at a
time. The file goes with whoever holds it: pickled, it changes hands.
"""

from __future__ import annotations

import contextlib
import os
import platform
import uuid
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidtrain.types import UserError


class Spill:
    """`(N, C, H, W)` uint8 frames in a mapped file, C innermost.

    Args:
        shape: `(N, H, W, C)`.
        folder: where; made if it is not there.

    Raises:
        UserError: there is no room.
    """

    def __init__(self, shape: tuple[int, int, int, int], folder: Path) -> None:
        self.shape = shape
        self.path = folder / f"frames-{here()}-{os.getpid()}-{uuid.uuid4().hex}"
        size = int(np.prod(shape))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
            with self.path.open("wb") as file:
                self._own()
                if hasattr(os, "posix_fallocate"):  # no room is an error now, not a crash later
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        except OSError as error:
            raise UserError(
                f"{folder}: no room for the {size / 1e9:.1f} GB of one video's frames"
                f" ({error.strerror}); name another data.cache_dir, or fewer views.clips"
            ) from None
        self._map()

    def _own(self) -> None:
        self._remove = weakref.finalize(self, _unlink, os.getpid(), self.path)

    def _map(self) -> None:
        memory = np.memmap(self.path, np.uint8, "r+", shape=self.shape)
        self.tensor: Tensor = torch.from_numpy(memory).permute(0, 3, 1, 2)

    def __getstate__(self) -> dict[str, Any]:
        self._remove.detach()
        return {"shape": self.shape, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own()
        self._map()
        self._remove()  # mapped, it stays until the map goes


def _unlink(maker: int, path: Path) -> None:
    if os.getpid() == maker:  # not in a fork of it
        with contextlib.suppress(OSError):
            path.unlink()


def clear(folder: Path) -> None:
    """Remove what processes left that were killed."""
    for path in folder.glob("frames-*"):
        _, where, owner, *_ = [*path.name.split("-"), "", ""]
        if where == here() and owner.isdigit() and not _lives(int(owner)):
            with contextlib.suppress(OSError):
                path.unlink()


def here() -> str:
    """Name the place where process numbers mean what they mean here: machine and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return platform.node().replace("-", "_")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
