"""``hydra/launcher=slurm``: the jobs of a sweep as an array of a SLURM cluster, by Submitit."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn

from moeprune.app.launching.compose import Sweep, compose_jobs, record_jobs
from moeprune.app.launching.settings import require_at_least, settings_of
from moeprune.app.launching.site import site_settings
from moeprune.app.launching.snapshot import python_path, take_snapshot
from moeprune.app.launching.submitted import SubmittedJob, link_log, own_folder, submissions
from moeprune.app.launching.waiting import ENDED, QUEUED, RUNNING, Phase, Sent, Watch
from moeprune.app.squeue import ask_slurm
from moeprune.errors import InputError

log = logging.getLogger(__name__)

ASK_EVERY_S = 5.0
# What of SLURM's variables a driver inside a job passes on: where the cluster is, not what the driver's job was given.
KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
OF_THE_DRIVER = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "PMI_", "PMIX_")
IN_WORDS = {
    "OUT_OF_MEMORY": "It took more memory than hydra.launcher.mem_gb allows.",
    "TIMEOUT": "Its time (hydra.launcher.timeout_min) was over.",
    "CANCELLED": "It was cancelled.",
    "NODE_FAIL": "Its node failed.",
    "PREEMPTED": "It was preempted and not put back into the queue.",
}


@dataclass(frozen=True)
class SlurmSettings:
    """``conf/hydra/launcher/slurm.yaml`` says what each is."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    nodelist: str | None
    exclude: str | None
    timeout_min: int
    nodes: int
    tasks_per_node: int
    cpus_per_task: int | None
    mem_gb: float | None
    gpus_per_node: int | None
    gres: str | None
    exclusive: bool
    array_parallelism: int
    dependency: str | None
    requeue: bool
    max_num_timeout: int
    signal_delay_s: int
    setup: list[str]
    srun_args: list[str]
    additional_parameters: dict[str, Any]
    comment: str | None
    name: str

    @classmethod
    def of(cls, params: Mapping[str, Any], profile: str) -> SlurmSettings:
        """Raises InputError for a setting that is unknown or cannot be, here or in the site file."""
        site_settings(profile)
        settings = settings_of(cls, params)
        require_at_least(settings, 1, "timeout_min", "nodes", "tasks_per_node", "cpus_per_task", "array_parallelism")
        require_at_least(settings, 0, "mem_gb", "gpus_per_node", "max_num_timeout", "signal_delay_s")
        return settings


def require_slurm() -> None:
    """Raise InputError on a machine from which no job can be submitted."""
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise InputError(
                f"This machine has no SLURM: {program} is not on PATH.",
                change="Use hydra/launcher=local, or submit from a login node of the cluster.",
            )


def launch_on_slurm(
    sweep: Sweep, settings: SlurmSettings, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Submit the jobs, and wait until all of them have ended, in whatever way."""
    jobs = compose_jobs(sweep, job_overrides, first)
    snapshot, files = take_snapshot(sweep.folder)
    submitted = submissions(jobs, sweep, snapshot, files, settings.requeue)
    sent = _submit(submitted, sweep, settings, snapshot)
    record_jobs(sweep, jobs, [job.id for job in sent], snapshot.name)
    array = sent[0].id.partition("_")[0]
    log.info("%d jobs, array %s, in %s", len(jobs), array, sweep.folder)
    try:
        return Watch(sent, _phases, ASK_EVERY_S).wait()
    except KeyboardInterrupt:
        log.info(
            "The jobs go on without this driver. See them: moeprune-status %s. Stop them: scancel %s",
            sweep.folder,
            array,
        )
        raise


def _submit(submitted: list[SubmittedJob], sweep: Sweep, settings: SlurmSettings, snapshot: Path) -> list[Sent]:
    import submitit

    command = f'sh -c \'trap "" USR1 USR2; exec "$@"\' sh {shlex.quote(sys.executable)}'
    executor = submitit.SlurmExecutor(
        own_folder(sweep.folder) / "%j", max_num_timeout=settings.max_num_timeout, python=command
    )
    executor.update_parameters(**sbatch_parameters(settings, sweep.launcher, snapshot))
    with _without_the_drivers_job():
        try:
            started = executor.submit_array(submitted)
        except submitit.core.utils.FailedJobError as error:
            raise InputError(
                f"sbatch refused the jobs: {error}",
                change="Check partition, account, qos and what each job gets, in hydra.launcher or the site file. An "
                "array may be too long for the cluster: hydra.sweeper.max_batch_size=500 submits so many jobs at once.",
            ) from error
    sent = []
    for job, at in zip(submitted, started, strict=True):
        sent.append(Sent(job.job, at.job_id, at.paths.result_pickle, link_log(job.job, at.paths.stdout)))
    return sent


def sbatch_parameters(settings: SlurmSettings, profile: str, snapshot: Path) -> dict[str, Any]:
    """What Submitit writes into the batch script."""
    values = asdict(settings)
    site = site_settings(profile)
    del values["max_num_timeout"]
    more = {**site.get("additional_parameters", {}), **values.pop("additional_parameters")}
    more["requeue" if values.pop("requeue") else "no-requeue"] = True
    parameters = {name: value for name, value in values.items() if value is not None and value is not False}
    for ours, theirs in {"name": "job_name", "timeout_min": "time", "tasks_per_node": "ntasks_per_node"}.items():
        parameters[theirs] = parameters.pop(ours)
    if "mem_gb" in parameters:
        parameters["mem"] = f"{int(parameters.pop('mem_gb') * 1024)}M"
    setup = [*site.get("setup", []), *settings.setup]
    return {
        **parameters,
        "setup": [*_before(settings), *setup, *_after(settings, snapshot)],
        "srun_args": [*site.get("srun_args", []), *settings.srun_args],
        "stderr_to_stdout": True,
        "wckey": None,  # Submitit's own would be refused where clusters check them
        "additional_parameters": more,
    }


def _before(settings: SlurmSettings) -> list[str]:
    """Lines that the user's own may overrule."""
    threads = [] if settings.cpus_per_task is None else [f"export OMP_NUM_THREADS={settings.cpus_per_task}"]
    return [*threads, "export PYTHONUNBUFFERED=1"]


def _after(settings: SlurmSettings, snapshot: Path) -> list[str]:
    # srun does not take over the cores of the job by itself since SLURM 22.05.
    cores = [] if settings.cpus_per_task is None else [f"export SRUN_CPUS_PER_TASK={settings.cpus_per_task}"]
    return [
        *cores,
        f"export PYTHONPATH={shlex.quote(python_path(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
        # Signals are for the first task; they must end neither this shell nor a task that has only begun.
        "trap : USR1 USR2",
    ]


def _phases(jobs: Sequence[Sent]) -> Mapping[str, Phase] | None:
    entries = ask_slurm(job.id for job in jobs)
    if entries is None:
        return None
    phases = {}
    for job in jobs:
        entry = entries.get(job.id)
        if entry is None:
            phases[job.id] = Phase(ENDED, "It has left the queue without a result.")
        elif entry.waits or entry.runs:
            phases[job.id] = Phase(QUEUED if entry.waits else RUNNING)
        else:
            phases[job.id] = Phase(ENDED, IN_WORDS.get(entry.state, f"It ended without a result, as {entry.state}."))
    return phases


@contextmanager
def _without_the_drivers_job() -> Iterator[None]:
    """Hide what the job was given that the driver itself may run in: sbatch and srun would take it for options."""
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(OF_THE_DRIVER) and name not in KEPT_VARIABLES
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
