"""``hydra/launcher=dry_run``: every job composed and checked, and what it would take, without weights or folders."""

from collections import Counter
from collections.abc import Mapping, Sequence

from hydra.core.utils import JobReturn
from tqdm import tqdm

from moeprune.app.explain import explained
from moeprune.app.launching.compose import Sweep, compose_jobs
from moeprune.app.sweep_text import ranges
from moeprune.errors import InputError, MoepruneError


def require_grid(sweep: Sweep) -> None:
    """Raise InputError for a sweeper whose jobs depend on what earlier ones found, or on an earlier sweep's folder."""
    sweeper = sweep.config.hydra.runtime.choices["hydra/sweeper"]
    if sweeper != "basic":
        raise InputError(
            f"hydra/launcher=dry_run shows the jobs of a grid; those of hydra/sweeper={sweeper} are not known before.",
            change="Leave hydra/sweeper out.",
        )


def dry_run(sweep: Sweep, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Print the table of these jobs, whose first has the number ``first``, and the stages that they would compute.

    Raises InputError naming every job that could not run, after the table of the others; a KeyboardInterrupt says what
    was done.
    """
    # Everything heavy is imported only now.
    from moeprune.app.launching.planned import Planner
    from moeprune.app.terminal import quiet_libraries, terminal
    from moeprune.report.tables.dry_run import NOTHING_DONE, print_dry_run

    quiet_libraries()
    planner, planned = Planner(), []
    wrong: dict[str, list[tuple[int, Sequence[str]]]] = {}
    stages: set[tuple[str, str]] = set()
    try:
        for number, overrides in enumerate(tqdm(job_overrides, desc="checking", unit="job"), start=first):
            try:
                (job,) = compose_jobs(sweep, [overrides], number)
                row, of_job = planner.plan(job)
            except Exception as error:
                wrong.setdefault(str(_said(error, overrides)), []).append((number, overrides))
                continue
            planned.append(row)
            stages |= of_job
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"Interrupted. {NOTHING_DONE}") from interrupt
    print_dry_run(planned, Counter(stage for stage, _ in stages), terminal())
    if wrong:
        raise InputError(_told(wrong, len(job_overrides)))
    return []


def _said(error: Exception, overrides: Sequence[str]) -> MoepruneError:
    """The user's mistake behind ``error``; what is no mistake of the user's is raised again."""
    from moeprune.app.main import config_folder

    said = error if isinstance(error, MoepruneError) else explained(error, config_folder(), "config", overrides)
    if said is None:
        raise error
    return said


def _told(wrong: Mapping[str, Sequence[tuple[int, Sequence[str]]]], count: int) -> str:
    """Each mistake with the numbers of the jobs that it stops, and the overrides of the first of them."""
    lines = [f"{sum(len(jobs) for jobs in wrong.values())} of {count} jobs could not run."]
    for said, jobs in wrong.items():
        numbers, overrides = ranges(number for number, _ in jobs), " ".join(jobs[0][1])
        lines += [f"Job {numbers}: {overrides}{' ...' if len(jobs) > 1 else ''}", said]
    return "\n".join(lines)
