"""Waiting for a stage that another process computes, and judging whether that process still lives."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from moeprune.pipeline.lease import Held, Lease, Owner, Timing, holder, take

log = logging.getLogger(__name__)

# The earlier start of a waiter's own SLURM job was ended by SLURM, unless its node has only lost touch: so few missing
# signs of life tell.
_BEATS_OF_EARLIER_START = 3


class Watch:
    """What a waiter has seen of the lease that it waits for, by its own clock alone."""

    def __init__(self, waiter: Owner, timing: Timing) -> None:
        self._waiter = waiter
        self._timing = timing
        self._seen: Held | None = None
        self._silent = 0.0
        self._looked = time.monotonic()

    def why_free(self, held: Held) -> str | None:
        """Why the lease may be taken over, in words; None while its owner may live."""
        now = time.monotonic()
        # A waiter that was stopped itself must not count the time in which nobody looked.
        passed = min(now - self._looked, 2 * self._timing.longest_look)
        self._silent = self._silent + passed if held == self._seen else 0.0
        self._seen, self._looked = held, now
        if held.owner is not None and held.owner.process.gone:
            return "its process is gone"
        if held.owner is not None and held.owner.earlier_start_of(self._waiter):
            if self._silent >= _BEATS_OF_EARLIER_START * self._timing.beat:
                return f"SLURM has started its job again, and it gave no sign of life for {self._silent:.0f} s"
        elif self._silent >= self._timing.abandoned_after:
            return f"it gave no sign of life for {self._silent:.0f} s"
        return None


def take_turn(
    folder: Path,
    name: str,
    waiter: Owner,
    timing: Timing,
    waiting: Callable[[Held], None],
    meanwhile: Callable[[], None],
) -> Lease | None:
    """The lease in ``folder`` as soon as no living process holds it; None when one did and has given it back, after
    which the result may be there.

    ``name`` is the stage's in the log; ``waiting`` is called once for every other holder, ``meanwhile`` at every look.
    """
    watch, started, pause, next_line = Watch(waiter, timing), time.monotonic(), timing.first_look, 0.0
    told: tuple[int, Owner | None] | None = None
    while True:
        held = holder(folder)
        if held is None and told is not None:
            return None
        reason = watch.why_free(held) if held else None
        if held is None or reason:
            lease = take(folder, waiter, over=held)
            if lease is not None:
                if reason:
                    log.warning("%s: taking over from %s: %s", name, held, reason)
                return lease
        elif told != (held.generation, held.owner) or time.monotonic() >= next_line:
            waited = time.monotonic() - started
            log.info("%s: %s computes it, waiting%s", name, held, f" for {waited:.0f} s" if told else "")
            if told != (held.generation, held.owner):
                waiting(held)
            told, next_line = (held.generation, held.owner), time.monotonic() + timing.tell_again
        meanwhile()
        time.sleep(pause)
        pause = min(pause * 1.5, timing.longest_look)
