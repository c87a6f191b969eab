"""Where a run comes from: the code that it ran and the data that it saw."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtrain import __version__

if TYPE_CHECKING:
    from vidtrain.data.module import VideoDataModule

PATIENCE = 10  # seconds that git has for an answer


def code() -> dict[str, Any]:
    """Name the versions of all that a run is made by; None where there is none, or it is not known.

    `commit` and `dirty` (files that git knows were changed since) are of the repository around the
    working folder, `vidtrain_commit` and `vidtrain_dirty` of vidtrain's own, where it runs from one.
    """
    import lightning
    import torch

    commit, dirty = _commit(Path.cwd())
    here = Path(__file__).parent
    # An environment that lies inside somebody's repository is not a part of it.
    own = _git(here, "ls-files", "--error-unmatch", "__init__.py") is not None
    vidtrain_commit, vidtrain_dirty = _commit(here) if own else (None, None)
    return {
        "vidtrain": __version__,
        "vidtrain_commit": vidtrain_commit,
        "vidtrain_dirty": vidtrain_dirty,
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": str(lightning.__version__),
        "cuda": torch.version.cuda,
    }


def dataset(data: VideoDataModule) -> dict[str, Any]:
    """Say which rows there are: name, fingerprint, number of classes, videos of each split."""
    return {
        "name": data.name,
        "fingerprint": data.manifest.fingerprint,
        "classes": len(data.label_names),
        "videos": dict(data.manifest.splits),
    }


def _commit(folder: Path) -> tuple[str | None, bool | None]:
    """Ask git for the commit of a folder's repository, and whether files were changed since."""
    head = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no") if head else None
    return head, None if changed is None else bool(changed)


def _git(folder: Path, *words: str) -> str | None:
    """Run git so that it writes nothing; None if it fails."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
