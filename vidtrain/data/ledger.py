"""Make a file of each video in another folder, so that a run that was stopped goes on.

What is there under its name is whole, and a ledger in the folder says what each file was made of: of
which source, by its size and time, and how. A file of another source or of other settings is made
anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

from vidtrain.data import crew
from vidtrain.data.crew import Lost
from vidtrain.data.encode import FULL, LIBAV_ERRORS
from vidtrain.types import DecodeError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

PARTS = ".vidtrain-parts"  # files being written


class Failed(NamedTuple):
    """A file that could not be made."""

    path: str  # what the ledger calls it
    reason: str
    full: bool = False  # for want of space


class Put(NamedTuple):
    """A file that was made and is in its place."""

    size: int  # bytes of its source ...
    mtime_ns: int  # ... and its time, before it was read
    bytes: int
    facts: Any  # what its maker says of it


def check_output(root: str, output: Path, paths: Sequence[str], ledger: str, key: str) -> None:
    """Refuse a folder where a source could be overwritten, or that is in use for something else.

    Args:
        root: of the sources.
        output: the folder.
        paths: of the sources, below `root`.
        ledger: the name of its ledger, by which a folder of ours is known.
        key: the setting that names the folder.

    Raises:
        UserError: saying why.
    """
    base = os.path.realpath(root)
    if base == os.path.dirname(base):  # the root of all, of a table with absolute paths
        base = os.path.realpath(os.path.join(base, os.path.dirname(os.path.commonpath(paths))))
    if os.path.commonpath([base, os.path.realpath(output)]) in (base, os.path.realpath(output)):
        raise UserError(
            f"{key}={output} and the videos in {base} must not lie within one another;"
            " name a folder beside them"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"{key}={output} is a file; name a folder")
    if output.is_dir() and not (output / ledger).exists() and any(output.iterdir()):
        raise UserError(f"{key}={output} has other things in it; name a new or an empty folder")


class Ledger:
    """What was made of what, a line each; the newest line of a file counts.

    Args:
        output: the folder; made if it is not there.
        name: of the ledger in it.
        how: all that decides what is made of a source, as plain values.
        kind: of the entries, a NamedTuple with at least `path`, what the file is called here;
            `size` and `mtime_ns` of its source; and `bytes`, the file's own size.
        action: that writes here, for the message that another one does.
    """

    def __init__(self, output: Path, name: str, how: list[Any], kind: Any, action: str) -> None:
        self.output, self.name, self.how = output, name, how
        self.kind, self.action = kind, action
        self.lines: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Ledger:
        self.output.mkdir(parents=True, exist_ok=True)
        self.file = open(self.output / self.name, "a+", encoding="utf-8")
        try:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another action={self.action} is writing to {self.output}"
                ) from None
            self.file.seek(0)
            text = self.file.read()
            if text and not text.endswith("\n"):
                self.file.write("\n")  # the last line was cut off
            for line in text.splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    entry = json.loads(line)
                    self.lines[entry["path"]] = entry
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def find(self, path: str, source: str, target: Path) -> Any:
        """Give the entry of a file that is there, if it is of today's source and settings, or None."""
        entry = dict(self.lines.get(path, {}))
        try:
            if entry.pop("how") != self.how:
                return None
            made = self.kind(**entry)
            stat = os.stat(source)
            facts = stat.st_size, stat.st_mtime_ns, target.stat().st_size
        except (OSError, TypeError, KeyError):
            return None
        return made if facts == (made.size, made.mtime_ns, made.bytes) else None

    def add(self, made: Any) -> None:
        """Note a file that has been made."""
        self.file.write(json.dumps(made._asdict() | {"how": self.how}) + "\n")
        self.file.flush()


def put(job: Any, write: Callable[[], Any]) -> Put | Failed:
    """Make one file, in a worker: under another name until it is whole and on the disk.

    Args:
        job: `source`, the file that is read; `part`, what `write` writes; `target`, what it is then
            called; and `path`, what the ledger calls it.
        write: gives the facts of it.
    """
    try:
        source = os.stat(job.source)  # before reading: a change on the way makes it anew next time
        facts = write()
        with open(job.part, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        os.makedirs(os.path.dirname(job.target), exist_ok=True)
        os.replace(job.part, job.target)
    except DecodeError as error:
        return Failed(job.path, error.reason)
    except LIBAV_ERRORS as error:
        full = getattr(error, "errno", None) in FULL
        return Failed(job.path, getattr(error, "strerror", None) or str(error), full)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(job.part)
    return Put(source.st_size, source.st_mtime_ns, size, facts)


def work(
    function: Callable[[Any], Any],
    jobs: Sequence[Callable[..., Any]],
    ledger: Ledger,
    workers: int,
    time_limit: float | None,
    progress: Callable[[int], None],
    culprit: str,
) -> tuple[dict[str, Any], list[Failed]]:
    """Make the files that are missing, many at once, and note each as soon as it is there.

    Args:
        function: makes one in a process of its own; returns the ledger's kind of entry, or `Failed`.
        jobs: called with `part`, the name that the file has until it is whole, each gives what
            `function` is called with: a NamedTuple with `path`.
        ledger: of the folder, entered.
        workers: processes; 0: one for each core.
        time_limit: seconds that one may take.
        progress: told how many are done.
        culprit: see `crew.run`.

    Returns:
        What was made, by path, and what failed.

    Raises:
        OSError: no space is left.
    """
    made: dict[str, Any] = {}
    failed: list[Failed] = []

    def take(result: Any) -> None:
        if isinstance(result, Lost):
            result = Failed(result.job.path, result.reason)
        if not isinstance(result, Failed):
            made[result.path] = result
            ledger.add(result)
        elif result.full:
            raise OSError(FULL[0], os.strerror(FULL[0]))
        else:
            failed.append(result)
        progress(len(made) + len(failed))

    with _parts(ledger.output) as part:
        named = (job(part=f"{part}{number}") for number, job in enumerate(jobs))
        run: Any = crew.run(function, named, workers, time_limit, take, culprit)
        with contextlib.closing(run):
            for _ in run:  # `take` has had it: there, as soon as it was ready
                pass
    return made, failed


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """Say, where Ctrl-C ends such work, that it need not be done again."""
    try:
        yield
    except KeyboardInterrupt:
        print("what is done stays; the same command goes on with the rest", file=sys.stderr)
        raise


@contextlib.contextmanager
def writing(output: Path, key: str) -> Iterator[None]:
    """Turn what the output's disk says into words for the user."""
    try:
        yield
    except OSError as error:
        room = "; make room, and the same command goes on" if error.errno in FULL else ""
        raise UserError(f"{key}={output} cannot be written: {error.strerror}{room}") from None


@contextlib.contextmanager
def _parts(output: Path) -> Iterator[str]:
    """Give what the names of files begin with that are being written; none of them stays."""
    parts = output / PARTS
    shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed
    parts.mkdir()
    try:
        # a process of the run that was killed may still be at work on its own
        yield f"{parts}/{uuid.uuid4().hex}-"
    finally:
        shutil.rmtree(parts, ignore_errors=True)
