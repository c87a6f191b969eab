"""Batches from worker processes, none of which can end the run.

A codec that is fed a broken file may crash its process, use up its memory or never come back. Here
such a process is replaced, the row it was at is called lost, and the batches go on in their order.
There are no locks or queues that a dying process could leave in disorder: each worker has a pipe of
its own, for small messages, and a page on which it notes the row it is at. Batches lie in memory
that both sides map and that is used again once nobody holds the batch.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, util
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vidtrain.data.collate import plain_memory
from vidtrain.data.crew import cause_of_death
from vidtrain.types import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    import numpy as np

    from vidtrain.data.collate import Empty

    Collate = Callable[[list[Any], Empty], Any]

OVER = "the loader has been closed, or iterated anew, in the meantime"
START_LIMIT = 300.0  # seconds a worker may take to start, or to collate
LOOK_AGAIN = 0.2  # seconds between two looks at the workers while the main process waits for them
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # no codec's doing
ALIGNMENT = 64  # bytes, of each tensor in shared memory
ROW, SINCE, WANTED = range(3)  # what is on a worker's page; SINCE is 0 while it works at nothing


class Loader:
    """Batches in the order of `order`, made by worker processes that may die.

    A worker that crashes, is killed or takes too long over a row is replaced. The row goes into
    `dataset.lost` with the reason, for good, and its batch is made again. Where the dataset has no
    `lost` there is nothing to be done without the row: that is an error which names it.

    The dataset may have: `lost`, a dict from rows that must be treated as unreadable to reasons;
    and `watch`, None or a function that it calls with (row, path) before it opens a row; and
    `empty`, which is set to what collate is called with.

    Args:
        dataset: `dataset[key]` is a sample.
        order: iterated anew for each pass, in the main process; yields lists of keys. A key is a
            row's number or a tuple that starts with it.
        collate: called with the samples and `empty`: `empty(shape, dtype)` is a tensor to be
            filled, in memory shared with the main process. What is stacked there is not copied
            again.
        workers: processes; 0: everything happens in this one, unprotected. They stay from pass to
            pass.
        pin: copy each batch to pinned memory, in a thread, one batch ahead.
        prefetch: batches ahead, for each worker.
        time_limit: seconds that one video may take, None for any.
        start_method: `fork`, `spawn` or `forkserver`; None: fork on Linux, else the platform's own.
        worker_init: called in each worker with its number before anything else.

    Raises:
        UserError: while iterating, as raised in a worker; or the workers cannot run at all.
        RuntimeError: while iterating, with the traceback of any other exception in a worker.
    """

    def __init__(
        self,
        dataset: Any,
        order: Any,
        collate: Collate,
        *,
        workers: int,
        pin: bool = False,
        prefetch: int = 2,
        time_limit: float | None = 300.0,
        start_method: str | None = None,
        worker_init: Callable[[int], None] | None = None,
    ) -> None:
        self.dataset, self.order, self.collate, self.pin = dataset, order, collate, pin
        self.batch_sampler = order  # under this name Lightning looks for what has a `set_epoch`
        method = start_method or ("fork" if sys.platform == "linux" else None)
        context = multiprocessing.get_context(method)
        self._pool = _Pool(context, dataset, collate, worker_init, workers, prefetch, time_limit)
        # Not weakref.finalize: it may run after multiprocessing has begun to wait for the workers
        # to end, and it runs in forked copies of this process as well.
        util.Finalize(self, self._pool.close, exitpriority=10)

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        # A generator: whoever only asks whether this can be iterated (Lightning) starts nothing.
        stop = self._pool.begin()
        batches = (
            self._pool.batches(iter(self.order), stop) if self._pool.size else self._made_here()
        )
        yield from _pinned(batches, self._pool, stop) if self.pin else batches

    def _made_here(self) -> Iterator[Any]:
        for keys in self.order:
            yield self.collate([self.dataset[key] for key in keys], plain_memory)

    def close(self) -> None:
        """End the workers at once; another pass would start new ones. Batches stay as they are."""
        self._pool.close()


class _Pool:
    """The workers of a loader, and which batches are where."""

    def __init__(
        self,
        context: BaseContext,
        dataset: Any,
        collate: Collate,
        worker_init: Callable[[int], None] | None,
        size: int,
        prefetch: int,
        time_limit: float | None,
    ) -> None:
        self.context, self.work = context, (dataset, collate, worker_init)
        self.size, self.ahead, self.time_limit = size, max(1, prefetch), time_limit
        self.lost: dict[int, str] | None = getattr(dataset, "lost", None)
        self.workers: list[_Worker] = []
        self.keys: dict[int, Any] = {}  # of the batches given out, by number
        self.done: dict[int, Any] = {}  # batches, or the exception that came instead
        self.next = 0  # number of the next batch; numbers run on through all passes
        self.deaths: Counter[int] = Counter()  # by row
        self.false_starts = 0  # since a batch was last made
        self.patience = self.looked = 0.0
        self.stop = threading.Event()  # set: the pass that has it is over
        self.end_pinning: Callable[[], None] | None = None

    def begin(self) -> threading.Event:
        """End the pass under way; give what ends the one to come."""
        self.stop.set()
        if self.end_pinning is not None:
            self.end_pinning()
            self.end_pinning = None
        self.drop()
        self.stop = threading.Event()
        return self.stop

    def drop(self) -> None:
        """Forget all batches that are under way."""
        self.keys.clear()
        self.done.clear()
        for worker in self.workers:
            worker.ahead.clear()
            worker.page[WANTED] = self.next

    def close(self) -> None:
        self.begin()
        for worker in self.workers:
            worker.process.kill()
        while self.workers:
            self.workers.pop().end()

    def batches(self, order: Iterator[Any], stop: threading.Event) -> Iterator[Any]:
        """Yield the batches of a pass, until `stop`."""
        turn = self.next
        window = self.size * self.ahead
        try:
            self.hand_out(order, turn + window)
            while turn < self.next:
                while turn not in self.done and not stop.is_set():
                    self.look(LOOK_AGAIN)
                if stop.is_set():
                    raise RuntimeError(OVER)
                turn += 1
                self.look(0)  # for who is idle: the workers go on while the batch is made use of
                for worker in self.workers:
                    worker.ahead.discard(turn - 1)
                self.hand_out(order, turn + window)
                yield self.take(turn - 1)  # no name for it here, which would keep its memory busy
        finally:
            if self.stop is stop:
                self.drop()

    def take(self, number: int) -> Any:
        batch = self.done.pop(number)
        if isinstance(batch, Exception):
            raise batch
        return batch

    def hand_out(self, order: Iterator[Any], end: int) -> None:
        """Give batches to the workers up to number `end`."""
        for keys in itertools.islice(order, end - self.next):
            self.keys[self.next] = keys
            self.give(self.next)
            self.next += 1

    def give(self, number: int) -> None:
        """Give a batch to the worker that has least to do."""
        # Each has its share of what is ahead, and memory for no more than that. One has room, as
        # this batch is not the last of all that may be ahead.
        able = [worker for worker in self.workers if len(worker.ahead) < self.ahead]
        worker = min(able, key=lambda worker: len(worker.slots), default=None)
        if worker is None or (worker.slots and len(self.workers) < self.size):
            taken = {worker.number for worker in self.workers}
            number_of_its_own = next(n for n in range(self.size) if n not in taken)
            worker = _Worker(self.context, self.work, number_of_its_own, len(self.lost or ()))
            self.workers.append(worker)
        worker.give(number, self.keys[number], self.lost or {})

    def look(self, timeout: float) -> None:
        """Wait for the workers, gather what they have made, replace those that died or hang."""
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in self.workers}
        ready = wait(list(by_connection), timeout)
        for connection in ready:
            self.gather(by_connection[connection])
        now = time.monotonic()
        if now - self.looked > 1:
            # The whole job may have been suspended: first see what the workers do.
            self.patience = now + 1
        self.looked = now
        for worker in list(self.workers):
            at = row, since = worker.at()
            limit = self.time_limit and (self.time_limit if row >= 0 else START_LIMIT)
            if limit and since and now > max(self.patience, since / 1e9 + limit):
                self.replace(worker, at, f"took longer than {limit:g} s")
            # Some other child of ours may hold a dead worker's pipe open.
            elif timeout and not ready and not worker.process.is_alive():
                self.gather(worker)

    def gather(self, worker: _Worker) -> None:
        """Take what a worker has sent; bury it if that was its last."""
        if worker not in self.workers:
            return
        try:
            alive = worker.process.is_alive()  # before looking for its last words
            while worker.connection.poll():
                number, batch = worker.receive()
                if number is None:
                    raise batch
                self.false_starts = 0
                if self.keys.pop(number, None) is not None:
                    self.done[number] = batch
        except (EOFError, ConnectionError):
            alive = False
        if not alive:
            self.replace(worker)

    def replace(
        self, worker: _Worker, late_at: tuple[int, int] | None = None, cause: str = ""
    ) -> None:
        """Put an end to a worker, find out whose fault it is, and give its batches to others."""
        code = worker.end(patience=0 if late_at else 5)
        self.workers.remove(worker)
        row = worker.at()[0]
        cause = cause or cause_of_death(code, "the decoder")
        if late_at and late_at != worker.at():
            pass  # it came to the end of it at the last moment
        elif row >= 0:
            self.deaths[row] += 1
            # Late: it may have been at something else with it, such as keeping all its frames.
            innocent = late_at or (code is not None and -code in FROM_OUTSIDE)
            if not innocent or self.deaths[row] > 1:
                self.lose(row, cause)
        elif not worker.made:
            self.false_starts += 1
            if self.false_starts > self.size + 2:
                raise UserError(
                    f"the data workers end before they get to a video ({cause});"
                    " data.workers=0 shows an error of theirs, fewer workers take less memory"
                )
        for number in worker.slots:
            if number in self.keys:
                self.give(number)

    def lose(self, row: int, cause: str) -> None:
        if self.lost is None:
            raise RuntimeError(f"row {row}: {cause}")
        if self.deaths[row] > self.size + 2:
            raise RuntimeError(f"row {row}: {cause}, again and again, though it is in `lost`")
        self.lost.setdefault(row, cause)


class _Worker:
    """A process, what it has been given, and the memory it shares with us.

    Memory is numbered, and is handed out with each batch: `slots` says which batch has which,
    `free` is what no batch, given out or still in somebody's hands, lies in.
    """

    def __init__(self, context: BaseContext, work: tuple[Any, ...], number: int, told: int) -> None:
        self.number, self.told = number, told  # how many of the lost rows it knows of
        self.slots: dict[int, int] = {}
        self.ahead: set[int] = set()  # batches given to it that nobody has taken yet
        self.free: deque[int] = deque()
        self.memory: dict[int, Tensor] = {}
        self.new_slots = itertools.count()
        self.made = 0  # batches
        self.page = context.RawArray("q", 3)
        _note(self.page, -1)  # its start takes time as well
        with _starting:
            self.connection, theirs = context.Pipe()
            _workers.add(self)
            args = (theirs, self.page, number, *work)
            self.process: BaseProcess = context.Process(  # type: ignore[attr-defined]
                target=_work, args=args, daemon=True
            )
            if context.get_start_method() != "fork":
                resource_tracker.ensure_running()  # else it starts along, and unblocks the signal
            # Ctrl-C goes to every process at the terminal: born with it blocked, it is left to us.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.process.start()
            except OSError as error:
                raise UserError(
                    f"a data worker cannot be started ({error.strerror}); set fewer data.workers"
                ) from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                theirs.close()

    def at(self) -> tuple[int, int]:
        """Say which row it is at, -1 for none, and since when; nanoseconds, 0 when it is idle."""
        return self.page[ROW], self.page[SINCE]

    def give(self, number: int, keys: Any, lost: dict[int, str]) -> None:
        slot = self.free.pop() if self.free else next(self.new_slots)
        self.slots[number] = slot
        self.ahead.add(number)
        news, self.told = list(lost.items())[self.told :], len(lost)
        with contextlib.suppress(OSError):  # it has died: that will be found out
            self.connection.send((number, slot, keys, news))

    def receive(self) -> tuple[int | None, Any]:
        """Take a batch, or the exception that came instead.

        Raises:
            EOFError: it has died.
        """
        number, answer = self.connection.recv()
        if number is None:  # it could not even begin
            return None, answer
        slot = self.slots[number]
        if not isinstance(answer, tuple):
            del self.slots[number]
            self.free.append(slot)
            return number, answer
        size, offset, length = answer
        if size:
            self.memory[slot] = _map(_receive_handle(self.connection), size)
        del self.slots[number]  # not before all of it is here
        self.made += 1
        memory = self.memory[slot].numpy()  # a new object, which lives as long as a tensor over it
        weakref.finalize(memory, self.free.append, slot).atexit = False
        return number, _Unpickler(memory, offset, length).load()

    def end(self, patience: float = 0) -> int | None:
        """Kill it unless it ends by itself, and say what it ended with, None when it does not."""
        self.process.join(patience)
        self.process.kill()
        self.process.join(5)  # not for ever: who waits for a lost network drive cannot be killed
        self.forget()
        return self.process.exitcode

    def forget(self) -> None:
        self.connection.close()
        self.memory.clear()


STOP_GRACE = 30  # seconds a worker stays after SIGTERM, when the main process does not end it


def start_worker(_: int) -> None:
    """Let a worker outlast the signals that end a run.

    Ctrl-C and a scheduler's SIGTERM reach workers too. The main process ends its step, saves and
    stops them; a worker that died at once would fail that step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(STOP_GRACE))


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()  # of all loaders in this process
_starting = threading.RLock()  # a fork in another thread would take along a pipe's other end


