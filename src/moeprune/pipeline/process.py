"""Which process on which machine, and whether it still lives, as far as this machine can tell."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Process:
    """A process. ``machine`` tells apart what shares a host name: another boot, another container. ``started`` tells
    apart processes that had the same number one after the other. ``slurm_job_id`` is the job that it runs in."""

    host: str
    pid: int
    machine: str = ""
    started: float | None = None
    slurm_job_id: str | None = None

    @classmethod
    def this(cls) -> "Process":
        """The process that asks."""
        return cls(platform.node(), os.getpid(), machine(), _started(os.getpid()), slurm_job_id())

    @property
    def gone(self) -> bool | None:
        """Whether it has ended; None where only another machine can tell."""
        if self.host != platform.node() or self.machine != machine():
            return None
        if not _exists(self.pid):
            return True
        try:
            started = _started(self.pid)
        except PermissionError:  # somebody else's, where /proc hides those
            return False
        return started is None or (self.started is not None and started != self.started)


def slurm_job_id() -> str | None:
    """The job that SLURM runs this process in, as ``squeue`` and submitit name it: 12, or 12_3 of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def machine() -> str:
    """This boot of this kernel, and the name space of its process numbers; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> float | None:
    """When a process started, in a unit of its machine's own; None where there is none or it is a zombie.

    Raises PermissionError where the system does not tell.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])  # ticks since boot: no change of the clock moves them
    except (FileNotFoundError, ProcessLookupError) as error:
        if Path("/proc/self/stat").exists():
            if _exists(pid):
                raise PermissionError(f"/proc hides process {pid}") from error
            return None
    try:
        return psutil.Process(pid).create_time()
    except psutil.AccessDenied as error:
        raise PermissionError(f"process {pid} is hidden") from error
    except psutil.Error:
        return None
