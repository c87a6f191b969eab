"""Run a function on many jobs, each in a process that may hang or crash without harm."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection


class Lost(NamedTuple):
    """What came of a job that has no result."""

    job: Any
    reason: str  # its process died or took too long, or the function raised


def run(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    workers: int = 0,
    time_limit: float | None = None,
    progress: Callable[[Any], None] | None = None,
    culprit: str = "it",
) -> Iterator[Any]:
    """Call a function on each job, many at once, in processes that are replaced when they fail.

    Memory does not grow with the number of jobs. Leaving the loop, or Ctrl-C, kills all processes
    in the middle of their jobs.

    Args:
        function: at the top of its module, or a `functools.partial` of such; with its arguments
            and its result it travels by pickle. Its module is imported by every process: the less
            it imports, the sooner they start.
        jobs: what it is called with, one argument; read as needed.
        workers: how many processes; 0: one for each core.
        time_limit: seconds that one job may take.
        progress: called with each result as soon as it is there.
        culprit: what to call it in the reason for a crash: "the decoder".

    Yields:
        What the function returned, or `Lost`, in the order of the jobs.

    Raises:
        RuntimeError: processes do not start at all.
    """
    todo = enumerate(jobs)
    count = workers or cores()
    crew: list[_Worker] = []
    done: dict[int, Any] = {}
    yielded = 0
    try:
        while True:
            crew = [worker for worker in crew if worker.number is not None or worker.is_fit()]
            idle = [worker for worker in crew if worker.number is None]
            while idle or len(crew) < count:
                job = next(todo, None)
                if job is None:
                    break
                if not idle:
                    idle.append(_Worker(function, time_limit, culprit))
                    crew += idle
                idle.pop().give(*job)
            busy = [worker for worker in crew if worker.number is not None]
            if not busy:
                return
            # a process that dies closes its end, so its connection is ready as well
            left = [seconds for worker in busy if (seconds := worker.time_left()) is not None]
            wait([worker.connection for worker in busy], max(0.0, min(left)) if left else None)
            for worker in busy:
                if not worker.is_done():
                    continue
                done[worker.number], worker.number = worker.result, None
                if progress is not None:
                    progress(worker.result)
            while yielded in done:
                yield done.pop(yielded)
                yielded += 1
    finally:
        for worker in crew:
            worker.end()


def cores() -> int:
    """Count the cores that this process may use, which in a container are not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process, and the job it is at."""

    def __init__(
        self, function: Callable[[Any], Any], time_limit: float | None, culprit: str
    ) -> None:
        self.time_limit, self.culprit = time_limit, culprit
        context = multiprocessing.get_context("spawn")  # no copy of our threads and open files
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        # Ctrl-C goes to every process at the terminal: born with it blocked, they leave it to us.
        # The first process brings along a helper, whose start would lift the block.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.number: int | None = None
        self.job: Any = None
        self.result: Any = None
        self.began: float | None = None
        self.has_begun = False

    def is_fit(self) -> bool:
        """Tell whether it can take another job; clear away what is left of it if not."""
        if not self.process.is_alive():
            self.end()
            return False
        return True

    def give(self, number: int, job: Any) -> None:
        self.number, self.job, self.began = number, job, None
        with contextlib.suppress(OSError):  # it died since: `is_done` will find out
            self.connection.send(job)

    def time_left(self) -> float | None:
        if self.time_limit is None or self.began is None:
            return self.time_limit  # what it takes to start the process is not the job's fault
        return self.began + self.time_limit - time.monotonic()

    def is_done(self) -> bool:
        """Tell whether the job has come to an end, good or bad, and keep its result."""
        alive = self.process.is_alive()  # before looking for its last words
        try:
            while self.connection.poll():
                word = self.connection.recv()
                if word is not None:
                    returned, what = word
                    self.result = what if returned else Lost(self.job, what)
                    return True
                self.began, self.has_begun = time.monotonic(), True
        except (EOFError, OSError):
            alive = False
        if not alive:
            self.process.join()
            code = self.process.exitcode
            if not self.has_begun:
                raise RuntimeError(f"a worker process did not start (exit code {code})")
            self.result = Lost(self.job, cause_of_death(code, self.culprit))
            return True
        left = self.time_left()
        if left is not None and left <= 0:
            self.end()
            self.result = Lost(self.job, f"took longer than {self.time_limit:g} s")
            return True
        return False

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    with contextlib.suppress(EOFError, OSError):  # the other side is gone
        while True:
            job = connection.recv()
            connection.send(None)  # the clock starts now
            try:
                word = True, function(job)
            except Exception as error:  # it is one job's, and the others are to go on
                word = False, f"{type(error).__name__}: {error}"
            connection.send(word)


def cause_of_death(exit_code: int | None, culprit: str) -> str:
    """Say in words what a process ended with; `None`: it did not."""
    if exit_code is None or exit_code >= 0:
        return f"{culprit} ended the process (exit code {exit_code})"
    if -exit_code == signal.SIGKILL:
        return "the process was killed (signal 9): out of memory, perhaps"
    return f"{culprit} crashed (signal {-exit_code})"