def _pinned(batches: Iterator[Any], pool: _Pool, stop: threading.Event) -> Iterator[Any]:
    """Pin batches in a thread, one ahead of who takes them."""
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    # A thread starts out on device 0, where each rank would then take up memory.
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def pin() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        while asked.get():
            try:
                ready.put((tree_map_only(Tensor, pin_memory, next(batches)), None))
            except BaseException as error:
                ready.put((None, error))
        batches.close()  # type: ignore[attr-defined]
        ready.put((None, RuntimeError(OVER)))

    def end() -> None:
        stop.set()
        asked.put(False)
        if thread is not threading.current_thread():  # where the garbage collector may be at work
            thread.join()

    def take() -> Any:
        batch, error = ready.get()
        if error is not None:
            raise error
        asked.put(True)
        return batch

    # A daemon: at the end of the process nobody waits for a thread that waits for a worker.
    thread = threading.Thread(target=pin, name="pin memory", daemon=True)
    thread.start()
    pool.end_pinning = end
    asked.put(True)
    try:
        while not stop.is_set():
            try:
                batch = [take()]
            except StopIteration:
                return
            yield batch.pop()
        raise RuntimeError(OVER)
    finally:
        end()


def pin_memory(tensor: Tensor) -> Tensor:
    """Copy to memory that a GPU reads by itself, with the same strides."""
    return tensor.pin_memory()


