"""Around a sweep: its record at the start; at its end a table of all runs, what failed, and the exit code."""

import atexit
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from moeprune.app.manifest import mark
from moeprune.app.sweep_record import RECORD, SweepRecord
from moeprune.app.sweep_state import FAILURES, State, read_sweep
from moeprune.app.sweep_text import counts, failure_lines, status_command
from moeprune.errors import InputError
from moeprune.pipeline.process import Process

JOBS_FAILED, USER_ERROR = 1, 2
RERUN, SEARCH, DRY_RUN = "rerun", "optuna", "dry_run"


class SweepReport(Callback):
    """Hydra callback: records the sweep when it starts, reports it when the process ends.

    At exit and not at ``on_multirun_end``, because Hydra leaves that out when a launcher raises the error of a job.
    """

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Raises SystemExit where another sweep uses the directory: Hydra makes a warning of any other exception."""
        sweep_dir, choices = Path(config.hydra.sweep.dir), config.hydra.runtime.choices
        if choices["hydra/launcher"] == DRY_RUN:  # which leaves nothing behind
            return
        if choices["hydra/sweeper"] != RERUN:  # which goes on with the record of the sweep that it runs again
            if (sweep_dir / RECORD).exists() and (who := _user_of(sweep_dir, choices["hydra/sweeper"])):
                print(
                    f"moeprune: {sweep_dir} is in use: {who}.\n"
                    f"Choose another hydra.sweep.dir, or wait; see it with:  {status_command(sweep_dir)}",
                    file=sys.stderr,
                )
                sys.exit(USER_ERROR)
            sweep_dir.mkdir(parents=True, exist_ok=True)
            SweepRecord.for_launch(sweep_dir, sys.argv[1:], choices["hydra/launcher"]).write(sweep_dir)
        atexit.register(_report, sweep_dir)

    def on_multirun_end(self, config: DictConfig, **_kwargs: Any) -> None:
        """Raises SystemExit where a job did not succeed: launchers return normally after a job that was killed."""
        if config.hydra.runtime.choices["hydra/launcher"] == DRY_RUN:
            return
        try:
            failed = read_sweep(Path(config.hydra.sweep.dir), by_driver=True).those(*FAILURES)
        except InputError as error:  # Hydra would make a warning of it, and the sweep a success
            print(f"moeprune: {error}", file=sys.stderr)
            sys.exit(JOBS_FAILED)
        if failed:
            sys.exit(JOBS_FAILED)


def _user_of(sweep_dir: Path, sweeper: str) -> str | None:
    """Who would mix results with those of a new sweep in the directory, in words."""
    try:
        sweep = read_sweep(sweep_dir)
    except InputError:  # no record that can be read
        return None
    driver = sweep.record.driver if sweep.record else None
    if driver is not None and driver != Process.this() and sweep.driver_gone is False:
        return f"process {driver.pid} on {driver.host} runs a sweep there"
    if sweeper == SEARCH:  # it goes on with new numbers, beside trials that have not ended
        return None
    at_work = sweep.those(State.RUNNING, State.WAITING)
    at_work += [job for job in sweep.those(State.QUEUED, State.PREEMPTED) if job.job.slurm_job_id]
    return f"{len(at_work)} jobs of a sweep there have not ended" if at_work else None


def _report(sweep_dir: Path) -> None:
    if (sweep_dir / RECORD).exists():
        for job in read_sweep(sweep_dir, by_driver=True).those(State.KILLED):
            mark(job.run_dir, "killed")  # it could not say so itself
    try:
        if any(sweep_dir.glob("*/manifest.json")):
            # Imported here: jobs of a sweep import this module too, and plots take a second to load.
            from moeprune.app.terminal import terminal
            from moeprune.report.summary import write_sweep_report

            write_sweep_report(sweep_dir, terminal())
    finally:
        if (sweep_dir / RECORD).exists():
            _say_what_failed(sweep_dir)


def _say_what_failed(sweep_dir: Path) -> None:
    sweep = read_sweep(sweep_dir, by_driver=True)
    if not sweep.has_ended:
        print(f"The sweep goes on without this process: {counts(sweep)}.\nSee it with:  {status_command(sweep_dir)}")
    for line in failure_lines(sweep):
        print(line)
