"""What tests do with a running SLURM: ask it, disturb it, run sweeps on it and read what they left."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SCRIPTS = Path(__file__).resolve().parents[2] / "slurm/cluster"
PROGRAMS = ("slurmctld", "slurmd", "sinfo", "munged")
CPUS = 8  # of each node: more than there are, so that jobs which only wait for something do not keep others waiting
CLIENT_SECONDS = 30
PATIENCE_SECONDS = 240.0  # for a machine that has much else to do; otherwise nothing takes a minute


def what_is_missing() -> str:
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return ", ".join([*missing, *(["root"] if os.geteuid() else [])])


@dataclass(frozen=True)
class Cluster:
    """``environment`` is that of whoever uses it."""

    environment: dict[str, str]

    def client(self, *command: str) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=CLIENT_SECONDS)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def disturb(self, *how: str) -> None:
        """``crash n1``, ``revive n1``, ``stop-controller``, ``start-controller``."""
        subprocess.run([SCRIPTS / "disturb", *how], env=self.environment, check=True, timeout=2 * CLIENT_SECONDS)

    def signal(self, job_id: str, number: str) -> None:
        """scancel sends it at once, and then tries for long to hear from a job that has gone back into the queue."""
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(["scancel", f"--signal={number}", job_id], env=self.environment, check=False, timeout=2)

    def node_of(self, job_id: str) -> str:
        return self.client("squeue", "--noheader", f"--jobs={job_id}", "--format=%N")

    @contextmanager
    def started(self, command: Sequence[str], log: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A command that uses the cluster, with stdout and stderr in ``log``; it is killed if the body fails."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=log.parent, env={**self.environment, **variables}, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true answer of ``condition``, asked five times a second."""
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.2)
    return answer


def manifest_of(run_dir: Path) -> dict[str, Any]:
    """Empty as long as there is none."""
    try:
        content: dict[str, Any] = json.loads((run_dir / "manifest.json").read_text())
    except FileNotFoundError:
        return {}
    return content


def ended(run_dir: Path) -> bool:
    """Whether the run has said how it ended, or its process is gone."""
    manifest = manifest_of(run_dir)
    if manifest.get("status") != "running":
        return bool(manifest)
    try:
        return psutil.Process(manifest["pid"]).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
