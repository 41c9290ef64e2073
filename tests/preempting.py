"""Processes that SLURM preempts, at a line of code that a test chooses or at any moment."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PREEMPTED = 255  # the exit code of what Submitit's handler raises


def _put_back_into_the_queue(_signal, _frame) -> None:
    """How Submitit's handler ends, in the middle of whatever the main thread is doing."""
    sys.exit(-1)


class _AtLine:
    """A trace function that sends its own process SIGUSR2 at the ``line``-th line run in some files."""

    def __init__(self, files: Sequence[str], line: int | None) -> None:
        self._files, self._line, self.seen = tuple(files), line, 0

    def __call__(self, frame, _event, _argument):
        return self._count if frame.f_code.co_filename.endswith(self._files) else None

    def _count(self, _frame, event, _argument):
        if event == "line":
            self.seen += 1
            if self.seen == self._line:
                signal.raise_signal(signal.SIGUSR2)
        return self._count


def _run(job: Callable[[], object], files: Sequence[str], line: int | None, lines: Path | None) -> None:
    signal.signal(signal.SIGUSR2, _put_back_into_the_queue)
    trace = _AtLine(files, line)
    sys.settrace(trace if files else None)
    job()
    sys.settrace(None)
    if lines is not None:
        lines.write_text(str(trace.seen))


def started(job, files=(), line=None, lines=None) -> multiprocessing.Process:
    """A copy of this process that does the job as if Submitit had started it; see `_AtLine`."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(job, files, line, lines))
    process.start()
    return process


def exit_code(process) -> int:
    process.join()
    return process.exitcode


def lines_of(job: Callable[[], object], files: Sequence[str], note: Path) -> int:
    """How many lines the whole job runs in these files."""
    assert exit_code(started(job, files, None, note)) == 0
    return int(note.read_text())


def preempted_again_and_again(job: Callable[[], object], files: Sequence[str], lines: int, seed: int, times=5) -> int:
    """Preempt the job ``times`` times at a random one of the first ``lines`` lines; how often that was before its end.

    The next start goes on where the last one was.
    """
    rng = random.Random(seed)
    codes = [exit_code(started(job, files, rng.randint(1, lines))) for _ in range(times)]
    assert set(codes) <= {0, PREEMPTED}
    return codes.count(PREEMPTED)


def signalled(job: Callable[[], object], number: int, seconds: float) -> int:
    """The exit code of the job, which gets a signal after some seconds."""
    process = started(job)
    time.sleep(seconds)
    os.kill(process.pid, number)
    return exit_code(process)
