from __future__ import annotations

import errno
import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vidtrain.data import loader as module
from vidtrain.data.loader import Loader
from vidtrain.data.order import EvaluationOrder, TrainingOrder
from vidtrain.types import Failure, UserError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Numbers:
    """Samples that tell where they come from; `acts` says what happens when a row is read."""

    def __init__(self, acts: dict[int, Any] | None = None, shape: tuple[int, ...] = (2,)) -> None:
        self.acts, self.shape = acts or {}, shape
        self.lost: dict[int, str] = {}
        self.watch: Callable[[int, str], None] | None = None

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        row, seed = key
        failures = []
        if self.watch is not None:
            self.watch(row, f"{row}.mp4")
        if row in self.lost:
            failures.append(Failure(row, f"{row}.mp4", self.lost[row]))
            row += 1000  # the stand-in
        elif row in self.acts:
            act, *arguments = self.acts[row]
            act(*arguments)
        return {"x": torch.full(self.shape, row), "seed": seed, "failures": failures}


class Batch(NamedTuple):
    x: Tensor
    rows: Tensor
    seeds: list[int]
    failures: list[Failure]


def collate(samples: list[dict[str, Any]], empty: Any) -> Batch:
    x = empty((len(samples), *samples[0]["x"].shape), samples[0]["x"].dtype)
    torch.stack([sample["x"] for sample in samples], out=x)
    rows = torch.tensor([int(sample["x"].flatten()[0]) for sample in samples])
    failures = [failure for sample in samples for failure in sample["failures"]]
    return Batch(x, rows, [sample["seed"] for sample in samples], failures)


def crash(number: int) -> None:
    faulthandler.disable()  # pytest's, which would write much
    os.kill(os.getpid(), number)
    time.sleep(60)


def crash_once(flag: Path, number: int = signal.SIGKILL) -> None:
    if not flag.exists():
        flag.touch()
        crash(number)


def fail(error: Exception) -> None:
    raise error


def rows_of(batches: Any) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


def numbered(count: int, size: int = 4) -> list[list[int]]:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


