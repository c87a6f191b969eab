"""What a worker process can be asked to do; apart from the tests, so that it starts without torch."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def work(job: Any, plus: int = 0) -> Any:
    """Double a number; a word says what else to do."""
    if job == "hang":
        time.sleep(600)
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "exit":
        os._exit(3)
    if job == "raise":
        raise ValueError("not this one")
    if job == "nothing":
        return None
    time.sleep(0.05 * (job % 3))
    return 2 * job + plus


def process_of(job: int) -> int:
    return os.getpid()


def no_space(job: Any) -> Any:
    """Stand in for `vidtrain.data.resize.make` where the disk is full."""
    from vidtrain.data.resize import Failed

    return Failed(job.path, "no space", full=True)
