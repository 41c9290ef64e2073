"""Processes that train together: started, watched, and ended with the one that started them.

Imports nothing heavy, as a task that only waits for work has this module too.
"""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Protocol

from moeprune import errors
from moeprune.errors import InputError, LostProcessError, MoepruneError

# SLURM, and a terminal, send these to every process of a job. Who started the others decides what they mean.
NOT_FOR_CHILDREN = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
# The error of one process makes others fail too, whose errors may arrive first.
ALL_SPEAK_WITHIN_S = 3.0
ENDS_WITHIN_S = 10.0
WELL = b"null"


@dataclass(frozen=True)
class Order:
    """What one of ``world`` processes shall do.

    ``call`` is a pickled function and its arguments. The process sees one GPU alone, the one that has the place
    ``device`` among all. All meet at ``address`` and ``port``.
    """

    call: bytes
    world: int
    port: int
    rank: int = 0
    device: int = 0
    address: str = "localhost"

    def environment(self, visible: str | None) -> dict[str, str]:
        """The variables that torchrun sets, for each process as if it had a host of its own.

        ``visible`` are the GPUs so far, as in CUDA_VISIBLE_DEVICES. Raises InputError where they are too few.
        """
        return {
            "RANK": str(self.rank),
            "GROUP_RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # who gives the orders has opened it
            "TORCHELASTIC_RESTART_COUNT": "0",
            "CUDA_VISIBLE_DEVICES": str(self.device) if visible is None else self._own_of(visible.split(",")),
        }

    def _own_of(self, gpus: Sequence[str]) -> str:
        if len(gpus) == 1:  # none, or a cluster gave each task its own
            return gpus[0]
        if self.device >= len(gpus):
            raise InputError(
                f"Process {self.rank} of {self.world} would need one GPU more than the {len(gpus)} that it sees.",
                change="Ask for as many GPUs as tasks on each node (gpus_per_node, tasks_per_node).",
            )
        return gpus[self.device]


class Worker(Protocol):
    """A process at work, here or in another task; ``said`` is readable when it has ended, however it did."""

    @property
    def said(self) -> Connection: ...

    def report(self) -> bytes:
        """`WELL`, or what `failure_of` reads."""

    def stop(self) -> None: ...


class Child:
    """A process of this one. It ends with this one, and never gets a signal that is sent to the whole job."""

    def __init__(self, order: Order) -> None:
        context = multiprocessing.get_context("spawn")
        self.said, self._says = context.Pipe(duplex=False)
        self._process: SpawnProcess = context.Process(target=_work, args=(order, self._says, os.getpid()), daemon=True)
        self._name = f"Process {order.rank} of {order.world}"

    def start(self) -> None:
        resource_tracker.ensure_running()  # which would let SIGINT and SIGTERM through again
        with _kept_from_children():
            self._process.start()
        self._says.close()

    def report(self) -> bytes:
        try:
            said = self.said.recv_bytes()
        except (EOFError, OSError):
            said = b""
        self._process.join(ENDS_WITHIN_S)
        self.stop()
        return said or lost(f"{self._name} on {socket.gethostname()} {_end(self._process.exitcode)}")

    def stop(self) -> None:
        if self._process.pid is not None:
            self._process.kill()
            self._process.join()


def wait_for_all(workers: Sequence[Worker]) -> None:
    """Return when all have ended well. Raises the error of one that failed, and waits for no other then.

    Of several errors it raises the one that tells most: a user's mistake, then that a process was lost, as the others
    see no more than a broken connection.
    """
    running = {worker.said: worker for worker in workers}
    failures: list[Exception] = []
    deadline = None
    while running and not any(map(_is_told, failures)):
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = connection.wait(list(running), left)
        if not ended:
            break
        reports = [running.pop(said).report() for said in ended]  # type: ignore[call-overload]
        failures += [failure_of(report) for report in reports if report != WELL]
        if failures and deadline is None:
            deadline = time.monotonic() + ALL_SPEAK_WITHIN_S
    if failures:
        raise min(failures, key=lambda error: (not _is_told(error), not isinstance(error, LostProcessError)))


def failure_of(report: bytes) -> Exception:
    """The error that a report tells of; one that is none of ours is a RuntimeError with its traceback."""
    said = json.loads(report)
    return getattr(errors, said["kind"], RuntimeError)(said["message"])


def lost(what: str) -> bytes:
    """The report of a process that made none."""
    message = (
        f"{what}.\nLook into the log of that task, and whether its memory was enough (smaller "
        "recovery.training.micro_batch_size); the same command goes on from the last checkpoint."
    )
    return _report(LostProcessError.__name__, message)


def _report(kind: str, message: str) -> bytes:
    return json.dumps({"kind": kind, "message": message}).encode()


def _is_told(error: Exception) -> bool:
    return isinstance(error, MoepruneError) and not isinstance(error, LostProcessError)


def _end(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit code {exit_code} and said nothing"
    return f"was killed by {signal.Signals(-exit_code).name}"


@contextmanager
def _kept_from_children() -> Iterator[None]:
    """A process that begins within the context is born with these signals blocked, and so are its own children."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(order: Order, says: Connection, parent: int) -> None:
    """What a new process does."""
    threading.Thread(target=end_with, args=[parent], daemon=True).start()
    try:
        os.environ.update(order.environment(os.environ.get("CUDA_VISIBLE_DEVICES")))
        function, arguments = pickle.loads(order.call)
        function(*arguments)
        report = WELL
    except MoepruneError as error:
        # A plug-in may have an error of its own.
        known = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        report = _report(known.__name__, str(error))
    except Exception:
        place = f"Process {order.rank} of {order.world} on {socket.gethostname()} failed."
        report = _report(RuntimeError.__name__, f"{place}\n{traceback.format_exc()}")
    says.send_bytes(report)


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone: nobody would see to it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
