"""The driver of a sweep waits here until every job has ended, however it did."""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus

from moeprune.app.launching.compose import ComposedJob
from moeprune.app.launching.submitted import JobError

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
REPORT_SECONDS = 60.0
# A shared file system may show a result some time after its job has gone, and a job that is put back into the queue may
# seem gone for a moment.
SETTLED_SECONDS = 5.0

QUEUED, RUNNING, ENDED = "queued", "running", "ended"


@dataclass(frozen=True)
class Sent:
    """A job that was submitted: its id there, the file that holds its result at the end, and its log."""

    job: ComposedJob
    id: str
    result: Path
    log: Path


@dataclass(frozen=True)
class Phase:
    """Where a job is, in one of the three words above, and what is known of its end."""

    word: str
    reason: str = ""


# What a cluster says of the jobs asked for, by id; None while it does not answer.
Ask = Callable[[Sequence[Sent]], Mapping[str, Phase] | None]
# Starts the jobs whose turn has come; None once all have been started.
StartMore = Callable[[], Sequence[Sent] | None]


def _all_started() -> None:
    return None


class Watch:
    """The jobs of one batch, from their submission to the last result."""

    def __init__(self, sent: Sequence[Sent], ask: Ask, ask_every_s: float) -> None:
        self.open = {job.id: job for job in sent}
        self.returned: dict[int, JobReturn] = {}
        self._ask, self._ask_every_s = ask, ask_every_s
        self._phases: Mapping[str, Phase] = {}
        self._gone_since: dict[str, float] = {}
        self._asked = self._reported = float("-inf")
        self._answers = True

    def wait(self, start_more: StartMore = _all_started) -> list[JobReturn]:
        """All jobs' results, in the order of their numbers. An exception, such as Ctrl-C, leaves the jobs alone.

        ``start_more`` starts what it can now, and gives None once all have been started: a job whose result is there
        may not have made room yet for the next.
        """
        while True:
            started = start_more()
            self.open |= {job.id: job for job in started or ()}
            if not self.open and started is None:
                return [self.returned[number] for number in sorted(self.returned)]
            self._take_results()
            self._take_dead()
            self._report()
            time.sleep(LOOK_SECONDS)

    def _take_results(self) -> None:
        for folder in {job.result.parent for job in self.open.values()}:
            _refresh(folder)
        for job in list(self.open.values()):
            if _exists(job.result):
                self._end(job, _result(job))

    def _take_dead(self) -> None:
        """Give up jobs that are gone without a result."""
        now = time.monotonic()
        if now - self._asked < self._ask_every_s:
            return
        phases = self._ask(list(self.open.values()))
        self._asked = time.monotonic()
        if (phases is not None) is not self._answers:
            self._answers = phases is not None
            log.warning("SLURM answers again." if self._answers else "SLURM does not answer; waiting until it does.")
        if phases is None:
            return
        self._phases = phases
        for job in list(self.open.values()):
            phase = phases[job.id]
            if phase.word != ENDED:
                self._gone_since.pop(job.id, None)
            elif now - self._gone_since.setdefault(job.id, now) >= SETTLED_SECONDS and not _exists(job.result):
                self._end(job, JobError(f"{phase.reason} Its log: {job.log}"))

    def _end(self, job: Sent, result: object) -> None:
        del self.open[job.id]
        failed = isinstance(result, JobError)
        returned = JobReturn(overrides=job.job.overrides, cfg=job.job.config)
        returned.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
        returned.return_value = JobError(f"Job {job.job} failed: {result}") if failed else result
        self.returned[job.job.number] = returned
        log.info("\t%s: %s", job.job, f"failed: {str(result).splitlines()[0]}" if failed else "done")

    def _report(self) -> None:
        if not self.open or time.monotonic() - self._reported < REPORT_SECONDS:
            return
        self._reported = time.monotonic()
        words = [self._phases[name].word if name in self._phases else QUEUED for name in self.open]
        failed = sum(returned.status is JobStatus.FAILED for returned in self.returned.values())
        log.info(
            "%d done, %d failed, %d running, %d queued",  # the words of moeprune-status
            len(self.returned) - failed, failed, len(words) - words.count(QUEUED), words.count(QUEUED),
        )  # fmt: skip


def _result(job: Sent) -> object:
    """What the job returned, or a JobError."""
    import submitit

    try:
        outcome, value = submitit.core.utils.pickle_load(job.result)
    except Exception as error:  # one result less must not cost those of the other jobs
        return JobError(f"Its result {job.result} cannot be read: {error!r}")
    if outcome == "success":
        return value
    ours = f"{JobError.__module__}.{JobError.__qualname__}: "
    if ours in value:
        return JobError(value.rpartition(ours)[2].strip())
    below_innermost_frame = value.rpartition('\n  File "')[2].splitlines()[1:]
    return JobError("\n".join(dropwhile(lambda line: line.startswith("  "), below_innermost_frame)))


def _refresh(folder: Path) -> None:
    """Reading a folder makes NFS look for new files in it."""
    with suppress(OSError):
        os.listdir(folder)


def _exists(file: Path) -> bool:
    """Whether it is there; a shared file system that fails for a moment has it later."""
    try:
        return file.exists()
    except OSError:
        return False
