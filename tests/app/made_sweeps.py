"""Sweep directories as launchers and jobs leave them, made by hand; and a ``squeue`` that says what a test wants."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moeprune.app.manifest import MANIFEST
from moeprune.app.sweep_record import SweepJob, SweepRecord
from moeprune.pipeline.process import Process


def ago(**span: float) -> str:
    return (datetime.now(UTC) - timedelta(**span)).isoformat(timespec="seconds")


def dead_process() -> Process:
    """One that was on this machine."""
    words = [sys.executable, "-c", "import os; print(os.getpid())"]
    return replace(Process.this(), pid=int(subprocess.run(words, capture_output=True, check=True).stdout))


def process_elsewhere() -> Process:
    return replace(Process.this(), host="n7", machine="another boot")


class HandMadeSweep:
    """Write a sweep's record, then jobs' manifests."""

    def __init__(self, folder: Path, driver: Process | None = None, command: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.record = SweepRecord(command, str(folder.parent), "slurm", ago(hours=12), driver or dead_process())
        folder.mkdir(parents=True)
        self.record.write(folder)

    def add(
        self, manifest: Mapping[str, object] | None, *, slurm_job_id: str | None = None, by: Process | None = None,
        overrides: tuple[str, ...] | None = None, save: bool = True,
    ) -> int:  # fmt: skip
        """A job, with the manifest of a run by process ``by``, or none; its number. ``save`` the record, or later.

        An entry of the manifest may be a function without arguments: a time that is long ago now.
        """
        number = len(self.record.jobs)
        job = SweepJob(number, str(number), overrides or ("seed=0", f"ratio=0.{number}"), slurm_job_id)
        self.record = self.record.with_jobs([job])
        if save:
            self.record.write(self.folder)
        if manifest is not None:
            by = by or Process.this()
            told = {"pid": by.pid, "host": by.host, "process": {"machine": by.machine, "started": by.started}}
            times = {"started": ago(hours=2), "updated": ago(seconds=30), "slurm_job_id": slurm_job_id}
            content = {"error": None, "overrides": job.overrides, **told, **times, "stage": None, **manifest}
            content = {name: value() if callable(value) else value for name, value in content.items()}
            (self.folder / job.folder).mkdir()
            (self.folder / job.folder / MANIFEST).write_text(json.dumps(content))
        return number


class Queue:
    """A program ``squeue``, first on PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.program = folder / "squeue"
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        self.says()

    def says(self, *lines: str) -> None:
        """Lines such as ``12_0|None|n1|RUNNING``."""
        self.does("\n".join(f"echo '{line}'" for line in lines))

    def does(self, script: str) -> None:
        self.program.write_text(f"#!/bin/sh\n{script}\n")
        self.program.chmod(0o755)
