"""What a sweep was asked to do, ``sweep.json``: its command, its jobs, and the process that drives it.

Written by the launcher when jobs are submitted. ``moeprune-status`` and ``moeprune-rerun`` read it, also when the
driver has died; what became of a job is in the job's own manifest.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeprune.app.manifest import now, write_atomically
from moeprune.errors import InputError
from moeprune.pipeline.process import Process

RECORD = "sweep.json"
SUBDIRECTORY = re.compile(r"hydra\.sweep\.subdir=(\d+)")


@dataclass(frozen=True)
class SweepJob:
    """One job: its number, its folder below the sweep's, its task overrides, and its id where SLURM runs it (12_0)."""

    number: int
    folder: str
    overrides: tuple[str, ...]
    slurm_job_id: str | None = None


@dataclass(frozen=True)
class SweepRecord:
    """``command``: the words after ``moeprune``, given in ``directory``. ``driver``: the process that submits jobs and
    waits for them. ``snapshot``: the folder below the sweep's of the code that its jobs run, where they do not run the
    installed one."""

    command: tuple[str, ...]
    directory: str
    launcher: str
    submitted: str
    driver: Process
    snapshot: str | None = None
    jobs: tuple[SweepJob, ...] = ()

    @classmethod
    def for_launch(
        cls, sweep_dir: Path, command: Sequence[str], launcher: str, snapshot: str | None = None
    ) -> "SweepRecord":
        """What a launcher adds its jobs to: the record that is there, with this process as driver, where it is of the
        same command or this process drives it already, as in a rerun; else a new one without jobs."""
        this = Process.this()
        new = cls(tuple(command), os.getcwd(), launcher, now(), this, snapshot)
        try:
            record = cls.read(sweep_dir)
        except InputError:
            return new
        if record.driver == this or (record.command, record.directory) == (new.command, new.directory):
            return replace(record, launcher=launcher, snapshot=snapshot, driver=this)
        return new

    @classmethod
    def read(cls, sweep_dir: Path) -> "SweepRecord":
        """Raises InputError where there is none, or none that can be read."""
        path = sweep_dir / RECORD
        try:
            content = json.loads(path.read_text())
            jobs = tuple(_job(entry) for entry in content.pop("jobs"))
            command, driver = tuple(content.pop("command")), Process(**content.pop("driver"))
            return cls(command=command, driver=driver, jobs=jobs, **content)
        except FileNotFoundError as error:
            raise InputError(
                f"{sweep_dir} is not the directory of a sweep: it holds no {RECORD}.",
                change="Give the directory that the sweep wrote to, such as runs/2025-01-31/12-00-00-sweep.",
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {error}.") from error

    def with_jobs(self, jobs: Iterable[SweepJob]) -> "SweepRecord":
        """More jobs, or others in the place of those with the same number."""
        by_number = {job.number: job for job in (*self.jobs, *jobs)}
        return replace(self, jobs=tuple(by_number[number] for number in sorted(by_number)))

    def driven_by_this_process(self, again: Iterable[int]) -> "SweepRecord":
        """The same sweep, carried on by this process, which launches the jobs ``again`` anew."""
        numbers = set(again)
        jobs = (replace(job, slurm_job_id=None) if job.number in numbers else job for job in self.jobs)
        return replace(self, driver=Process.this(), jobs=tuple(jobs))

    def write(self, sweep_dir: Path) -> None:
        """Write ``sweep.json``, whole or not at all. Raises OSError."""
        write_atomically(sweep_dir / RECORD, json.dumps(asdict(self), indent=1))


def job_number(overrides: Iterable[str], position: int) -> int:
    """The number of a job: that of its folder where ``hydra.sweep.subdir=N`` names it, as a rerun's jobs do, else
    ``position`` in the sweep."""
    named = (SUBDIRECTORY.fullmatch(override) for override in overrides)
    return next((int(match[1]) for match in named if match), position)


def task_overrides(overrides: Iterable[str]) -> tuple[str, ...]:
    """A job's overrides without those for Hydra itself."""
    return tuple(override for override in overrides if not re.match(r"[+~]*hydra[./]", override))


def _job(entry: dict[str, Any]) -> SweepJob:
    return SweepJob(entry["number"], entry["folder"], tuple(entry["overrides"]), entry.get("slurm_job_id"))
