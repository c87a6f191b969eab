"""Write checkpoints whole or not at all, and keep the one before the last."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from vidtrain.types import UserError

LAST, PREVIOUS, PART = "last.ckpt", "previous.ckpt", ".part"


class CannotSave(UserError):
    """A checkpoint cannot be written; the one before it is whole."""


class WholeFiles(TorchCheckpointIO):
    """Checkpoints of the local disk.

    Lightning's own collects the bytes in memory, writes them to the system's temporary folder and
    moves them: across disks a copy, which a kill leaves torn.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write beside, to the disk itself, then rename: under its name a file is always whole.

        What was `last.ckpt` is kept as `previous.ckpt`, at the cost of a directory entry.

        Raises:
            CannotSave: the disk is full, or not to be written to.
        """
        path = Path(path)
        part = path.with_name(path.name + PART)
        with explained(path, part):
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == LAST and path.exists():
                keep(path, path.with_name(PREVIOUS))
            os.replace(part, path)
            with contextlib.suppress(OSError):  # the name too; not every file system can
                folder = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)


@contextlib.contextmanager
def explained(path: Path, part: Path) -> Iterator[None]:
    """Turn what the disk says into a line of ours, and remove the part."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = disk_error(error)
        if cause is None:
            raise
        room = (
            "make room" if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend it"
        )
        raise CannotSave(
            f"cannot write {path}: {cause.strerror or cause}; the checkpoints before it are whole:"
            f" {room}, then go on with resume={path.parent.parent}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def disk_error(error: BaseException | None) -> OSError | None:
    """Find what the disk said: torch's writer raises a RuntimeError of its own over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def keep(path: Path, name: Path) -> None:
    """Give a file a second name; `path` itself stays, so that there is no moment without it."""
    part = name.with_name(name.name + PART)
    with contextlib.suppress(OSError):
        part.unlink()
    try:
        os.link(path, part)
        os.replace(part, name)
    except OSError:  # a file system without links
        os.replace(path, name)


def remove_parts(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for part in folder.glob(f"*{PART}"):
        with contextlib.suppress(OSError):
            part.unlink()
