"""What a checking process can do wrong; apart from the tests, so that it starts without torch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from vidtrain.data.check import Probe


def look_at(path: str, decoder: str) -> Probe:
    """Stand in for `probe`: the name of the file says what to do."""
    kind = Path(path).stem.rstrip("0123456789")
    if kind == "hang":
        time.sleep(600)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(3)
    if kind == "slow":
        time.sleep(0.3)
    return Probe(path, ok=True)
