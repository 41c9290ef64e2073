"""``hydra/launcher=basic``: one job after the other in this process."""

import logging
from collections.abc import Sequence

from hydra.core.utils import JobReturn, configure_log, setup_globals

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
    log.info("%d jobs, one after the other, in %s", len(jobs), sweep.folder)
    results = []
    for job in jobs:
        log.info("\t%s", job)
        results.append(job.run(sweep))
        configure_log(hydra.hydra_logging, hydra.verbose)  # the job's log file is the job's own
    return results
