"""Where each job of a sweep stands: from its manifest, the process that wrote it, SLURM, and the sweep's driver."""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeGuard

from moeprune.app.manifest import MANIFEST, SIGN_OF_LIFE_SECONDS, read_manifest
from moeprune.app.squeue import Entry, ask_slurm
from moeprune.app.sweep_record import RECORD, SweepJob, SweepRecord
from moeprune.errors import InputError
from moeprune.pipeline.process import Process

SILENT_AFTER_SECONDS = 3 * SIGN_OF_LIFE_SECONDS
NO_ANSWER = "SLURM gives no answer here"
Queue = Mapping[str, Entry] | None


class State(StrEnum):
    """In the order in which people want to read them."""

    FAILED = "failed"
    KILLED = "killed"
    TIMED_OUT = "timed out"
    INTERRUPTED = "interrupted"
    NEVER_STARTED = "never started"
    SILENT = "silent"
    RUNNING = "running"
    WAITING = "waiting"
    PREEMPTED = "preempted"
    QUEUED = "queued"
    SUCCESS = "success"


FAILURES = (State.FAILED, State.KILLED, State.TIMED_OUT, State.INTERRUPTED, State.NEVER_STARTED)
ENDED = (*FAILURES, State.SUCCESS)


@dataclass(frozen=True)
class JobState:
    """``detail``: why it is in this state, in words. ``manifest``: what the job itself wrote; None before it begins."""

    job: SweepJob
    run_dir: Path
    state: State
    detail: str
    manifest: Mapping[str, Any] | None

    @property
    def error(self) -> tuple[str, str] | None:
        """Type and first line of the exception that ended the job's last attempt, where that was no interruption."""
        error = (self.manifest or {}).get("error") if self.state in (State.FAILED, State.TIMED_OUT) else None
        return _first_lines(error) if error else None

    @property
    def remedy(self) -> list[str]:
        """What the error's message says after its first line: what is possible, and what to change."""
        error = (self.manifest or {}).get("error") if self.error else None
        return str((error or {}).get("message", "")).splitlines()[1:]

    @property
    def reason(self) -> str:
        """Why the job did not succeed, in one line."""
        return ": ".join(filter(None, self.error)) if self.error else self.detail


@dataclass(frozen=True)
class SweepState:
    """A sweep at a moment; ``record`` is None for one whose launcher wrote none, ``driver_gone`` where nobody knows."""

    folder: Path
    record: SweepRecord | None
    driver_gone: bool | None
    jobs: tuple[JobState, ...]
    at: datetime

    def those(self, *states: State) -> list[JobState]:
        return [job for job in self.jobs if job.state in states]

    @property
    def has_ended(self) -> bool:
        """Whether no job will change its state by itself, and no more jobs will come."""
        return self.driver_gone is not False and all(job.state in ENDED for job in self.jobs)


def read_sweep(sweep_dir: Path, by_driver: bool = False) -> SweepState:
    """Reads everything anew. ``by_driver``: it is the driver that asks, about to end, so that what has not begun never
    will. Raises InputError for a directory that is none of a sweep."""
    record = SweepRecord.read(sweep_dir) if (sweep_dir / RECORD).exists() else None
    jobs = _jobs(sweep_dir, record)
    if record is None and not jobs:
        raise InputError(
            f"{sweep_dir} is not the directory of a sweep: it holds no {RECORD} and no runs.",
            change="Give the directory that the sweep wrote to, such as runs/2025-01-31/12-00-00-sweep.",
        )
    manifests = {job: _fresh_manifest(sweep_dir / job.folder) for job in jobs}
    queue = ask_slurm(_ids_to_ask_for(record, manifests))
    driver_gone = by_driver or _driver_gone(record, queue)
    at = datetime.now(UTC)
    states = []
    for job, manifest in manifests.items():
        state, detail = _state(job, manifest, queue, driver_gone, at)
        if state in (State.KILLED, State.NEVER_STARTED):
            # What is gone now may have written its last words after they were read above.
            manifest = _fresh_manifest(sweep_dir / job.folder)
            state, detail = _state(job, manifest, queue, driver_gone, at)
        states.append(JobState(job, sweep_dir / job.folder, state, detail, manifest))
    return SweepState(sweep_dir, record, driver_gone, tuple(states), at)


