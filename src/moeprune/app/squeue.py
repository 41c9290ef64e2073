"""What SLURM says of jobs, where it can be asked."""

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TIMEOUT_SECONDS = 5.0
WAITING = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
RUNNING = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"})
UNKNOWN_JOB = "Invalid job id"


@dataclass(frozen=True)
class Entry:
    """A job's line in SLURM's queue: its state, and its nodes or the reason why it waits."""

    state: str
    detail: str

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def runs(self) -> bool:
        return self.state in RUNNING


def ask_slurm(job_ids: Iterable[str]) -> Mapping[str, Entry] | None:
    """The lines of these jobs, by id; jobs that have long ended have none. None where SLURM gives no answer."""
    of_arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    if not of_arrays or shutil.which("squeue") is None:
        return None
    form = "%i|%r|%N|%T"
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={form}", f"--jobs={','.join(of_arrays)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode != 0:
        return {} if UNKNOWN_JOB in answer.stderr else None
    return dict(_entry(line) for line in answer.stdout.splitlines() if line.count("|") == 3)


def _entry(line: str) -> tuple[str, Entry]:
    job_id, reason, nodes, state = line.strip().split("|")
    return job_id, Entry(state, nodes or reason)
