"""Every job of a sweep composed when the sweep starts, so that what is in ``conf/`` later changes no job."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, run_job
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from moeprune.app.sweep_record import SweepJob, SweepRecord, job_number, task_overrides


@dataclass(frozen=True)
class Sweep:
    """What Hydra gives a launcher."""

    config: DictConfig
    context: HydraContext
    task: TaskFunction

    @property
    def folder(self) -> Path:
        return Path(str(self.config.hydra.sweep.dir))

    @property
    def launcher(self) -> str:
        return str(self.config.hydra.runtime.choices["hydra/launcher"])


@dataclass(frozen=True)
class ComposedJob:
    """One job: its number, its run directory, the overrides that make it, and the config that they give."""

    number: int
    run_dir: Path
    overrides: tuple[str, ...]
    config: DictConfig

    def run(self, sweep: Sweep) -> JobReturn:
        """Run it in this process, as Hydra does. An exception of the task is in what is returned."""
        return run_job(
            hydra_context=sweep.context,
            task_function=sweep.task,
            config=self.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def __str__(self) -> str:
        return f"#{self.number} {' '.join(self.overrides)}"


def compose_jobs(sweep: Sweep, job_overrides: Sequence[Sequence[str]], first: int) -> list[ComposedJob]:
    """The jobs of a batch whose first has the number ``first``."""
    return [_composed(sweep, list(overrides), first + index) for index, overrides in enumerate(job_overrides)]


def record_jobs(
    sweep: Sweep, jobs: Sequence[ComposedJob], slurm_ids: Sequence[str | None], snapshot: str | None
) -> None:
    """Write what was submitted into the sweep's ``sweep.json``."""
    record = SweepRecord.for_launch(sweep.folder, sys.argv[1:], sweep.launcher, snapshot)
    folders = [os.path.relpath(job.run_dir, sweep.folder.absolute()) for job in jobs]
    described = zip(jobs, folders, slurm_ids, strict=True)
    added = [SweepJob(job.number, folder, job.overrides, slurm_id) for job, folder, slurm_id in described]
    record.with_jobs(added).write(sweep.folder)


def _composed(sweep: Sweep, overrides: list[str], position: int) -> ComposedJob:
    config = sweep.context.config_loader.load_sweep_config(sweep.config, overrides)
    number = job_number(overrides, position)
    with read_write(config), open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
    run_dir = (Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)).absolute()
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(run_dir)
    # Environment variables and the time are those of the submission, on whatever node the job runs. Where a value is
    # missing, the job says so in its manifest.
    with _known_to_interpolations(config), read_write(config), suppress(OmegaConfBaseException):
        OmegaConf.resolve(config)
    return ComposedJob(number, run_dir, task_overrides(overrides), config)


@contextmanager
def _known_to_interpolations(config: DictConfig) -> Iterator[None]:
    """Let ``${hydra:...}`` refer to this job, as it does while the job runs."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)
    try:
        yield
    finally:
        hydra.cfg = before
