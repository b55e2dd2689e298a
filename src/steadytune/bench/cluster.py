"""Runs of a study as tasks of a Ray cluster. No torch here, and Ray is imported when it is used.

Ray (https://docs.ray.io) starts the workers, places the runs, and makes the runs of a lost node again. Records and
predictions travel back, and the process that was given the folder writes them, so the nodes need no shared disk. The
user's own tables travel with the runs. Models and benchmark data do not: every node has them at the same paths.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, one_line
from .pool import Outcome, ignore, slots
from .run import attempt, failed, silent
from .spec import Trial
from .store import Store

if TYPE_CHECKING:
    import pandas as pd

PATIENCE = 5.0  # seconds between looks at the size of the cluster
ANSWER = 5.0  # seconds for the address to answer; Ray itself tries for two minutes, and then ends the process
AGAIN = 1.0  # seconds between signals to a run that is late: a callback may swallow one


class _Late(BaseException):
    """A run took too long. Libraries that catch every `Exception` do not catch this."""


@dataclass
class Ray:
    """An `Engine` on a Ray cluster.

    Args:
        address: ``"auto"`` for the cluster that this machine is part of, ``"HOST:PORT"`` of its head, or ``"local"``
            for a new one on this machine.
        cpus: Processor cores of a run, which has as many threads.
        gpus: GPUs of a run; several runs share a GPU when this is a fraction.
        timeout: Seconds for a run, the start of its worker not counted; None for no limit.
        retries: Number of times that a run is begun again after its node was lost or its worker died.
    """

    address: str = "auto"
    cpus: int = 1
    gpus: float = 0.0
    timeout: float | None = None
    retries: int = 3
    _files: dict[str, tuple[str, Any]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise UsageError(f"cpus must be 1 or more, got {self.cpus}.")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != round(self.gpus)):
            raise UsageError(f"gpus must be 0, a fraction, or a whole number, got {self.gpus}.")

    @property
    def size(self) -> int:
        """Number of runs that the cluster has room for at the moment.

        Raises:
            UsageError: There is no cluster, or no node that could do a run.
        """
        ray = self._connected()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(self._room(resources) for resources in nodes)
        if not room:
            found = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
            raise UsageError(
                f"no node of the Ray cluster has the {self.cpus} CPUs and {self.gpus:g} GPUs that a run needs. "
                f"Its nodes have: {found or 'nothing'}. Give smaller --cpus or --gpus, or add nodes."
            )
        return room

    def _room(self, resources: Mapping[str, float]) -> int:
        """Number of runs that a node has room for."""
        by_gpus = resources.get("GPU", 0.0) / self.gpus if self.gpus else math.inf
        return int(min(resources.get("CPU", 0.0) / self.cpus, by_gpus))

    def map(self, tasks: Iterable[tuple[str, Trial]], begun: Callable[[Any], None] = ignore) -> Iterator[Outcome]:
        """One outcome per task, as `Engine.map`; the values are those of `bench.run.perform`.

        Raises:
            UsageError: The folder cannot be written, or the nodes cannot do the work; records so far are kept.
        """
        ray = self._connected()
        work = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries)(_work)
        unread = iter(tasks)  # tasks are taken when the cluster has room
        running: dict[Any, tuple[tuple[str, Trial], ExitStack]] = {}
        try:
            while True:
                while len(running) < self.size and (task := next(unread, None)) is not None:
                    store, run = Store(task[0]), _checked(task[1])
                    claim = ExitStack()
                    mine = claim.enter_context(store.claim(run.id))
                    if not mine or store.has(run.id):
                        claim.close()
                        yield Outcome(task, "before" if mine else "elsewhere")
                        continue
                    begun(task)
                    names, contents = self._sent(run)
                    running[work.remote(run, names, slots(1, self.cpus)[0], self.timeout, *contents)] = task, claim
                if not running:
                    return
                for ended in ray.wait([*running], timeout=PATIENCE)[0]:
                    task, claim = running.pop(ended)
                    with claim:
                        outcome = _outcome(task, ended)
                    yield outcome
        finally:
            for reference, (_, claim) in running.items():
                ray.cancel(reference, force=True)
                claim.close()

    def _connected(self) -> Any:
        """The module `ray`, connected to the cluster."""
        try:
            import ray
        except ImportError as error:
            raise UsageError("engine ray needs Ray: pip install 'steadytune[cluster]'.") from error
        if not ray.is_initialized():
            _check_answers(self.address)
            try:
                ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:
                raise UsageError(f"no Ray cluster at address {self.address!r}: {one_line(error)}") from error
        return ray

    def _sent(self, run: Trial) -> tuple[dict[str, str], list[Any]]:
        """Hash of each file of the run by its path, and references to the contents in the same order."""
        import ray

        for file in run.files:
            if file not in self._files:
                content = Path(file).read_bytes()
                self._files[file] = hashlib.sha256(content).hexdigest()[:16], ray.put(content)
        return {file: self._files[file][0] for file in run.files}, [self._files[file][1] for file in run.files]


def _checked(run: Trial) -> Trial:
    """Raise for a run whose result does not fit into a record."""
    if run.keep_model:
        raise UsageError("keep_models needs the local engine: with --engine ray only records travel back.")
    return run


def _check_answers(address: str) -> None:
    """Raise if nothing answers at HOST:PORT."""
    host, colon, port = address.partition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"no Ray cluster at address {address!r}: {one_line(error)}. Start one with `ray start --head`, and give "
            "the address that it prints."
        ) from error


def _outcome(task: tuple[str, Trial], ended: Any) -> Outcome:
    """Write the record of a task that has ended; a task without one failed with its worker or node."""
    import ray
    from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

    try:
        record, predictions = ray.get(ended)
    except (RayTaskError, RuntimeEnvSetupError) as error:  # errors of a run are in its record
        raise UsageError(
            f"a node of the Ray cluster cannot do a run: {one_line(error)}. Install the same version of steadytune on "
            "every node."
        ) from error
    except RayError as error:
        return Outcome(task, error=f"the worker or its node was lost: {one_line(error)}")
    Store(task[0]).write(record, predictions)
    return Outcome(task, str(record["status"]))


# ---- on the nodes -----------------------------------------------------------------------------------------------


def _work(
    run: Trial, files: Mapping[str, str], environment: Mapping[str, str], timeout: float | None, *contents: bytes
) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Do a run in a worker of a node: its record and its predictions.

    Args:
        run: The run.
        files: Hash of each of its files by path.
        environment: Variables for the libraries, which are imported afterwards.
        timeout: Seconds for the run.
        *contents: Contents of the files, in the same order.
    """
    os.environ.update(environment)
    with silent(), tempfile.TemporaryDirectory(prefix="steadytune-") as scratch:
        places = {}
        for (file, name), content in zip(files.items(), contents, strict=True):
            place = Path(scratch, name, Path(file).name)  # two tables may have the same file name
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(content)
            places[file] = str(place)
        try:
            with _limited(timeout):
                return attempt(run.moved(places), Path(scratch))
        except _Late:
            return failed(run, f"stopped after {timeout:g} seconds", 0.0), None


@contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Raise `_Late` in the main thread after some seconds."""

    def stop(*about: object) -> None:
        raise _Late

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
