"""Which stages somebody uses: the last change of a stage's record is the time of its last use.

The file system sets that time, so what `last_used` gives and `now` are of one clock, whatever machine asks.
"""

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from moeprune.pipeline.record import RECORD

MARK_EVERY_SECONDS = 60.0
# A run marks what it has used as long as it computes or waits; between two marks it may load, report, or copy a model.
IN_USE_SECONDS = 15 * 60.0


class UsedStages:
    """The stages that this process has asked for and may still read."""

    def __init__(self) -> None:
        self._folders: set[Path] = set()
        self._marked = time.monotonic()

    def add(self, folder: Path) -> None:
        """One more stage, which was just marked."""
        self._folders.add(folder)

    def mark(self) -> None:
        """Mark all of them, unless that was done lately."""
        if time.monotonic() - self._marked >= MARK_EVERY_SECONDS:
            self._marked = time.monotonic()
            for folder in tuple(self._folders):
                mark_used(folder)


def mark_used(folder: Path) -> None:
    """Note that the stage is used now. A read-only cache stays as it is."""
    with suppress(OSError):
        os.utime(folder / RECORD)


def last_used(folder: Path) -> float:
    """Seconds since the epoch; 0 for a folder without a record."""
    try:
        return (folder / RECORD).stat().st_mtime
    except OSError:
        return 0.0


def now(root: Path) -> float:
    """Seconds since the epoch by the same clock. Raises OSError where nothing can be written."""
    with tempfile.NamedTemporaryFile(dir=root, prefix=".clock-") as probe:
        os.utime(probe.name)
        return os.stat(probe.name).st_mtime