def _work(
    connection: Connection,
    page: Any,
    number: int,
    dataset: Any,
    collate: Collate,
    worker_init: Callable[[int], None] | None,
) -> None:
    """Make batches until the main process is gone."""
    # For a fork server's children, which do not have it from us.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for worker in list(_workers):  # what a fork has brought along
        worker.forget()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # The workers fill the cores by their number, and a forked process has only one of the threads
    # that it believes to have.
    torch.set_num_threads(1)
    slots: defaultdict[int, _Slot] = defaultdict(_Slot)
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            if worker_init is not None:
                worker_init(number)
            if hasattr(dataset, "watch"):
                dataset.watch = lambda row, path: _note(page, row)
        except Exception as error:
            connection.send((None, _portable(error)))
            return
        while True:
            page[SINCE], page[ROW] = 0, -1
            batch, slot, keys, lost = connection.recv()
            if lost:
                dataset.lost.update(lost)
            try:
                answer = _make(batch, keys, slots[slot], page, dataset, collate)
            except Exception as error:
                connection.send((batch, _portable(error)))
                continue
            page[SINCE] = 0  # the main process may take its time
            connection.send((batch, answer))
            if answer is not None and answer[0]:
                _send_handle(connection, slots[slot].hand_over())


def _make(
    batch: int, keys: Any, slot: _Slot, page: Any, dataset: Any, collate: Collate
) -> tuple[int, int, int] | None:
    """Make a batch, None where nobody wants it any more.

    Returns:
        The size of the slot's memory, 0 where the main process has it already; where in it the
        batch's pickle begins; the length of that.
    """
    slot.clear()
    if hasattr(dataset, "empty"):
        dataset.empty = slot.empty
    samples = []
    for key in keys:
        if batch < page[WANTED]:
            return None
        row = key[0] if isinstance(key, tuple) else key
        _note(page, row if isinstance(row, int) else -1)
        samples.append(dataset[key])
    _note(page, -1)
    offset, length = slot.pickle(collate(samples, slot.empty))
    return len(slot.memory) if slot.handle is not None else 0, offset, length


