"""Training in a SLURM job of several tasks: the first runs the job, the others wait and take part in each training.

    with lead(folder):   # in task 0, around the whole job; also in a job of one task
        ...
    follow(folder)       # in every other task, in the place of the job

Both read SLURM's variables, and find each other by a file in ``folder``, which all nodes see. A task that waits for
hours costs nothing: it reads from a connection that says when the other end is gone. Imports nothing heavy.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path

from moeprune.errors import InputError, LostProcessError
from moeprune.training.meeting import ALL_COME_WITHIN_S, Listener, Place, connect, listening
from moeprune.training.processes import NOT_FOR_CHILDREN, Child, Order, Worker, lost, wait_for_all


@dataclass(frozen=True)
class Follower:
    """Another task, as the first sees it."""

    name: str
    said: Connection

    def report(self) -> bytes:
        try:
            return self.said.recv_bytes()
        except (EOFError, OSError):
            return lost(f"{self.name} has ended")

    def stop(self) -> None:
        self.said.close()


class Crew:
    """The other tasks of a job, in the first one; they come when there is the first order for them."""

    def __init__(self, place: Place, listener: Listener) -> None:
        self.tasks, self.device, self._listener = place.tasks, place.device, listener
        self._followers: dict[int, Follower] = {}

    def with_order(self, order: Order) -> list[Follower]:
        """All of them, at work. Raises LostProcessError when one does not come, or has ended."""
        self._gather()
        for rank, follower in self._followers.items():
            try:
                follower.said.send(replace(order, rank=rank))
            except OSError:
                raise LostProcessError(f"{follower.name} has ended; look into its log.") from None
        return list(self._followers.values())

    def dismiss(self) -> None:
        for follower in self._followers.values():
            follower.stop()

    def _gather(self) -> None:
        deadline = time.monotonic() + ALL_COME_WITHIN_S
        while len(self._followers) < self.tasks - 1:
            told = self._listener.next_task(deadline)
            if told is None:
                missing = ", ".join(str(rank) for rank in range(1, self.tasks) if rank not in self._followers)
                raise LostProcessError(
                    f"After {ALL_COME_WITHIN_S / 60:.0f} minutes some of the job's {self.tasks} tasks have not come "
                    f"({missing}).\nLook into their logs."
                )
            said, rank, host = told
            self._followers[rank] = Follower(f"Task {rank} of {self.tasks} on {host}", said)


_crew: ContextVar[Crew | None] = ContextVar("crew", default=None)


def current_crew() -> Crew | None:
    """The other tasks, within `lead` in a job of several."""
    return _crew.get()


def require_as_many_tasks(devices: int) -> None:
    """Raise InputError in a job of several tasks that are not one for each device that trains."""
    crew = current_crew()
    if crew is not None and crew.tasks != devices:
        raise InputError(
            f"recovery.training.devices={devices} in a job of {crew.tasks} tasks is not possible.",
            change=f"Use recovery.training.devices={crew.tasks}, or a job of {devices} tasks in all "
            "(hydra.launcher.nodes times hydra.launcher.tasks_per_node; a job of one task uses all of its GPUs).",
        )


def work_together(order: Order) -> None:
    """Carry it out in ``order.world`` new processes, all here or one in each task. Raises as `wait_for_all`."""
    crew, workers = current_crew(), list[Worker]()
    try:
        for rank in range(1 if crew else order.world):
            child = Child(replace(order, rank=rank, device=crew.device if crew else rank))
            workers.append(child)  # before it starts: a signal may raise at any moment
            child.start()
        if crew:
            workers += crew.with_order(order)
        wait_for_all(workers)
    except BaseException:
        for worker in workers:
            worker.stop()
        raise


@contextmanager
def lead(folder: Path) -> Iterator[None]:
    """Within the context, which is for task 0, trainings use all tasks of the job, where it has several.

    Forked processes ignore SLURM's signals from then on: they would act on them as this one does.
    """
    os.register_at_fork(after_in_child=_leave_signals_alone)
    place = Place.of_slurm()
    if place.tasks == 1:
        yield
        return
    with listening(folder, place) as listener:
        crew = Crew(place, listener)
        before = _crew.set(crew)
        try:
            yield
        finally:
            _crew.reset(before)
            crew.dismiss()


def follow(folder: Path) -> None:
    """In a task other than the first: take part in each training; return when task 0 has ended, however it did.

    SLURM's signals, and the terminal's, are ignored from then on: what they mean is for task 0 to say.

    Raises LostProcessError when task 0 does not begin.
    """
    for number in NOT_FOR_CHILDREN:
        signal.signal(number, signal.SIG_IGN)
    place = Place.of_slurm()
    reached = connect(folder, place)
    if reached is None:
        return
    leader, address = reached
    with closing(leader):
        while (order := _next_order(leader)) is not None:
            if not _carried_out(replace(order, device=place.device, address=address), leader):
                return


def _carried_out(order: Order, leader: Connection) -> bool:
    """Whether task 0 heard how it ended; where task 0 ends first, so does the work."""
    child = Child(order)
    try:
        child.start()
        # The leader says nothing meanwhile, so it can only be gone.
        if leader in connection.wait([leader, child.said]):
            return False
        leader.send_bytes(child.report())
    except OSError:
        return False
    finally:
        child.stop()
    return True


def _next_order(leader: Connection) -> Order | None:
    """None when task 0 has ended."""
    try:
        return leader.recv()
    except (EOFError, OSError):
        return None


def _leave_signals_alone() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # Or a pool could not end its processes, where SLURM's are to outlive this signal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
