"""``hydra/launcher=basic``: one job after the other in this process."""

import importlib
import logging
import pkgutil
from collections.abc import Sequence
from contextlib import suppress

from hydra.core.utils import JobReturn, configure_log, setup_globals

import moeprune
from moeprune.app.launching.compose import Sweep, compose_jobs, record_jobs

log = logging.getLogger(__name__)


def launch_here(sweep: Sweep, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Run every job, also after one has failed; the sweeper raises the first error at the end."""
    setup_globals()
    hydra = sweep.config.hydra
    configure_log(hydra.hydra_logging, hydra.verbose)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    jobs = compose_jobs(sweep, job_overrides, first)
    record_jobs(sweep, jobs, [None] * len(jobs), snapshot=None)
    _load_all_code()
    log.info("%d jobs, one after the other, in %s", len(jobs), sweep.folder)
    results = []
    for job in jobs:
        log.info("\t%s", job)
        results.append(job.run(sweep))
        configure_log(hydra.hydra_logging, hydra.verbose)  # the job's log file is the job's own
    return results


def _load_all_code() -> None:
    """Import every module of the package, so that what is edited while the sweep runs changes no later job."""
    for module in pkgutil.walk_packages(moeprune.__path__, "moeprune."):
        if module.name != "moeprune.__main__":
            with suppress(ImportError):  # what belongs to an extra that is not installed, or is broken
                importlib.import_module(module.name)
