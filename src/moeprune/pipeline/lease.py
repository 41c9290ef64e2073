"""The right to compute a stage, which one process holds at a time, across processes and machines.

    CACHE/statistics/.lease-3f2a.../1     the first holder's lease, named by its generation
    CACHE/statistics/.lease-3f2a.../2     that of the run which took over; the highest number holds

A lease names its owner and carries a counter that the owner raises every few seconds. It is created with O_EXCL, which
exactly one of many contenders can do, on local disks and on NFS from version 3. Nobody locks a file, and nobody
compares the clocks of two machines: a waiter takes over when the owner's process is gone from its own machine, or when
it has itself watched the counter stand still for long enough.

The lease saves work; it does not guard the result. A result is safe also while two processes think that they hold the
stage (`moeprune.pipeline.workplace`).
"""

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moeprune.errors import InputError
from moeprune.pipeline.process import Process
from moeprune.pipeline.use import now

_BEFORE_COUNTER = '{"beat": "'  # the counter stands at a fixed place with a fixed width: a beat overwrites it alone
_DIGITS = 20
_SURELY_SILENT_SECONDS = 3600.0


@dataclass(frozen=True)
class Timing:
    """Seconds: between two signs of life; of silence after which another machine's process is taken for dead;
    between two looks of a waiter, first and at most; between two log lines of a waiter.

    Raises InputError where the silence is not several signs of life long.
    """

    beat: float = 5.0
    abandoned_after: float = 180.0
    first_look: float = 0.05
    longest_look: float = 3.0
    tell_again: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < 3 * self.beat <= self.abandoned_after:
            raise InputError(
                f"abandoned_after={self.abandoned_after:g} s is too short for a sign of life every {self.beat:g} s.",
                change=f"Use at least {3 * self.beat:g} s.",
            )


@dataclass(frozen=True)
class Owner:
    """Who holds a lease: its process, the start of its SLURM job, its run directory, and a random token."""

    process: Process
    restart: int = 0
    run: str = ""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def here(cls, run: str = "") -> "Owner":
        """This process, with a new token."""
        return cls(Process.this(), int(os.environ.get("SLURM_RESTART_COUNT", 0)), run)

    @classmethod
    def read(cls, content: bytes) -> "Owner | None":
        """The owner that a lease names; None where its creator has not written it, or was killed before it could."""
        try:
            told = json.loads(content)
            return cls(Process(**told["process"]), int(told["restart"]), str(told["run"]), str(told["token"]))
        except (ValueError, KeyError, TypeError):
            return None

    def as_json(self) -> str:
        """With a counter of 0 at its fixed place."""
        return f'{_BEFORE_COUNTER}{0:0{_DIGITS}d}", {json.dumps(asdict(self))[1:]}'

    def earlier_start_of(self, other: "Owner") -> bool:
        """Whether SLURM has started this owner's job again since, as ``other``."""
        job = self.process.slurm_job_id
        return job is not None and job == other.process.slurm_job_id and self.restart < other.restart

    def __str__(self) -> str:
        job = f"SLURM job {self.process.slurm_job_id}" if self.process.slurm_job_id else ""
        where = ", ".join(part for part in (f"process {self.process.pid}", job, self.run) if part)
        return f"{self.process.host} ({where})"


@dataclass(frozen=True)
class Held:
    """A lease as somebody else sees it. ``owner`` is None where the file does not say."""

    generation: int
    content: bytes

    @property
    def owner(self) -> Owner | None:
        return Owner.read(self.content)

    def __str__(self) -> str:
        return str(self.owner or "a run that has not said its name")


@dataclass
class Lease:
    """A lease that this process holds."""

    file: Path
    generation: int
    owner: Owner
    _descriptor: int
    _beats: int = 0

    @contextmanager
    def kept(self, every: float, also: Callable[[], None]) -> Iterator[None]:
        """Within the context the counter rises every so many seconds, and ``also`` is called; then the lease is given
        back. A process that was forked inside does neither."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(every):
                self.beat()
                also()

        thread = threading.Thread(target=beat, daemon=True, name="lease")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            if os.getpid() == self.owner.process.pid:
                thread.join()
                self.give_back()

    def beat(self) -> None:
        """Raise the counter. Through the open file: a lease that was removed is never created again by this."""
        self._beats += 1
        with suppress(OSError):  # a full or vanished disk: the computation itself will say so
            os.pwrite(self._descriptor, f"{self._beats:0{_DIGITS}d}".encode(), len(_BEFORE_COUNTER))
            _show_others(self._descriptor)

    def give_back(self) -> None:
        """Remove the lease and those of the generations that it took over from. One that was lost stays as it is."""
        mine = _read(self.file) == self.owner
        for generation in range(1, self.generation) if mine else ():
            with suppress(OSError):
                (self.file.parent / str(generation)).unlink()
        self.withdraw()

    def withdraw(self) -> None:
        """Remove this lease alone, and the folder where it was the last."""
        with suppress(OSError):
            if _read(self.file) == self.owner:
                self.file.unlink()
            self.file.parent.rmdir()  # not empty where somebody else has come meanwhile
        with suppress(OSError):
            os.close(self._descriptor)


def lease_folder(stage_folder: Path) -> Path:
    """Where the leases on a stage lie whose result is to be in ``stage_folder``."""
    return stage_folder.with_name(f".lease-{stage_folder.name}")


def holder(folder: Path) -> Held | None:
    """The lease of the highest generation; None where nobody holds one."""
    try:
        generations = sorted((int(name) for name in os.listdir(folder) if name.isdigit()), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    for generation in generations:
        with suppress(FileNotFoundError):  # given back meanwhile
            return Held(generation, (folder / str(generation)).read_bytes())
    return None


def held_by_the_living(folder: Path) -> bool:
    """Whether the holder of a lease may live, told at one look: its process is not known to be gone, and its counter
    rose within the last hour of the file system's clock."""
    held = holder(folder)
    if held is None or (held.owner is not None and held.owner.process.gone):
        return False
    try:
        return now(folder.parent) - (folder / str(held.generation)).stat().st_mtime < _SURELY_SILENT_SECONDS
    except OSError:  # given back meanwhile, or a cache that cannot be written: nothing can be removed either
        return True


def take(folder: Path, owner: Owner, over: Held | None = None) -> Lease | None:
    """A lease for ``owner``: the first, or the one after ``over``; None when another process was faster.

    Raises OSError where it cannot be written.
    """
    generation = over.generation + 1 if over else 1
    file = folder / str(generation)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except (FileExistsError, FileNotFoundError):  # taken, or the folder was just removed with its last lease
        return None
    lease = Lease(file, generation, owner, descriptor)
    try:
        os.write(descriptor, owner.as_json().encode())
        _show_others(descriptor)
    except OSError:
        os.close(descriptor)
        file.unlink()
        raise
    # Creating is never fooled, but what was seen before may have been old: whom we take over from has given back and
    # somebody else has come, or a listing that a file server's client kept for a while lacked the highest.
    highest = holder(folder)
    is_highest = highest is not None and highest.owner == owner
    if is_highest and (over is None or _read(folder / str(over.generation)) == over.owner):
        return lease
    lease.withdraw()
    return None


def _read(file: Path) -> Owner | None:
    try:
        return Owner.read(file.read_bytes())
    except OSError:
        return None


def _show_others(descriptor: int) -> None:
    """Have a file server's client send what was written, as closing any descriptor of the file does; unlike a sync it
    costs nothing on a local disk."""
    os.close(os.dup(descriptor))
