"""``moeprune-status``: where the jobs of a sweep stand, from what they wrote, with or without the sweep's driver."""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moeprune.app.sweep_state import ENDED, FAILURES, JobState, State, SweepState, newest_sweep, read_sweep, time_of
from moeprune.app.sweep_text import counts, duration, failure_lines, ranges, shared_overrides, status_command
from moeprune.app.terminal import terminal

RUNS = Path("runs")
WATCH_SECONDS = 10.0
MOST_ROWS = 24  # with more jobs, those that stand still for the same reason share a row
MOVING = (State.RUNNING, State.WAITING, State.PREEMPTED, State.SILENT)
WIDE, MIDDLE = 100, 72
LONGEST_REASON = 60
STYLES = {
    State.SUCCESS: "green", State.RUNNING: "cyan", State.WAITING: "yellow", State.PREEMPTED: "yellow",
    State.SILENT: "yellow", State.QUEUED: "dim", **dict.fromkeys(FAILURES, "red"),
}  # fmt: skip


def run_status(words: Sequence[str]) -> int:
    """Print a sweep's state; with ``--watch`` again and again until all its jobs have ended. Ctrl-C ends that only."""
    parser = argparse.ArgumentParser(prog="moeprune-status", description="Show where the jobs of a sweep stand.")
    parser.add_argument("sweep_dir", type=Path, nargs="?", help=f"default: the newest sweep under {RUNS}/")
    parser.add_argument("--watch", action="store_true", help="show it anew until all jobs have ended")
    asked = parser.parse_args(words)
    sweep_dir = asked.sweep_dir or newest_sweep(RUNS)
    console = terminal()
    if not asked.watch:
        _print(read_sweep(sweep_dir), console)
        return 0
    try:
        _print(_watched(sweep_dir, console), console)
    except KeyboardInterrupt:
        console.print(Text(f"The sweep goes on. See it with:  {status_command(sweep_dir)}"), soft_wrap=True)
    return 0


def _watched(sweep_dir: Path, console: Console) -> SweepState:
    """Show the sweep until it ends; what it is like then."""
    with Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext() as live:
        told = ""
        while not (sweep := read_sweep(sweep_dir)).has_ended:
            if live is not None:
                live.update(view(sweep, console.width), refresh=True)
            elif told != (told := counts(sweep)):  # a file gets a line whenever the counts change
                print(f"{sweep.at.astimezone():%H:%M:%S} {told}", flush=True)
            time.sleep(WATCH_SECONDS)
    return sweep


def _print(sweep: SweepState, console: Console) -> None:
    console.print(view(sweep, console.width))
    # Paths and commands are not broken into lines, so that they can be copied.
    if lines := failure_lines(sweep):
        console.print(Text("\n".join(["", *lines])), soft_wrap=True)


def view(sweep: SweepState, width: int) -> RenderableType:
    """Head, counts, and a table with a row per job that fits ``width`` characters."""
    shared = shared_overrides(sweep.jobs)
    parts: list[RenderableType] = [*_head(sweep), Text(counts(sweep), style="bold")]
    if shared:
        parts.append(Text(f"All jobs: {' '.join(shared)}", style="dim"))
    if sweep.jobs:
        parts.append(_table(sweep, set(shared), width))
    if sweep.those(State.SILENT):
        parts.append(Text("silent: its machine cannot be asked from here; the time is by this machine's clock."))
    return Group(*parts)


def _head(sweep: SweepState) -> list[Text]:
    lines = [Text(f"Sweep {sweep.folder}", style="bold")]
    record = sweep.record
    if record is None:
        return lines
    submitted = time_of(record.submitted)
    if submitted is not None:
        ago = duration((sweep.at - submitted).total_seconds())
        lines.append(Text(f"Launcher {record.launcher}, started {submitted.astimezone():%Y-%m-%d %H:%M}, {ago} ago."))
    known = {None: "cannot be asked from here", True: "is gone", False: "is at work"}[sweep.driver_gone]
    if not sweep.has_ended:
        lines.append(Text(f"Its driver, process {record.driver.pid} on {record.driver.host}, {known}."))
    return lines


def _table(sweep: SweepState, shared: set[str], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("job", justify="right", no_wrap=True, overflow="fold", max_width=max(8, width // 4))
    table.add_column("overrides", overflow="fold", ratio=1)
    table.add_column("state", overflow="fold", max_width=width // 2)
    if width >= MIDDLE:
        table.add_column("stage", overflow="fold")
    table.add_column("time", no_wrap=True, justify="right")
    if width >= WIDE:
        table.add_column("where", overflow="fold")
    for jobs in _rows(sweep):
        cells = _cells(jobs, shared, sweep.at)
        if width < WIDE:
            del cells[5]
        if width < MIDDLE:
            del cells[3]
        table.add_row(*cells)
    return table


def _rows(sweep: SweepState) -> list[list[JobState]]:
    """A list per row: one job, or in a large sweep all that stand still for the same reason."""
    if len(sweep.jobs) <= MOST_ROWS:
        return [[job] for job in sweep.jobs]
    rows: dict[tuple[State, str | int], list[JobState]] = {}
    for job in sweep.jobs:
        own_row = job.state in MOVING
        rows.setdefault((job.state, job.job.number if own_row else job.reason), []).append(job)
    order = list(State)
    return sorted(rows.values(), key=lambda row: (order.index(row[0].state), row[0].job.number))


def _cells(jobs: Sequence[JobState], shared: set[str], at: datetime) -> list[Text]:
    """Job, overrides, state, stage, time, where."""
    state = Text(_state_text(jobs[0]), style=STYLES[jobs[0].state])
    if len(jobs) > 1:
        which = Text(ranges(job.job.number for job in jobs))
        return [Text(f"{len(jobs)} jobs"), which, state, Text(), Text(), Text()]
    job = jobs[0]
    overrides = " ".join(override for override in job.job.overrides if override not in shared)
    return [
        Text(str(job.job.number)), Text(overrides), state, Text(_stage(job)), Text(_time(job, at)), Text(_where(job)),
    ]  # fmt: skip


def _state_text(job: JobState) -> str:
    reason = job.reason if len(job.reason) <= LONGEST_REASON else f"{job.reason[: LONGEST_REASON - 1]}…"
    starts = (job.manifest or {}).get("attempt", 0) + 1
    again = f" (start {starts})" if starts > 1 and job.state is not State.SUCCESS else ""
    separator = " " if reason.startswith("for ") else ": "
    return f"{job.state}{again}" + (f"{separator}{reason}" if reason else "")


def _stage(job: JobState) -> str:
    """The stage that it is at, or was at when it ended; where it was to end early, after which."""
    manifest = job.manifest or {}
    if job.state in (State.QUEUED, State.NEVER_STARTED):
        return ""
    stage = manifest.get("stage")
    if stage is None:
        return f"until {manifest['until']}" if manifest.get("until") else ""
    return f"{stage['name']}, {manifest.get('stages_done', 0)} done"


def _time(job: JobState, at: datetime) -> str:
    """How long the last attempt has run, or did."""
    manifest = job.manifest or {}
    begun = time_of(manifest.get("started"))
    if begun is None or job.state is State.QUEUED:
        return ""
    is_over = job.state in ENDED or job.state is State.PREEMPTED
    over = time_of(manifest.get("ended") or manifest.get("updated")) if is_over else at
    return duration((over - begun).total_seconds()) if over else ""


def _where(job: JobState) -> str:
    slurm = job.job.slurm_job_id or (job.manifest or {}).get("slurm_job_id")
    return " ".join(filter(None, ((job.manifest or {}).get("host"), slurm)))
