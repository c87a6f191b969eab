"""What every test may lean on: real videos where they are at hand, small made ones where not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("WANDB_MODE", "disabled")  # a test that wants W&B says so itself

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real videos and datasets; they are not on every machine."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared on this machine")
    return SHARED
