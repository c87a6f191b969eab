"""Kill short trainings in every way, let them go on, and compare them with runs that were never killed.

    python scripts/survival.py                                          everything: a quarter of an hour on two cores
    python scripts/survival.py --hows SIGKILL,exception --workers 0     a part of it

Each run is killed in the middle of a batch, between its forward and its backward pass, and started
again with `resume=auto`. "equal" compares the weights, their average, the optimizer and the schedule of
the last checkpoints, every number to the bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as L
import torch

import vidtrain.commands.train  # noqa: F401  for the forks

HOWS = ("SIGKILL", "SIGTERM", "SIGINT", "exception")
SETTINGS = [
    "model=small_3d_cnn", "clip.num_frames=4", "clip.size=32", "data=demo", "data.scenes=[3,1,1]",
    "data.batch_size=4", "trainer=cpu", "trainer.max_epochs=3", "logger=none",
    "callbacks.checkpoint.every_n_steps=2", "callbacks.pictures=null",
]  # fmt: skip
LIMIT = 300  # seconds for a run


class Kill(L.Callback):
    """End the run in the middle of a batch.

    Args:
        how: a signal's name, or `exception`.
        at: which batch of the run, from 1.
        note: where to write how many steps were done.
    """

    def __init__(self, how: str, at: int, note: str) -> None:
        self.how, self.at, self.note = how, at, Path(note)
        self.batches = 0

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        """Count; at the right batch, end it on the first rank, or all ranks as a terminal would."""
        self.batches += 1
        if self.batches != self.at or trainer.global_rank:
            return
        self.note.write_text(json.dumps(trainer.global_step))
        if self.how == "exception":
            raise RuntimeError("an exception in the middle of a batch")
        os.killpg(0, signal.Signals[self.how])
        time.sleep(0.2)


class Case(NamedTuple):
    """What a run is like."""

    workers: int
    ranks: int
    accumulate: int
    ema: bool

    def words(self) -> list[str]:
        """Give its settings."""
        words = [
            f"data.workers={self.workers}",
            f"trainer.accumulate_grad_batches={self.accumulate}",
        ]
        if self.ranks > 1:
            words += [f"trainer.devices={self.ranks}", "trainer.strategy=ddp"]
        return [*words, "callbacks.ema.decay=0.9"] if self.ema else words


def train(folder: Path, words: list[str]) -> tuple[int | str, str]:
    """Run `vidtrain train` in a fork of this process, whose imports it shares, and a session of its own.

    Returns:
        Its exit code, below 0 for a signal, and its output.
    """
    log = folder / "output.txt"
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        run(folder, log, words)
    for _ in range(10 * LIMIT):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), log.read_text()
        time.sleep(0.1)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "hangs", log.read_text()


def run(folder: Path, log: Path, words: list[str]) -> NoReturn:
    """Be the command itself."""
    from vidtrain import cli

    os.setsid()
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(Path(sys.executable).with_name("vidtrain")), "train", *SETTINGS, *words]
    code: Any = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def last(folder: Path, runs: str) -> dict[str, Any]:
    """Load the last checkpoint of the only run of a folder."""
    (path,) = (folder / runs).glob("*/*/checkpoints/last.ckpt")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def equal(a: Any, b: Any) -> bool:
    """Compare to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def try_one(folder: Path, name: str, case: Case, how: str, at: int) -> tuple[str, str, str]:
    """Kill a run, let it go on, compare: whether equal, the exit code, the steps lost."""
    note = folder / f"{name}.json"
    words = [*case.words(), f"paths.runs={name}"]
    kill = [f"+callbacks.kill.{key}={value}" for key, value in
            {"_target_": "survival.Kill", "how": how, "at": at, "note": note}.items()]  # fmt: skip
    code, out = train(folder, [*words, *kill])
    if not note.is_file():
        print(out, file=sys.stderr)
        return "not killed", str(code), ""
    done = json.loads(note.read_text())
    try:
        lost = str(max(0, done - last(folder, name)["global_step"]))
    except ValueError:
        lost = "all"
    again, out = train(folder, [*words, "resume=auto"])
    if again != 0 or "going on with" not in out:
        print(out, file=sys.stderr)
        return f"did not go on ({again})", str(code), lost
    whole, parts = last(folder, f"whole-{slug(case)}"), last(folder, name)
    keys = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")
    same = all(equal(whole.get(key), parts.get(key)) for key in keys)
    return "yes" if same else "NO", str(code), lost


def slug(case: Case) -> str:
    """Name a case's folder."""
    return "-".join(str(int(value)) for value in case)


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hows", default=",".join(HOWS))
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--accumulate", default="1,2")
    parser.add_argument("--ema", default="0,1", help="1 adds rows with an average of weights")
    parser.add_argument("--at", type=int, default=10, help="batch, of both ranks together")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    lists = [
        [int(n) for n in getattr(args, key).split(",")]
        for key in ("workers", "ranks", "accumulate")
    ]
    averages = [n == "1" for n in args.ema.split(",")]
    cases = [Case(*numbers, False) for numbers in itertools.product(*lists) if False in averages]
    if True in averages:
        cases.append(Case(lists[0][-1], lists[1][0], lists[2][-1], True))
    heads = [
        "killed by",
        "workers",
        "ranks",
        "accumulation",
        "average",
        "equal",
        "exit code",
        "steps lost",
    ]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            code, out = train(folder, [*case.words(), f"paths.runs=whole-{slug(case)}"])
            if code != 0:
                sys.exit(f"the run that is not killed ends with {code}:\n{out}")
            for how in args.hows.split(","):
                found = try_one(folder, f"{how}-{slug(case)}", case, how, args.at // case.ranks)
                bad += found[0] != "yes"
                setting = [how, *map(str, case[:3]), "EMA" if case.ema else ""]
                print(f"| {' | '.join([*setting, *found])} |", flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