@pytest.fixture
def make() -> Iterator[Callable[..., Loader]]:
    """Loaders over rows in their order, in batches of 4, which end with the test."""
    made = []

    def make(
        rows: int = 40, acts: Any = None, workers: int = 2, dataset: Any = None, **options: Any
    ) -> Loader:
        order = options.pop("order", None) or EvaluationOrder(rows, 4, 0, 1)
        dataset = dataset or Numbers(acts, options.pop("shape", (2,)))
        options.setdefault("collate", collate)
        made.append(Loader(dataset, order, workers=workers, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()
    assert not multiprocessing.active_children()


# what comes, and in which order


def test_the_number_of_workers_changes_nothing(make: Callable[..., Loader]) -> None:
    seen = []
    for workers in (0, 1, 3):
        order = TrainingOrder(48, 4, seed=1, rank=0, world=1)
        loader = make(workers=workers, order=order)
        epochs = []
        for order.epoch, order.start in ((0, 0), (1, 0), (1, 5), (0, 0)):
            epochs.append([(batch.x.tolist(), batch.seeds) for batch in loader])
        seen.append(epochs)
        assert len(loader) == 12
        assert [len(epoch) for epoch in epochs] == [12, 12, 7, 12]
        assert epochs[0] == epochs[3] != epochs[1]
        assert epochs[1][5:] == epochs[2]
    assert seen[0] == seen[1] == seen[2]


def test_a_slow_batch_does_not_come_late(make: Callable[..., Loader]) -> None:
    loader = make(40, acts={0: (time.sleep, 0.3), 21: (time.sleep, 0.2)}, workers=3)
    assert rows_of(loader) == numbered(40)


def test_fewer_batches_than_workers(make: Callable[..., Loader]) -> None:
    loader = make(6, workers=5)
    assert rows_of(loader) == numbered(6)
    assert len(multiprocessing.active_children()) == 2
    nothing = make(0)
    assert (len(nothing), list(nothing)) == (0, [])


def test_no_random_state_is_touched(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pin_memory", Tensor.clone)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    list(make(pin=True))
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


# memory


def test_batches_that_are_kept_do_not_change(make: Callable[..., Loader]) -> None:
    loader = make(400, workers=2, shape=(1000,))
    kept = list(loader)
    view = next(iter(loader)).x[1:3]  # of a batch that is gone otherwise
    for _ in loader:
        pass
    loader.close()
    assert rows_of(kept) == numbered(400)
    for batch in kept:
        assert torch.equal(batch.x, batch.rows[:, None].expand(-1, 1000))
    assert torch.equal(view, torch.tensor([[1], [2]]).expand(-1, 1000))


@LINUX
def test_memory_is_used_again(make: Callable[..., Loader]) -> None:
    loader = make(800, workers=2, prefetch=2, shape=(100_000,))
    handles = len(os.listdir("/proc/self/fd"))
    for batch in loader:
        assert batch.x[:, -1].tolist() == batch.rows.tolist()
    # two ahead, one with us, one that we have just got
    assert all(len(worker.memory) <= 4 for worker in loader._pool.workers)
    assert len(loader._pool.workers) == 2
    assert len(os.listdir("/proc/self/fd")) <= handles + 8  # pipes and sentinels: none for memory


class Growing(Numbers):
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {**super().__getitem__(key), "x": torch.full((10 ** (1 + key[0] % 6),), key[0])}


class Odd:
    """Neither dict nor tuple."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def collate_odd(samples: list[dict[str, Any]], empty: Any) -> dict[str, Any]:
    """All that a batch may hold; the memory must grow between the pieces."""
    pieces = []
    for sample in samples:
        pieces.append(empty(sample["x"].shape, torch.int64))  # filled only when all are there
    for piece, sample in zip(pieces, samples, strict=True):
        piece.copy_(sample["x"])
    last = empty((2, 4, 5, 3), torch.uint8).permute(0, 3, 1, 2)
    last.copy_(torch.arange(120, dtype=torch.uint8).view(2, 3, 4, 5))
    grid = torch.arange(24.0).view(4, 6)
    return {
        "pieces": pieces,
        "channels last": last,
        "outside": torch.arange(60, dtype=torch.bfloat16).view(3, 4, 5).transpose(0, 2),
        "gaps": grid[1:, ::2],
        "expanded": torch.tensor([[True], [False]]).expand(2, 7),
        "none": torch.empty(0, 3),
        "none of it": empty((2, 0), torch.float16),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "learned": torch.ones(2, requires_grad=True),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "array": np.arange(3),
        "odd": [Odd(piece[:1]) for piece in pieces],
        "failure": (Failure(1, "a", "b"), None, "text", 1.5),
        "text": "x" * 300_000,  # more than a pipe holds
    }


@pytest.mark.parametrize("memfd", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
def test_whatever_a_batch_holds_arrives(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, memfd: bool
) -> None:
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    rows = 32
    here = make(rows, dataset=Growing(), workers=0, collate=collate_odd)
    there = make(rows, dataset=Growing(), workers=2, collate=collate_odd)
    for _ in range(2):
        for one, other in zip(here, there, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                if isinstance(value, Tensor):
                    assert value.layout == other[name].layout
                    assert value.requires_grad == other[name].requires_grad
                    assert torch.equal(value.to_dense(), other[name].to_dense()), name
                    if value.layout == torch.strided:
                        assert value.stride() == other[name].stride(), name
            assert other["channels last"].is_contiguous(memory_format=torch.channels_last)
            for name in ("failure", "text"):
                assert one[name] == other[name]
            assert one["array"].tolist() == other["array"].tolist()
            for mine, theirs in zip(one["pieces"], other["pieces"], strict=True):
                assert torch.equal(mine, theirs)
            for mine, theirs in zip(one["odd"], other["odd"], strict=True):
                assert torch.equal(mine.tensor, theirs.tensor)


def test_no_memory_is_an_error_that_says_so(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"no memory for a batch .* a smaller data.batch_size"):
        list(make())


# what goes wrong


def test_rows_that_end_their_worker_are_lost_and_nothing_else_is(
    make: Callable[..., Loader], tmp_path: Path
) -> None:
    acts = {
        2: (crash, signal.SIGSEGV),
        9: (os._exit, 3),
        17: (time.sleep, 3600),
        18: (crash, signal.SIGKILL),
        26: (crash_once, tmp_path / "killed"),
        30: (sys.exit, 0),
    }
    loader = make(40, acts, workers=2, time_limit=3)
    reasons = {
        2: "the decoder crashed (signal 11)",
        9: "the decoder ended the process (exit code 3)",
        17: "took longer than 3 s",
        18: "the process was killed (signal 9): out of memory, perhaps",
        30: "the decoder ended the process (exit code 0)",
    }
    expected = [[row + 1000 if row in reasons else row for row in batch] for batch in numbered(40)]
    batches = list(loader)
    assert rows_of(batches) == expected
    assert [batch.seeds for batch in batches] == numbered(40)
    assert {f.row: f.reason for batch in batches for f in batch.failures} == reasons
    assert (tmp_path / "killed").exists()
    assert loader.dataset.lost == reasons
    crew = {child.pid for child in multiprocessing.active_children()}
    assert rows_of(loader) == expected  # and nobody dies of it again
    assert {child.pid for child in multiprocessing.active_children()} == crew
    loader.close()
    assert rows_of(loader) == expected  # new workers are told


def test_a_stand_in_that_crashes_is_named_itself(make: Callable[..., Loader]) -> None:
    class Replacing(Numbers):
        def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
            if key[0] == 5:
                key = (23, key[1])
            return super().__getitem__(key)

    loader = make(12, dataset=Replacing({23: (crash, signal.SIGABRT)}))
    list(loader)
    assert loader.dataset.lost == {23: "the decoder crashed (signal 6)"}


class Plain:
    """A dataset that knows nothing of lost rows."""

    def __init__(self, acts: dict[int, Any] | None = None) -> None:
        self.acts = acts or {}

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return Numbers(self.acts)[key]


def test_a_dataset_that_cannot_do_without_a_row(
    make: Callable[..., Loader], tmp_path: Path
) -> None:
    assert rows_of(make(12, dataset=Plain())) == numbered(12)
    assert rows_of(make(12, dataset=Plain({3: (crash_once, tmp_path / "x")}))) == numbered(12)
    with pytest.raises(RuntimeError, match=r"row 5: the decoder crashed \(signal 11\)"):
        list(make(12, dataset=Plain({5: (crash, signal.SIGSEGV)})))


def test_a_dataset_that_opens_lost_rows_all_the_same(make: Callable[..., Loader]) -> None:
    class Deaf(Plain):
        lost: dict[int, str] = {}  # noqa: RUF012

    with pytest.raises(RuntimeError, match=r"row 5: .* again and again, though it is in `lost`"):
        list(make(12, dataset=Deaf({5: (crash, signal.SIGSEGV)})))


@pytest.mark.parametrize(
    ("start", "cause"),
    [
        (lambda _: os._exit(7), "exit code 7"),
        (lambda _: crash(signal.SIGKILL), "signal 9"),
        (lambda _: time.sleep(3600), "took longer than 0.3 s"),
    ],
)
def test_workers_that_never_get_to_work(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, start: Any, cause: str
) -> None:
    monkeypatch.setattr(module, "START_LIMIT", 0.3)
    with pytest.raises(UserError, match="end before they get to a video") as error:
        list(make(worker_init=start))
    assert cause in str(error.value)


def test_a_collate_that_crashes_ends_in_an_error(make: Callable[..., Loader]) -> None:
    def crashing(samples: list[Any], empty: Any) -> Batch:
        if samples[0]["seed"] == 8:
            crash(signal.SIGKILL)
        return collate(samples, empty)

    loader = make(collate=crashing)
    seen = []
    with pytest.raises(UserError, match="signal 9"):
        seen.extend(batch.rows.tolist() for batch in loader)
    assert not loader.dataset.lost


def test_idle_workers_that_are_killed_are_replaced(make: Callable[..., Loader]) -> None:
    loader = make(acts={38: (fail, ValueError())}, workers=3)
    for _ in range(4):
        with pytest.raises(RuntimeError, match="ValueError"):
            list(loader)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
    assert rows_of(make(dataset=loader.dataset, rows=36)) == numbered(36)
    assert not loader.dataset.lost  # not even the row that each was at last


@pytest.mark.parametrize("pin", [False, True])
def test_exceptions_come_in_their_turn(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, pin: bool
) -> None:
    monkeypatch.setattr(module, "pin_memory", Tensor.clone)
    acts = {14: (fail, KeyError("what is missing")), 30: (fail, UserError("mend it"))}
    loader = make(acts=acts, workers=3, pin=pin)
    for _ in range(2):
        seen = []
        with pytest.raises(RuntimeError, match=r"(?s)in fail.*KeyError: 'what is missing'"):
            seen.extend(batch.rows.tolist() for batch in loader)
        assert seen == numbered(12)
    del loader.dataset.acts[14]
    with pytest.raises(UserError, match=r"^mend it$"):
        list(make(dataset=loader.dataset, pin=pin))


def test_an_exception_at_the_start_of_a_worker(make: Callable[..., Loader]) -> None:
    with pytest.raises(UserError, match=r"^no such device$"):
        list(make(worker_init=lambda _: fail(UserError("no such device"))))


@pytest.mark.parametrize("pin", [False, True])
def test_a_pass_left_in_the_middle(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, pin: bool
) -> None:
    monkeypatch.setattr(module, "pin_memory", Tensor.clone)
    loader = make(400, workers=2, pin=pin)
    for taken in (0, 1, 5):
        for number, _ in enumerate(loader):
            if number == taken:
                break
        assert rows_of(loader) == numbered(400)
    early = iter(loader)
    next(early)
    assert rows_of(loader) == numbered(400)
    with pytest.raises(RuntimeError, match="iterated anew"):
        next(early)
    late = iter(loader)
    next(late)
    del early  # must not end the pass of another
    gc.collect()
    assert rows_of(late) == numbered(400)[1:]
    assert all(thread.name != "pin memory" for thread in threading.enumerate())


def test_what_was_begun_for_a_pass_that_is_over_is_left(make: Callable[..., Loader]) -> None:
    slow = {row: (time.sleep, 0.2) for row in range(4, 40)}
    loader = make(acts=slow, workers=1, prefetch=8)
    next(iter(loader))
    loader.dataset.acts.clear()  # here, not in the worker
    began = time.monotonic()
    next(iter(loader))
    assert time.monotonic() - began < 3.0  # one row, not 28


@LINUX
@pytest.mark.parametrize("pin", [False, True])
def test_nothing_piles_up_over_many_passes(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch, pin: bool
) -> None:
    monkeypatch.setattr(module, "pin_memory", Tensor.clone)
    loader = make(workers=2, pin=pin)

    def facts() -> tuple[int, int, int, int]:
        gc.collect()
        return (
            len(os.listdir("/proc/self/fd")),
            len(multiprocessing.active_children()),
            threading.active_count(),
            Path("/proc/self/maps").read_text().count("memfd:vidtrain"),
        )

    list(loader)
    handles, workers, threads, _ = facts()
    for number in range(50):
        for batch, _ in zip(loader, range(1 + number % 12), strict=False):
            assert len(batch.x) == 4
    assert facts()[:3] == (handles, workers, threads)
    assert facts()[3] <= 10
    del batch
    loader.close()
    assert facts()[1:] == (0, threads, 0)
    assert facts()[0] < handles


def test_a_loader_that_is_forgotten_ends_its_workers() -> None:
    loader = Loader(Numbers(), EvaluationOrder(40, 4, 0, 1), collate, workers=2)
    kept = next(iter(loader))
    assert len(multiprocessing.active_children()) == 2
    del loader
    gc.collect()
    assert not multiprocessing.active_children()
    assert kept.rows.tolist() == [0, 1, 2, 3]


@LINUX
def test_workers_do_not_hold_what_belongs_to_others(make: Callable[..., Loader]) -> None:
    """Else a dead worker's memory would live on, and its pipe with it."""
    first = make(workers=2)
    list(first)
    second = make(workers=1)
    list(second)
    (worker,) = second._pool.workers
    (mine,) = (
        Path(f"/proc/{pid}/maps").read_text().count("memfd:vidtrain")
        for pid in [worker.process.pid]
    )
    assert mine == len(worker.memory)


def test_spawned_workers(make: Callable[..., Loader]) -> None:
    loader = make(12, {5: (crash, signal.SIGSEGV)}, workers=1, start_method="spawn")
    for _ in range(2):
        assert rows_of(loader) == [[0, 1, 2, 3], [4, 1005, 6, 7], [8, 9, 10, 11]]


# pinning


def test_pinning_one_batch_ahead(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append((threading.current_thread(), tensor.stride()))
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return copy.copy_(tensor)

    monkeypatch.setattr(module, "pin_memory", pin)
    for workers in (0, 2):
        pinned.clear()
        batches = iter(make(40, workers=workers, pin=True))
        for count in range(1, 10):
            batch = next(batches)
            assert isinstance(batch, Batch)
            assert batch.rows.tolist() == numbered(40)[count - 1]
            until = time.monotonic() + 5
            while len(pinned) < 2 * (count + 1) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(pinned) == 2 * (count + 1)
        assert len(list(batches)) == 1
        assert threading.main_thread() not in {thread for thread, _ in pinned}
        assert {stride for _, stride in pinned} == {(2, 1), (1,)}


def test_what_fails_while_pinning_is_raised(
    make: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pin_memory", lambda tensor: fail(MemoryError("no pages")))
    with pytest.raises(MemoryError, match="no pages"):
        list(make(pin=True))


@pytest.mark.gpu
def test_pinned_memory_of_a_gpu(make: Callable[..., Loader]) -> None:
    for batch in make(pin=True):
        assert batch.x.is_pinned()


# how it ends

SCRIPT = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {folder!r})
from test_loader import Numbers, collate
from vidtrain.data import loader
from vidtrain.data.loader import Loader
from vidtrain.data.order import EvaluationOrder
assert "lightning" not in sys.modules

loader.pin_memory = lambda tensor: tensor.clone()

def init(number):
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))

dataset = Numbers({{30: (time.sleep, 3600)}})
order = EvaluationOrder(400, 4, 0, 1)
batches = iter(Loader(dataset, order, collate, workers=3, worker_init=init, pin={pin}))
for _ in range(5):
    next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
{then}
"""


def script(then: str, pin: bool = False) -> tuple[subprocess.Popen[str], list[int]]:
    code = SCRIPT.format(folder=str(Path(__file__).parent), then=then, pin=pin)
    # a session of its own, whose Ctrl-C reaches workers too
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 3, process.stderr.read()
    return process, pids


def assert_gone(pids: list[int], within: float) -> None:
    until = time.monotonic() + within
    while pids and time.monotonic() < until:
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]
        time.sleep(0.05)
    assert not pids


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def main_process(connection: Any) -> None:
    """One of its workers is at a video that never ends."""
    dataset = Numbers({30: (time.sleep, 3600)})
    batches = iter(Loader(dataset, EvaluationOrder(400, 4, 0, 1), collate, workers=3))
    for _ in range(5):
        next(batches)
    connection.send([child.pid for child in multiprocessing.active_children()])
    time.sleep(60)


@LINUX
def test_a_killed_main_process_leaves_no_workers() -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=main_process, args=(theirs,))
    process.start()
    pids = ours.recv()
    process.kill()
    process.join()
    assert len(pids) == 3
    assert_gone(pids, within=10)


@LINUX
def test_ctrl_c_ends_everything_quickly_and_quietly() -> None:
    process, pids = script("list(batches)")
    time.sleep(0.3)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1
    assert_gone(pids, within=1)


@LINUX
def test_an_exception_in_the_middle_of_a_pass_ends_everything() -> None:
    """The frames of the traceback keep the iterator alive; the workers do not heed SIGTERM."""
    began = time.monotonic()
    process, pids = script("raise ValueError('ours')", pin=True)
    _, said = process.communicate(timeout=25)
    assert time.monotonic() - began < 20
    assert said.strip().endswith("ValueError: ours")
    assert said.count("Traceback") == 1
    assert_gone(pids, within=1)


def test_lightning_takes_it_for_a_loader(make: Callable[..., Loader], tmp_path: Path) -> None:
    import lightning.pytorch as L

    class Learner(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
            self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": []}

        def training_step(self, batch: Batch, _: int) -> Tensor:
            self.seen["train"].append(batch.rows.tolist())
            return self.layer(batch.x.float()).mean()

        def validation_step(self, batch: Batch, _: int) -> None:
            self.seen["val"].append(batch.rows.tolist())

        def test_step(self, batch: Batch, _: int) -> None:
            self.seen["test"].append(batch.rows.tolist())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    order = TrainingOrder(40, 4, seed=0, rank=0, world=1)
    learner = Learner()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=6,
        limit_val_batches=3,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    assert not hasattr(make(), "sampler")  # would be replaced where batches are learned by heart
    trainer.fit(learner, make(order=order), make(16))
    expected = []
    for order.epoch in range(3):
        expected += [[row for row, _ in keys] for keys in order][:6]
    assert learner.seen["train"] == expected
    assert learner.seen["val"] == [*numbered(8), *numbered(12) * 3]  # two to see that it works
    trainer.test(learner, make(18), verbose=False)
    assert learner.seen["test"] == numbered(18)
    with pytest.warns(UserWarning, match="Total length of `Loader` across ranks is zero"):
        trainer.test(learner, make(0), verbose=False)
