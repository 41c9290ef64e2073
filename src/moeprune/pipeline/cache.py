"""A content-addressed cache of stage results: written atomically, checked when read, shared by all runs.

A folder appears under its final name only when it is complete (`moeprune.pipeline.record`); a damaged one is set aside
and computed again. One process computes a stage and the others wait for it (`moeprune.pipeline.lease`, `waiting`).
What a resumable stage had written when it was interrupted stays, and the next run that wants the stage goes on from
there (`workplace`).

A process holds one lease at a time, and waits only while it holds none: so no two can wait for each other.
"""

import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moeprune.pipeline.disk import disk_errors
from moeprune.pipeline.identity import describe, stage_key
from moeprune.pipeline.lease import Owner, Timing, holder, lease_folder
from moeprune.pipeline.measure import measured
from moeprune.pipeline.progress import Progress, Silent
from moeprune.pipeline.record import RECORD, WALK, DamagedError, read_sound_record, write_record
from moeprune.pipeline.use import UsedStages, mark_used
from moeprune.pipeline.waiting import take_turn
from moeprune.pipeline.workplace import Workplace, clear_away, set_aside

__all__ = ["RECORD", "WALK", "Artifact", "StageCache"]

log = logging.getLogger(__name__)

SILENT, USUAL = Silent(), Timing()
NOBODY: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, its key, and what computing it cost (seconds, peak memory in GiB)."""

    stage: str
    key: str
    folder: Path
    cached: bool
    seconds: float
    peak_memory_gib: float


@dataclass(frozen=True)
class _Wanted:
    """A stage that somebody asks for: where it is to be, what it is made of, and how."""

    stage: str
    key: str
    folder: Path
    content: Mapping[str, Any]
    compute: Callable[[Path], None]
    resumable: bool

    def __str__(self) -> str:
        return f"{self.stage} {self.key[:12]}"


class StageCache:
    """Finished stages under ``root``, by stage name and key.

    ``progress`` is told what happens. ``made_by`` says for people who makes results here, for example
    ``{"run": "runs/12", "model": "tiny"}``: it goes into ``stage.json`` and, the run, to those who wait, and into no
    key. ``timing`` is how long processes wait for each other.
    """

    def __init__(
        self,
        root: Path,
        progress: Progress = SILENT,
        made_by: Mapping[str, str] = NOBODY,
        timing: Timing = USUAL,
    ) -> None:
        self.root = root
        self.progress = progress
        self._made_by = {"moeprune": _own_version(), "host": platform.node(), **made_by}
        self._timing = timing
        self._in_use = UsedStages()

    def get(
        self,
        stage: str,
        version: int,
        settings: object,
        inputs: Sequence[str],
        compute: Callable[[Path], None],
        resumable: bool = False,
    ) -> Artifact:
        """The stage's result, from disk when it is there and sound, else made by ``compute(folder)``: here, or by a
        process that is at it already.

        The folder is empty; that of a ``resumable`` stage holds what an interrupted run left in it.

        Raises CacheError when the folder cannot be written or the disk is full; nothing is left behind then, but for
        what a resumable stage can use.
        """
        key = stage_key(stage, version, settings, inputs)
        content = {"stage": stage, "key": key, "version": version, "settings": describe(settings)}
        content["inputs"] = list(inputs)
        wanted = _Wanted(stage, key, self.root / stage / key, content, compute, resumable)
        artifact = self._find(wanted)
        if artifact is not None and lease_folder(wanted.folder).exists():
            clear_away(wanted.folder)
        while artifact is None:
            artifact = self._take_turn(wanted) or self._find(wanted)
        self._in_use.add(artifact.folder)
        self.progress.finished(artifact)
        return artifact

    def _find(self, wanted: _Wanted, replace: bool = False) -> Artifact | None:
        """The finished stage; None where there is none, or a damaged one, which goes away if it is to be replaced."""
        try:
            mark_used(wanted.folder)
            record = read_sound_record(wanted.folder)
            artifact = Artifact(
                wanted.stage, wanted.key, wanted.folder, True, record["seconds"], record["peak_memory_gib"]
            )
        except FileNotFoundError:
            return None
        except (DamagedError, KeyError) as error:
            if replace:
                log.warning("cached stage %s is damaged (%s): computing it again", wanted.folder, error)
                set_aside(wanted.folder)
            return None
        log.info("%s: reused", wanted)
        return artifact

    def _take_turn(self, wanted: _Wanted) -> Artifact | None:
        """The stage as this process makes or finds it when it holds the lease; None when it is to look again."""
        owner = Owner.here(self._made_by.get("run", ""))
        work = Workplace(wanted.folder, owner)
        with disk_errors(wanted.folder.parent, work.content):
            lease = take_turn(
                lease_folder(wanted.folder),
                str(wanted),
                owner,
                self._timing,
                lambda held: self.progress.waiting(wanted.stage, wanted.key, str(held)),
                self._in_use.mark,
            )
            if lease is None:
                return None
            with lease.kept(self._timing.beat, self._in_use.mark):
                work.open()
                with _left_or_lost(work, wanted):
                    return self._find_or_compute(wanted, work)
        return None

    def _find_or_compute(self, wanted: _Wanted, work: Workplace) -> Artifact:
        # Only after this can nobody else publish, and only then is it worth looking whether somebody did.
        work.fence_others()
        found = self._find(wanted, replace=True)
        work.clear_others(go_on=wanted.resumable and found is None)
        if found is not None:
            work.discard()
            return found
        log.info("%s: computing", wanted)
        self.progress.computing(wanted.stage, wanted.key, work.content)
        with measured() as cost:
            wanted.compute(work.content)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        cost_content = {"seconds": cost.seconds, "peak_memory_gib": cost.peak_memory_gib}
        write_record(work.content, {**wanted.content, **cost_content, "created": created, "made_by": self._made_by})
        shutil.rmtree(work.content / WALK, ignore_errors=True)  # not before: without it nothing could be resumed
        work.publish()
        log.info("%s: %.1f s, peak %.2f GiB", wanted, cost.seconds, cost.peak_memory_gib)
        return Artifact(wanted.stage, wanted.key, wanted.folder, False, cost.seconds, cost.peak_memory_gib)


@contextmanager
def _left_or_lost(work: Workplace, wanted: _Wanted) -> Iterator[None]:
    """What fails inside leaves its work to the next one, or nothing. Whatever fails because another process has taken
    the stage over is no failure."""
    try:
        yield
    except Exception as error:
        if not work.is_lost():
            work.leave(wanted.resumable)
            raise
        now = holder(lease_folder(wanted.folder))
        log.warning(
            "%s: this process gave no sign of life and lost the stage to %s; using that result (%r here)",
            wanted,
            now or "another one, which has finished",
            error,
        )
        work.discard()
    except BaseException:
        work.leave(wanted.resumable)
        raise


def _own_version() -> str:
    try:
        return version("moeprune")
    except PackageNotFoundError:
        return ""
