"""A run's manifest: what ran, where it stands, and why it failed. Written by the run itself, atomically."""

import json
import logging
import os
import threading
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import MoepruneError
from moeprune.pipeline.process import Process

if TYPE_CHECKING:
    from moeprune.pipeline.cache import Artifact

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED = ("running", "preempted")
SIGN_OF_LIFE_SECONDS = 60.0
# A signal's handler knows only the directory of the run that it interrupts, and finds the writer of its manifest here.
_OPEN: dict[Path, "ManifestProgress"] = {}


class ManifestProgress:
    """Writes where a run stands into its manifest; a `moeprune.pipeline.progress.Progress`.

    What is told here is written at once, and ``updated`` every minute. A disk that cannot be written is logged once and
    stops no run.
    """

    def __init__(self, run_dir: Path, content: dict[str, Any]) -> None:
        self._run_dir = run_dir
        self._content = content
        self._pid = os.getpid()
        # Re-entrant: a signal's handler may mark the manifest while the same thread is writing it.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._has_warned = False

    def waiting(self, stage: str, key: str, owner: str) -> None:
        self._at(stage, key, "waiting", owner)

    def computing(self, stage: str, key: str, _folder: Path) -> None:
        self._at(stage, key, "computing", None)

    def finished(self, _artifact: "Artifact") -> None:
        self.note(stage=None, stages_done=self._content["stages_done"] + 1)

    def evaluated(self, _variant: str, _metrics: Mapping[str, Any]) -> None:
        """Metrics are in ``metrics.json``."""

    def runs_until(self, stage: str | None) -> None:
        """The run ends after this stage, as it was asked to."""
        self.note(until=stage)

    def _at(self, stage: str, key: str, state: str, owner: str | None) -> None:
        before = self._content["stage"] or {}
        # A run that waits is told so again and again; it has waited since the first time.
        goes_on = (before.get("name"), before.get("key"), before.get("state")) == (stage, key, state)
        since = before["since"] if goes_on else now()
        self.note(stage={"name": stage, "key": key, "state": state, "since": since, "waiting_for": owner})

    def note(self, **entries: Any) -> None:
        """Change entries and write; what cannot be written now is written with the next change."""
        try:
            self.write(**entries)
        except OSError as error:
            if not self._has_warned:
                log.warning("%s cannot be written: %s. The run goes on.", self._run_dir / MANIFEST, error)
            self._has_warned = True

    def write(self, **entries: Any) -> None:
        if os.getpid() != self._pid:  # a forked child tells nothing in the name of the run
            return
        with self._lock:
            self._content.update(entries, updated=now())
            write_atomically(self._run_dir / MANIFEST, json.dumps(self._content, indent=1))

    def end(self, error: BaseException | None) -> None:
        """Write how the run ended. Raises OSError where that fails, but never in the place of ``error``."""
        self._closed.set()
        with self._lock:
            # A run that a signal has marked goes on later; the exception only takes it out of its work.
            marked = self._content["status"] != "running"
            entries: dict[str, Any] = {"ended": now()}
            if not marked:
                entries |= {"status": "success", "stage": None} if error is None else _failure(error)
            if error is None:
                self.write(**entries)
            else:
                self.note(**entries)

    def show_life(self) -> None:
        while not self._closed.wait(SIGN_OF_LIFE_SECONDS):
            with self._lock:
                if not self._closed.is_set():
                    self.note()


@contextmanager
def manifest(run_dir: Path, overrides: Sequence[str]) -> Iterator[ManifestProgress]:
    """Keeps ``manifest.json`` true: running while the body runs, then success, failed or interrupted.

    ``attempt`` counts how often the run was started before in this directory, ``earlier`` says how those ended. Raises
    OSError where the manifest cannot be written at the start: nothing else could then either.
    """
    earlier = _earlier(read_manifest(run_dir))
    progress = ManifestProgress(run_dir, _first_content(overrides, earlier))
    progress.write()
    place = run_dir.resolve()
    _OPEN[place] = progress
    threading.Thread(target=progress.show_life, name="manifest", daemon=True).start()
    try:
        yield progress
    except BaseException as error:
        _tell_log_file(error)
        progress.end(error)
        raise
    else:
        progress.end(None)
    finally:
        del _OPEN[place]


def mark(run_dir: Path, status: str) -> None:
    """Give a run another status: preempted, where it will be started again; timed_out or killed, where it will not.

    It may be running in this process, even under a signal's handler, or be gone. What ends it after that changes the
    status no more. A run that said itself how it ended keeps its word; one that has not begun has no manifest and gets
    none.
    """
    progress = _OPEN.get(run_dir.resolve())
    if progress is not None:
        progress.note(status=status)
        return
    content = read_manifest(run_dir)
    if content is not None and content["status"] in UNFINISHED:
        with suppress(OSError):
            content |= {"status": status, "updated": now()}
            write_atomically(run_dir / MANIFEST, json.dumps(content, indent=1))


def queue_again(run_dir: Path) -> None:
    """Say that a run which is over will be started again; how it ended is kept. Raises OSError."""
    before = read_manifest(run_dir)
    if before is not None:
        content = {"status": "queued", "error": None, "overrides": before.get("overrides", []), "updated": now()}
        content["earlier"] = _earlier(before)
        write_atomically(run_dir / MANIFEST, json.dumps(content, indent=1))


def read_manifest(run_dir: Path) -> dict[str, Any] | None:
    """The manifest's content; None where there is none that can be read."""
    try:
        content = json.loads((run_dir / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("status"), str) else None


def write_atomically(path: Path, text: str) -> None:
    """Write beside the final name, then rename: a reader never sees half a file, two writers never mix theirs."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _first_content(overrides: Sequence[str], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    process = Process.this()
    return {
        "status": "running",
        "error": None,
        "overrides": list(overrides),
        "pid": process.pid,
        "process": {"machine": process.machine, "started": process.started},
        "host": process.host,
        "slurm_job_id": process.slurm_job_id,
        "attempt": len(earlier),
        "earlier": earlier,
        "started": now(),
        "until": None,
        "stage": None,
        "stages_done": 0,
    }


def _earlier(before: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """How each attempt ended up to that of a manifest; one that still says running was killed without a word."""
    if before is None or before["status"] == "queued":
        return list(before["earlier"]) if before else []
    error = before.get("error") or {}
    outcome = {name: before.get(name) for name in ("status", "host", "slurm_job_id", "started")}
    outcome["ended"] = before.get("ended") or before.get("updated")
    outcome["error"] = {name: error[name] for name in ("type", "message") if name in error} or None
    if outcome["status"] == "running":
        outcome["status"] = "killed"
    return [*before.get("earlier", []), outcome]


def _tell_log_file(error: BaseException) -> None:
    """The terminal is told what ended the run by whoever started it; the run's log file would know nothing."""
    is_plain = isinstance(error, (MoepruneError, KeyboardInterrupt))
    record = log.makeRecord(
        log.name, logging.ERROR, __file__, 0, "ended by %s: %s", (type(error).__name__, error),
        None if is_plain else (type(error), error, error.__traceback__),
    )  # fmt: skip
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


def _failure(error: BaseException) -> dict[str, Any]:
    told = {"type": type(error).__name__, "message": str(error)}
    if not isinstance(error, (MoepruneError, KeyboardInterrupt)):
        told["traceback"] = "".join(traceback.format_exception(error))
    return {"status": "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", "error": told}