def newest_sweep(runs: Path) -> Path:
    """The sweep below ``runs`` that began last; one without a job, whose submission was refused, only where there is no
    other. Raises InputError where there is none."""
    found = {file.parent for name in (RECORD, "multirun.yaml") for file in runs.glob(f"*/*/{name}")}
    if not found:
        raise InputError(f"There is no sweep under {runs}/.", change="Give the directory that a sweep wrote to.")
    # Sweeps are named by date and time; one that has been renamed comes where its name puts it.
    in_order = sorted(found, key=lambda folder: (folder.parent.name, folder.name), reverse=True)
    return next((folder for folder in in_order if _has_jobs(folder)), in_order[0])


def time_of(text: object) -> datetime | None:
    """A time as manifests write it; None for anything else."""
    try:
        return datetime.fromisoformat(str(text))
    except ValueError:
        return None


def _has_jobs(sweep_dir: Path) -> bool:
    if any(sweep_dir.glob(f"*/{MANIFEST}")):
        return True
    try:
        return bool(SweepRecord.read(sweep_dir).jobs)
    except InputError:
        return False


def _jobs(sweep_dir: Path, record: SweepRecord | None) -> list[SweepJob]:
    """The recorded ones, and those of launchers that record none, by their manifests."""
    jobs = list(record.jobs) if record else []
    known = {job.folder for job in jobs}
    for file in sweep_dir.glob(f"*/{MANIFEST}"):
        name = file.parent.name
        if name not in known and name.isdecimal():
            overrides = (read_manifest(file.parent) or {}).get("overrides", ())
            jobs.append(SweepJob(int(name), name, tuple(overrides)))
    return sorted(jobs, key=lambda job: job.number)


def _fresh_manifest(run_dir: Path) -> dict[str, Any] | None:
    """The manifest as it is now: listing a folder makes a network file system forget what it remembers of its files."""
    with suppress(OSError):
        os.listdir(run_dir)
    return read_manifest(run_dir)


def _ids_to_ask_for(
    record: SweepRecord | None, manifests: Mapping[SweepJob, Mapping[str, Any] | None]
) -> Iterable[str]:
    for job, manifest in manifests.items():
        if manifest is None or manifest["status"] != "success":
            yield from filter(None, (job.slurm_job_id, (manifest or {}).get("slurm_job_id")))
    if record is not None and record.driver.gone is None and record.driver.slurm_job_id:
        yield record.driver.slurm_job_id


def _driver_gone(record: SweepRecord | None, queue: Queue) -> bool | None:
    if record is None:
        return None
    driver = record.driver
    if driver.gone is None and driver.slurm_job_id and queue is not None:
        return not _alive(queue.get(driver.slurm_job_id))
    return driver.gone


def _state(
    job: SweepJob, manifest: Mapping[str, Any] | None, queue: Queue, driver_gone: bool | None, at: datetime
) -> tuple[State, str]:
    entry = queue.get(job.slurm_job_id) if queue and job.slurm_job_id else None
    if manifest is None or _is_of_before(job, manifest):
        state, reason = _before_start(job, entry, queue, driver_gone)
        return state, reason + (_ended_before(manifest) if state is State.NEVER_STARTED else "")
    status = manifest["status"]
    if status == "success":
        return State.SUCCESS, ""
    if status == "running":
        return _running(job, manifest, entry, queue, at)
    if entry is not None and entry.waits:
        return (State.PREEMPTED if status == "preempted" else State.QUEUED), f"starts again; {entry.detail}"
    if status == "preempted":
        return _preempted(job, entry, queue, driver_gone)
    if status == "killed":
        return State.KILLED, f"ended without a word{_slurm_says(entry)}"
    ended = {"failed": State.FAILED, "interrupted": State.INTERRUPTED, "timed_out": State.TIMED_OUT}
    return ended.get(status, State.FAILED), "" if status in ended else status


