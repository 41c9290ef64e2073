"""``hydra/launcher=local``: a few jobs at once on this machine, each in a process of its own, by Submitit."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from hydra.core.utils import JobReturn
from submitit.local.local import LocalJob

from moeprune.app.launching.compose import Sweep, compose_jobs, record_jobs
from moeprune.app.launching.settings import require_at_least, settings_of
from moeprune.app.launching.snapshot import python_path, take_snapshot
from moeprune.app.launching.submitted import SubmittedJob, link_log, own_folder, submissions
from moeprune.app.launching.waiting import ENDED, RUNNING, Phase, Sent, Watch
from moeprune.errors import InputError

log = logging.getLogger(__name__)

ASK_EVERY_S = 1.0
STOPPED_WITHIN_S = 20.0


@dataclass(frozen=True)
class LocalSettings:
    """``conf/hydra/launcher/local.yaml`` says what each is."""

    parallel_jobs: int
    gpus_per_job: int | None
    cpus_per_job: int | None
    timeout_min: int
    max_num_timeout: int

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> LocalSettings:
        """Raises InputError for a setting that is unknown or cannot be."""
        settings = settings_of(cls, params)
        require_at_least(settings, 1, "parallel_jobs", "cpus_per_job", "timeout_min")
        require_at_least(settings, 0, "gpus_per_job", "max_num_timeout")
        return settings


def launch_on_this_machine(
    sweep: Sweep, settings: LocalSettings, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Run the jobs, ``parallel_jobs`` at once, each in a process of its own; Ctrl-C ends those that run."""
    gpus = gpus_of_slots(settings)
    jobs = compose_jobs(sweep, job_overrides, first)
    snapshot, files = take_snapshot(sweep.folder)
    submitted = submissions(jobs, sweep, snapshot, files, requeue=True)
    record_jobs(sweep, jobs, [None] * len(jobs), snapshot.name)
    log.info("%d jobs, %d at once, in %s", len(jobs), settings.parallel_jobs, sweep.folder)
    pool = Pool(submitted, [{**environment_of_jobs(settings, snapshot), **own} for own in gpus], sweep.folder, settings)
    try:
        return Watch([], pool.phases, ASK_EVERY_S).wait(pool.start_more)
    except BaseException:
        pool.stop()
        raise


def gpus_of_slots(settings: LocalSettings) -> list[dict[str, str]]:
    """For each of the jobs that run at once, the variable that says which GPUs it sees.

    Raises InputError where there are fewer GPUs than they need.
    """
    each, slots = settings.gpus_per_job, settings.parallel_jobs
    if each is None:
        return [{}] * slots
    names = _gpus() if each else []
    if len(names) < each * slots:
        raise InputError(
            f"hydra.launcher.parallel_jobs={slots} with gpus_per_job={each} needs {each * slots} GPUs; this machine "
            f"shows {len(names)}.",
            change="Lower one of them.",
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[each * slot : each * (slot + 1)])} for slot in range(slots)]


def environment_of_jobs(settings: LocalSettings, snapshot: Path) -> dict[str, str]:
    """Variables of every job. By default the cores are divided among the jobs that run at once."""
    threads = settings.cpus_per_job or max(1, len(os.sched_getaffinity(0)) // settings.parallel_jobs)
    own_path = os.environ.get("PYTHONPATH")
    return {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([python_path(snapshot), *([own_path] if own_path else [])]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }


class Pool:
    """Starts jobs as others end; ``environments`` has one entry for each that may run at once."""

    def __init__(
        self,
        jobs: Sequence[SubmittedJob],
        environments: Sequence[dict[str, str]],
        sweep_dir: Path,
        settings: LocalSettings,
    ) -> None:
        self._folder = own_folder(sweep_dir)
        self._environments, self._settings = environments, settings
        self._waiting = list(reversed(jobs))
        self._last: dict[int, _Executor] = {}
        self._executors: list[_Executor] = []
        self._by_id: dict[str, _Executor] = {}

    def start_more(self) -> list[Sent] | None:
        """Start a job in every slot that is free; None once there is none left to start."""
        started = []
        for slot, environment in enumerate(self._environments):
            if self._waiting and (slot not in self._last or self._last[slot].has_ended):
                job = self._waiting.pop()
                # Process numbers, which are the ids, come again: in a folder of all, a result of an earlier job's too.
                executor = _Executor(self._folder / str(job.job.number) / "%j", environment, self._settings)
                self._executors.append(executor)  # before it starts: a signal may raise at any moment
                at = executor.submit(job)
                self._last[slot] = self._by_id[at.job_id] = executor
                log.info("\t%s: started", job.job)
                started.append(Sent(job.job, at.job_id, at.paths.result_pickle, link_log(job.job, at.paths.stdout)))
        return started if started or self._waiting else None

    def phases(self, jobs: Sequence[Sent]) -> dict[str, Phase]:
        """A job without a result whose process has ended was killed."""
        gone = Phase(ENDED, "Its process ended without a result: it was killed, perhaps for want of memory.")
        return {job.id: gone if self._by_id[job.id].has_ended else Phase(RUNNING) for job in jobs}

    def stop(self) -> None:
        """End what runs: politely, so that manifests say so, then for good."""
        alive = [executor.process for executor in self._executors if executor.process and not executor.has_ended]
        for process in alive:
            process.terminate()
        for process in alive:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOPPED_WITHIN_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class _Executor(submitit.LocalExecutor):
    """Submitit's for one job, with the environment of its slot, in a process group of its own: Ctrl-C in a terminal
    reaches the driver alone, which ends its jobs."""

    def __init__(self, folder: Path, environment: dict[str, str], settings: LocalSettings) -> None:
        super().__init__(folder, max_num_timeout=settings.max_num_timeout)
        self.update_parameters(timeout_min=settings.timeout_min)
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            **environment,
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_COMMAND": self._submitit_command_str,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * settings.timeout_min),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_EXECUTOR": "local",
        }

    def _submit_command(self, command: str) -> LocalJob[Any]:
        controller = [sys.executable, "-m", "submitit.local._local", str(self.folder)]
        self.process = subprocess.Popen(controller, env=self._environment, start_new_session=True)
        return LocalJob(self.folder, str(self.process.pid), (0,), self.process)

    @property
    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        answer = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(number) for number in range(len(answer.stdout.splitlines()))] if answer.returncode == 0 else []
