"""A job as it travels to another process: what submitit pickles, and what runs on the node."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobRuntime, JobStatus, setup_globals
from omegaconf import DictConfig, read_write

from moeprune.app.launching.compose import ComposedJob, Sweep
from moeprune.app.launching.snapshot import Code, own_plug_ins
from moeprune.app.manifest import manifest, mark, read_manifest
from moeprune.errors import MoepruneError

log = logging.getLogger(__name__)

JOB_LOG = "job.out"


class JobError(MoepruneError):
    """A job of a sweep has failed."""


@dataclass(frozen=True)
class SubmittedJob:
    """Runs one composed job in the process that Submitit starts for it, from the directory of the submission."""

    job: ComposedJob
    sweep: Sweep
    code: Code
    directory: Path
    command: tuple[str, ...]
    requeue: bool

    def __call__(self) -> Any:
        """Run the job in task 0; take part in its trainings in every other task. Returns what the job's function does.

        Raises JobError, in one message, so that SLURM too takes the job for failed.
        """
        import submitit

        from moeprune.training.tasks import follow, lead

        os.environ.setdefault("TQDM_DISABLE", "1")  # what a job prints goes to a file: lines instead of bars
        os.chdir(self.directory)
        sys.argv = list(self.command)
        environment = submitit.JobEnvironment()
        self.job.run_dir.mkdir(parents=True, exist_ok=True)
        if environment.global_rank > 0:
            return follow(self.job.run_dir)
        _remove_remains(environment.paths)
        if environment.cluster == "local":
            # In SLURM a SIGTERM may announce a preemption: a job that ends on it would not be started again.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        with lead(self.job.run_dir):
            return self._result_of(self._run(environment.job_id))

    def checkpoint(self) -> Any:
        """What Submitit calls on a signal before it puts the job back into the queue; None leaves it out."""
        import submitit

        if not self.requeue:
            return None
        mark(self.job.run_dir, "preempted")
        return submitit.helpers.DelayedSubmission(self)

    def _run(self, job_id: str) -> JobReturn:
        setup_globals()
        JobRuntime.instance().set("name", str(self.sweep.config.hydra.job.name))
        with read_write(self.job.config.hydra):
            self.job.config.hydra.job.id = job_id
        return self.job.run(Sweep(self.sweep.config, self.sweep.context, self._checked_task))

    def _checked_task(self, config: DictConfig) -> Any:
        try:
            self.code.check()
        except MoepruneError as error:
            with manifest(self.job.run_dir, list(self.job.overrides)):
                raise error
        return self.sweep.task(config)

    def _result_of(self, returned: JobReturn) -> Any:
        if returned.status is JobStatus.COMPLETED:
            return returned.return_value
        error = returned._return_value
        self._mark_end(error)
        raise JobError(f"{type(error).__name__}: {error}") from error

    def _mark_end(self, error: BaseException) -> None:
        """Correct a manifest that says the job goes on later where it does not."""
        import submitit

        content = read_manifest(self.job.run_dir)
        if content is not None and content["status"] == "preempted":
            gave_up = isinstance(error, submitit.core.utils.UncompletedJobError)
            mark(self.job.run_dir, "timed_out" if gave_up else "failed")


def _remove_remains(paths: Any) -> None:
    """Remove what an earlier start left that was killed while it wrote; Submitit would refuse to write it again."""
    for path in (paths.submitted_pickle, paths.result_pickle):
        path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)


def submissions(
    jobs: Sequence[ComposedJob], sweep: Sweep, snapshot: Path, files: Mapping[str, str], requeue: bool
) -> list[SubmittedJob]:
    """The jobs, each with the code that it must run."""
    here, command = Path.cwd(), tuple(sys.argv)
    codes = (Code(snapshot, files, own_plug_ins(job.config)) for job in jobs)
    return [SubmittedJob(job, sweep, code, here, command, requeue) for job, code in zip(jobs, codes, strict=True)]


def own_folder(sweep_dir: Path) -> Path:
    """Where Submitit keeps the files of one batch: ids come again, and an old result would be taken for the new."""
    return sweep_dir.absolute() / ".submitit" / uuid.uuid4().hex[:8]


def link_log(job: ComposedJob, output: Path) -> Path:
    """Let ``job.out`` in the run directory be what the job prints, wherever Submitit keeps it."""
    link = job.run_dir / JOB_LOG
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(output, job.run_dir))
    return link