def _preempted(job: SweepJob, entry: Entry | None, queue: Queue, driver_gone: bool | None) -> tuple[State, str]:
    if entry is not None and entry.runs:
        return State.RUNNING, "starting again"
    if job.slurm_job_id is None:
        return (State.KILLED, "preempted, and the driver is gone") if driver_gone else (State.PREEMPTED, "starts again")
    if queue is None:
        return State.SILENT, f"preempted; {NO_ANSWER}"
    return State.KILLED, f"preempted, and SLURM does not start it again{_slurm_says(entry)}"


def _is_of_before(job: SweepJob, manifest: Mapping[str, Any]) -> bool:
    """Whether the manifest tells of an attempt before the one that was submitted last."""
    other_job = job.slurm_job_id and manifest.get("slurm_job_id") not in (None, job.slurm_job_id)
    return manifest["status"] == "queued" or bool(other_job and manifest["status"] != "success")


def _before_start(job: SweepJob, entry: Entry | None, queue: Queue, driver_gone: bool | None) -> tuple[State, str]:
    if job.slurm_job_id is not None:
        if entry is not None and entry.waits:
            return State.QUEUED, entry.detail
        if entry is not None and entry.runs:
            return State.RUNNING, "starting"
        if queue is not None:
            return State.NEVER_STARTED, f"its SLURM job has ended{_slurm_says(entry)}"
        return State.SILENT, NO_ANSWER
    if driver_gone:
        return State.NEVER_STARTED, "the sweep's driver ended before its turn"
    return State.QUEUED, ""


def _ended_before(manifest: Mapping[str, Any] | None) -> str:
    """How the attempt before ended, of a job that was to be run again."""
    attempts = [] if manifest is None else manifest["earlier"] if manifest["status"] == "queued" else [manifest]
    if not attempts:
        return ""
    error = attempts[-1].get("error")
    why = f", {': '.join(_first_lines(error))}" if error else ""
    return f"; before that: {attempts[-1]['status']}{why}"


def _first_lines(error: Mapping[str, str]) -> tuple[str, str]:
    return error["type"], error["message"].partition("\n")[0]


def _running(
    job: SweepJob, manifest: Mapping[str, Any], entry: Entry | None, queue: Queue, at: datetime
) -> tuple[State, str]:
    """A manifest that says running tells the truth only while its process lives."""
    gone = _process(manifest).gone
    if gone is None and job.slurm_job_id is None and manifest.get("slurm_job_id"):  # a part of its driver's job
        entry = (queue or {}).get(manifest["slurm_job_id"])
        if queue is not None and not _alive(entry):
            return State.KILLED, f"its driver's SLURM job has ended{_slurm_says(entry)}"
    elif gone is not False and job.slurm_job_id is not None and queue is not None:
        if entry is not None and entry.waits:
            return State.QUEUED, f"was stopped, starts again; {entry.detail}"
        if not _alive(entry):
            return State.KILLED, f"ended without a word{_slurm_says(entry)}"
        if gone:
            return State.RUNNING, "ending" if entry.state == "COMPLETING" else "starting again"
    elif gone:
        return State.KILLED, "its process is gone"
    silent = _seconds_since(manifest.get("updated") or manifest.get("started"), at)
    if gone is None and silent > SILENT_AFTER_SECONDS:
        told = f"for {silent / 60:.0f} min"
        return (State.RUNNING, f"silent {told}") if _alive(entry) else (State.SILENT, told)
    stage = manifest.get("stage") or {}
    if stage.get("state") == "waiting":
        return State.WAITING, f"for {stage['name']} by {stage['waiting_for']}"
    return State.RUNNING, ""


def _process(manifest: Mapping[str, Any]) -> Process:
    told = manifest.get("process") or {}
    return Process(manifest.get("host", ""), manifest.get("pid", 0), told.get("machine") or "", told.get("started"))


def _alive(entry: Entry | None) -> TypeGuard[Entry]:
    return entry is not None and (entry.runs or entry.waits)


def _slurm_says(entry: Entry | None) -> str:
    return f" ({entry.state})" if entry is not None else ""


def _seconds_since(text: object, at: datetime) -> float:
    moment = time_of(text)
    return (at - moment).total_seconds() if moment else 0.0
