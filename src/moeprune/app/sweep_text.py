"""What became of a sweep, in sentences: counts, what did not succeed and why, and the command that runs it again."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from moeprune.app.sweep_state import FAILURES, JobState, State, SweepState

MOST_REASONS = 12
MOST_LINES = 3  # of what to change
MOST_RANGES = 10


def counts(sweep: SweepState) -> str:
    """``45 success, 2 running, 1 failed``."""
    return ", ".join(f"{len(those)} {state}" for state in State if (those := sweep.those(state))) or "no jobs yet"


def failure_lines(sweep: SweepState) -> list[str]:
    """What did not succeed and why, jobs with the same reason together, and how to run it again; nothing if all did."""
    failures = sweep.those(*FAILURES)
    if not failures:
        return []
    by_reason: dict[tuple[State, str], list[JobState]] = {}
    for job in failures:
        by_reason.setdefault((job.state, job.reason), []).append(job)
    lines = [f"{len(failures)} of {_jobs(len(sweep.jobs))} did not succeed:"]
    for (state, reason), jobs in list(by_reason.items())[:MOST_REASONS]:
        lines += _reason_lines(sweep, state, reason, jobs)
    if len(by_reason) > MOST_REASONS:
        lines.append(f"  and {len(by_reason) - MOST_REASONS} more reasons:  {status_command(sweep.folder)}")
    return [*lines, f"Run again what did not succeed:  {rerun_command(sweep.folder)}"]


def rerun_command(sweep_dir: Path) -> str:
    """The words to type in the directory that ``sweep_dir`` is relative to."""
    return shlex.join(["moeprune-rerun", str(sweep_dir)])


def status_command(sweep_dir: Path) -> str:
    """The words that show the sweep, likewise."""
    return shlex.join(["moeprune-status", str(sweep_dir)])


def log_of(job: JobState) -> Path | None:
    """The file to read when a job did not succeed: its own log, or what its process printed where that ended hard."""
    names = ["moeprune.log", "job.out"]  # the second is the launchers', of jobs in other processes
    if job.state in (State.KILLED, State.NEVER_STARTED):
        names.reverse()
    return next((file for name in names if (file := job.run_dir / name).exists()), None)


def ranges(numbers: Iterable[int], most: int | None = None) -> str:
    """Ascending numbers, in short: ``0-2, 5, 7-9``; of more than ``most`` such parts the first ones and the last."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    if most is not None and len(told) > most:
        told[most - 1 : -1] = ["..."]
    return ", ".join(told)


def duration(seconds: float) -> str:
    """``42 s``, ``7 min``, ``2 h 05 min``, ``3 d 4 h``. Clocks of two machines may differ: never below 0."""
    minutes = max(0, round(seconds)) // 60
    if minutes == 0:
        return f"{max(0, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def shared_overrides(jobs: Sequence[JobState]) -> list[str]:
    """What all jobs were asked alike, in order; nothing where there is one job only, which shows its own."""
    if len(jobs) < 2:
        return []
    others = [set(job.job.overrides) for job in jobs[1:]]
    return [override for override in jobs[0].job.overrides if all(override in other for other in others)]


def _reason_lines(sweep: SweepState, state: State, reason: str, jobs: Sequence[JobState]) -> list[str]:
    shared = set(shared_overrides(sweep.jobs))
    if len(jobs) == 1:
        asked = " ".join(override for override in jobs[0].job.overrides if override not in shared)
        who = f"job {jobs[0].job.number}" + (f" ({asked})" if asked else "")
    else:
        who = f"jobs {ranges((job.job.number for job in jobs), MOST_RANGES)} ({_jobs(len(jobs))})"
    logs = [log for job in jobs if (log := log_of(job)) is not None]
    lines = [f"  {who}: {state}" + (f", {reason}" if reason else "")]
    lines += [f"      {line}" for line in jobs[0].remedy[:MOST_LINES]]
    return [*lines, f"      {'log' if len(jobs) == 1 else 'the first log'}: {logs[0]}"] if logs else lines


def _jobs(count: int) -> str:
    return f"{count} job{'' if count == 1 else 's'}"