def _note(page: Any, row: int) -> None:
    page[SINCE] = 0  # never the old time with the new row
    page[ROW] = row
    page[SINCE] = time.monotonic_ns()


def _portable(error: Exception) -> Exception:
    """Make of an exception one that can be sent."""
    if isinstance(error, UserError):
        return UserError(str(error))
    return RuntimeError(f"a data worker failed:\n\n{traceback.format_exc()}")


def _end_with(parent: int) -> None:
    """End this process with its parent, also in the middle of a video that never ends."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class _Slot:
    """A worker's side of the memory of one batch: tensors are laid into it one behind the other.

    What does not fit any more calls for a larger piece of memory. Tensors given out before stay in
    the old one and are copied to the same place of the new one in the end.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.handle: int | None = None  # of memory that the main process has not got yet
        self.outgrown: list[tuple[int, Tensor]] = []  # where the next one begins, the memory
        self.used = 0

    def clear(self) -> None:
        self.used = 0
        self.outgrown.clear()

    def take(self, size: int) -> tuple[int, Tensor]:
        """Give so many bytes, and say where they begin."""
        start = -(-self.used // ALIGNMENT) * ALIGNMENT
        if start + size > len(self.memory):
            self.outgrown.append((self.used, self.memory))
            if self.handle is not None:
                os.close(self.hand_over())
            # some air, for the next batch is a little larger
            self.handle, self.memory = _new_memory(max(start + size, len(self.memory)) * 9 // 8)
        self.used = start + size
        return start, self.memory[start : start + size]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Give a tensor to be filled."""
        numel = torch.Size(shape).numel()
        if not numel:
            return plain_memory(shape, dtype)
        return self.take(numel * dtype.itemsize)[1].view(dtype).view(tuple(shape))

    def place(self, tensor: Tensor) -> int:
        """Say where a tensor begins; copy it into the slot unless it lies there."""
        if not tensor.numel():
            return 0
        size = _extent(tensor) * tensor.itemsize
        for memory in (self.memory, *(memory for _, memory in self.outgrown)):
            offset = tensor.data_ptr() - memory.data_ptr()
            if 0 <= offset <= len(memory) - size:
                return offset
        offset, copy = self.take(size)
        copy.view(tensor.dtype).copy_(tensor.detach().as_strided((_extent(tensor),), (1,)))
        return offset

    def pickle(self, batch: Any) -> tuple[int, int]:
        """Lay down everything: the tensors, and behind them the rest; say where that is."""
        file = io.BytesIO()
        _Pickler(file, self).dump(batch)
        rest = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
        offset, copy = self.take(len(rest))
        copy.copy_(rest)
        start = 0
        for end, memory in self.outgrown:
            self.memory[start:end] = memory[start:end]
            start = end
        self.outgrown.clear()
        return offset, len(rest)

    def hand_over(self) -> int:
        handle, self.handle = self.handle, None
        assert handle is not None
        return handle


class _Pickler(pickle.Pickler):
    """Of a tensor only says where it lies."""

    def __init__(self, file: io.BytesIO, slot: _Slot) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.slot = slot

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor or not _is_plain(value):
            return None
        return self.slot.place(value), tuple(value.shape), value.stride(), value.dtype


class _Unpickler(pickle.Unpickler):
    """Makes tensors over the memory they lie in, each of which keeps `memory` alive."""

    def __init__(self, memory: np.ndarray[Any, Any], offset: int, length: int) -> None:
        super().__init__(io.BytesIO(memory[offset : offset + length].tobytes()))
        self.memory = memory

    def persistent_load(self, value: Any) -> Tensor:
        offset, shape, stride, dtype = value
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        if not tensor.numel():
            return torch.empty_strided(shape, stride, dtype=dtype)
        flat = torch.frombuffer(self.memory, dtype=dtype, count=_extent(tensor), offset=offset)
        return flat.as_strided(shape, stride)


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _extent(tensor: Tensor) -> int:
    """Count the elements from a tensor's first to its last in memory, gaps included."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _new_memory(size: int) -> tuple[int, Tensor]:
    """Make memory to be shared; give its handle as well.

    Not in /dev/shm, which is small in containers.
    """
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("vidtrain")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    try:
        # Taken now: memory that is only promised kills the process that comes to use it.
        getattr(os, "posix_fallocate", lambda handle, _, size: os.ftruncate(handle, size))(
            handle, 0, size
        )
        return handle, _map(os.dup(handle), size)
    except OSError as error:
        os.close(handle)
        raise UserError(
            f"no memory for a batch of {size >> 20} MiB ({error.strerror});"
            " set a smaller data.batch_size or fewer data.workers"
        ) from None


def _map(handle: int, size: int) -> Tensor:
    """Map shared memory and close its handle: many batches may be kept."""
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    try:
        return torch.from_file(f"{folder}/{handle}", shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(handle)


def _send_handle(connection: Connection, handle: int) -> None:
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
        socket.send_fds(pipe, [b"h"], [handle])
    os.close(handle)


def _receive_handle(connection: Connection) -> int:
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
        word, handles, *_ = socket.recv_fds(pipe, 1, 1)
    if not word:
        raise EOFError
    if not handles:
        raise UserError("too many open files: `ulimit -n` sets how many there may be")
    return handles[0]
