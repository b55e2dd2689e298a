"""Warm worker processes: each imports the libraries once and does one task after another. No torch here.

A worker that dies (killed, out of memory) or takes too long is replaced, and only its task is lost. Each worker has a
pipe of its own, so that one that is killed while it writes blocks no other; process pools that share a queue do not
have this property. Several machines are the work of `cluster.Ray`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

SPAWN = multiprocessing.get_context("spawn")  # forked torch threads and CUDA contexts do not work
GRACE = 5.0  # seconds for a worker to end by itself
BEGUN, AGAIN = "begun", "again"


@dataclass(frozen=True)
class Outcome:
    """Result of a task.

    Attributes:
        task: The task as it was given.
        value: What the work returned.
        error: Why there is no value (the worker died or took too long); None if there is one.
        attempts: Number of times that the task was begun.
    """

    task: Any
    value: Any = None
    error: str | None = None
    attempts: int = 1


class Engine(Protocol):
    """Something that does tasks, such as `Pool`."""

    @property
    def size(self) -> int:
        """Number of tasks that it does at the same time."""
        ...

    def map(self, tasks: Iterable[Any], begun: Callable[[Any], None]) -> Iterator[Outcome]:
        """One outcome per task, in the order in which they end.

        Args:
            tasks: What is to be done.
            begun: Is called with each task when its work begins, and again when it begins anew.
        """
        ...


def ignore(task: Any) -> None:
    """Do nothing when a task begins."""


@dataclass(frozen=True)
class Here:
    """Does tasks in this process, one after another.

    Args:
        work: Function that does a task, as for `Pool`.
    """

    work: str

    @property
    def size(self) -> int:
        """One task at a time."""
        return 1

    def map(self, tasks: Iterable[Any], begun: Callable[[Any], None] = ignore) -> Iterator[Outcome]:
        """One outcome per task, as `Engine.map`."""
        for task in tasks:
            begun(task)
            yield Outcome(task, _function(self.work)(task))


def slots(workers: int, cores: int, gpus: Sequence[str] = ()) -> list[dict[str, str]]:
    """The environment of each worker: its share of the cores, and its GPU, which several workers may share.

    Each worker gets cores of its own because threads that compete for cores slow each other down several times: they
    spin while they wait.

    Args:
        workers: Number of workers.
        cores: Number of cores of the machine.
        gpus: Names of the GPUs for CUDA_VISIBLE_DEVICES.
    """
    threads = str(max(1, cores // workers))
    shared = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    return [{**shared, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(workers)]


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(i) for i in range(torch.cuda.device_count())]


@dataclass(eq=False)
class Pool:
    """Worker processes on this machine; they stay from one `map` to the next, until `close`.

    Args:
        work: Function that does a task, as ``module:function``; it is imported in the worker, after its environment is
            set.
        environments: Environment variables of each worker; there are as many workers.
        timeout: Seconds for a task, the worker's own start not counted; None for no limit.
        retries: Number of times that a task is begun again after its worker died. A task that took too long is not
            begun again.
    """

    work: str
    environments: Sequence[Mapping[str, str]]
    timeout: float | None = None
    retries: int = 1
    _workers: list[_Worker] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.environments)

    def close(self) -> None:
        """Stop all workers, also those that are busy."""
        while self._workers:
            self._workers.pop().stop()

    def map(self, tasks: Iterable[Any], begun: Callable[[Any], None] = ignore) -> Iterator[Outcome]:
        """One outcome per task, as `Engine.map`; exceptions of the work itself are raised here."""
        waiting: deque[_Item] = deque()  # to be begun again
        unread = (_Item(task) for task in tasks)  # tasks are taken when a worker is free

        def take() -> _Item | None:
            return waiting.popleft() if waiting else next(unread, None)

        try:
            while True:
                for worker in self._workers:
                    if worker.item is None and (item := take()):
                        worker.begin(item)
                for environment in self.environments[len(self._workers) :]:
                    if not (item := take()):
                        break
                    self._workers.append(_Worker(self.work, environment))
                    self._workers[-1].begin(item)
                if not any(w.item for w in self._workers):
                    break
                for worker in self._ready():
                    message = self._message(worker)
                    if message is BEGUN:
                        worker.started = time.monotonic()
                        if worker.item is not None:
                            begun(worker.item.task)
                        continue
                    ended, worker.item = worker.item, None
                    if message is AGAIN and ended is not None:
                        waiting.append(ended)
                    else:
                        yield message
        finally:
            if any(w.item for w in self._workers):  # an error, or the caller has stopped listening
                self.close()

    def _ready(self) -> list[_Worker]:
        """Workers that have answered, died or exceeded their time."""
        busy = [w for w in self._workers if w.item]
        limits = [w.started + self.timeout - time.monotonic() for w in busy] if self.timeout is not None else []
        limit = min(limits, default=math.inf)
        heard = wait([w.pipe for w in busy], None if limit == math.inf else max(0.0, limit))
        late = [w for w in busy if self.timeout is not None and time.monotonic() - w.started >= self.timeout]
        return [w for w in busy if w.pipe in heard or w in late]

    def _message(self, worker: _Worker) -> Any:
        """BEGUN, AGAIN (the worker died and its task must be begun again), or an outcome."""
        item = worker.item
        assert item is not None
        if not worker.pipe.poll():
            worker.replace()
            return Outcome(item.task, error=f"stopped after {self.timeout:g} seconds", attempts=item.attempts)
        try:
            message = worker.pipe.recv()
        except (EOFError, ConnectionError):
            code = worker.replace()
            if item.attempts <= self.retries:
                return AGAIN
            return Outcome(item.task, error=f"the worker process died ({_cause(code)})", attempts=item.attempts)
        if message == BEGUN:
            return BEGUN
        value, error = message
        if error is not None:
            raise error
        return Outcome(item.task, value, attempts=item.attempts)


@dataclass(eq=False)
class _Item:
    task: Any
    attempts: int = 0


@dataclass(eq=False)
class _Worker:
    work: str
    environment: Mapping[str, str]
    item: _Item | None = None
    started: float = math.inf  # when it began its task
    pipe: Connection = field(init=False)
    process: BaseProcess = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_serve, args=(theirs, self.work, dict(self.environment)), daemon=True)
        self.process.start()
        theirs.close()  # without this, the pipe would not end when the worker dies

    def begin(self, item: _Item) -> None:
        self.item, self.started = item, math.inf
        item.attempts += 1
        with contextlib.suppress(ConnectionError):  # a dead worker is found when its answer is read
            self.pipe.send(item.task)

    def replace(self) -> int | None:
        """A new process for one that died or hangs; returns how the old one ended."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode
        self._start()
        return code

    def stop(self) -> None:
        """Ask an idle worker to end; kill a busy one."""
        self.pipe.close()
        if self.item is not None:
            self.process.kill()
        self.process.join(GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, work: str, environment: Mapping[str, str]) -> None:
    """Main loop of a worker: receive tasks and send results until the other end of the pipe is closed."""
    os.environ.update(environment)
    function = _function(work)
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError, KeyboardInterrupt):
            return
        with contextlib.suppress(ConnectionError):  # the parent has ended; the result is on disk
            pipe.send(BEGUN)
        try:
            result: tuple[Any, BaseException | None] = function(task), None
        except KeyboardInterrupt:
            return
        except Exception as error:
            result = None, error
        with contextlib.suppress(ConnectionError):
            pipe.send(result)


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _cause(code: int | None) -> str:
    return f"signal {-code}; out of memory?" if code is not None and code < 0 else f"exit code {code}"
