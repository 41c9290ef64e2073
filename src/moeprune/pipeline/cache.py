"""A content-addressed cache of stage results: written atomically, checked when read, shared by all runs.

    CACHE/statistics/3f2a.../statistics.safetensors     what the stage wrote
    CACHE/statistics/3f2a.../stage.json                 what made it: settings, inputs, cost, and a digest of each file

A folder appears under its final name only when it is complete; a damaged one is set aside and computed again. What a
resumable stage had written when it was interrupted stays, and the next run that wants the stage goes on from there.
What it needs for that alone lies in a folder ``walk`` of its own, which is no part of the result.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from moeprune.errors import CacheError
from moeprune.pipeline.identity import describe, stage_key
from moeprune.pipeline.measure import measured

log = logging.getLogger(__name__)

RECORD = "stage.json"
_HASH_CHUNK = 2**20
WALK = "walk"  # the folder, inside a resumable stage's, of what it needs to go on and nobody else wants
# A process on another machine cannot be asked whether it lives: one at work touches its folder every minute, however
# long it computes without writing, and after ten silent minutes it is taken for dead.
SIGN_OF_LIFE_SECONDS = 60.0
ABANDONED_AFTER_SECONDS = 10 * 60


@dataclass(frozen=True)
class Artifact:
    """A finished stage: its folder, its key, and what computing it cost (seconds, peak memory in GiB)."""

    stage: str
    key: str
    folder: Path
    cached: bool
    seconds: float
    peak_memory_gib: float


class StageCache:
    """Finished stages under ``root``, by stage name and key."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(
        self,
        stage: str,
        version: int,
        settings: object,
        inputs: Sequence[str],
        compute: Callable[[Path], None],
        resumable: bool = False,
    ) -> Artifact:
        """The stage's result, from disk when it is there and sound, else made by ``compute(folder)``.

        The folder is empty; that of a ``resumable`` stage holds what an interrupted run left in it.

        Raises CacheError when the folder cannot be written or the disk is full; nothing is left behind then, but for
        what a resumable stage can use.
        """
        key = stage_key(stage, version, settings, inputs)
        folder = self.root / stage / key
        stored = self._stored(stage, key, folder)
        if stored is not None:
            log.info("%s %s: reused", stage, key[:12])
            return stored
        log.info("%s %s: computing", stage, key[:12])
        with self._partial_folder(folder, resumable) as partial:
            with measured() as cost:
                compute(partial)
            content = {
                "stage": stage,
                "key": key,
                "version": version,
                "settings": describe(settings),
                "inputs": list(inputs),
                "seconds": cost.seconds,
                "peak_memory_gib": cost.peak_memory_gib,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "files": _digests(partial),
            }
            (partial / RECORD).write_text(json.dumps(content, indent=1))
        log.info("%s %s: %.1f s, peak %.2f GiB", stage, key[:12], cost.seconds, cost.peak_memory_gib)
        return Artifact(stage, key, folder, False, cost.seconds, cost.peak_memory_gib)

    def _stored(self, stage: str, key: str, folder: Path) -> Artifact | None:
        """The finished stage in ``folder``; None where there is none, or where it was damaged and is now gone."""
        if not folder.exists():
            return None
        try:
            record = json.loads((folder / RECORD).read_text())
            if record["files"] == _digests(folder):
                return Artifact(stage, key, folder, True, record["seconds"], record["peak_memory_gib"])
            reason = "its files do not match their digests"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = repr(error)
        log.warning("cached stage %s is damaged (%s): computing it again", folder, reason)
        with _disk_errors(folder):
            damaged = folder.with_name(f".damaged-{folder.name}-{uuid.uuid4().hex[:8]}")
            folder.rename(damaged)
            shutil.rmtree(damaged)
        return None

    @contextmanager
    def _partial_folder(self, folder: Path, resumable: bool) -> Iterator[Path]:
        """A folder to write into, renamed to its final name on success; removed on any failure unless resumable."""
        owner = f"{socket.gethostname()}-{os.getpid()}"
        partial = folder.with_name(f".partial-{folder.name}-{owner}")
        with _disk_errors(folder):
            for abandoned in _abandoned(folder):
                if resumable and not partial.exists():
                    with suppress(OSError):  # another run was faster
                        abandoned.rename(partial)
                        log.info("going on from what %s left", abandoned.name)
                else:
                    shutil.rmtree(abandoned, ignore_errors=True)
            if not resumable:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
            try:
                with _signs_of_life(partial):
                    yield partial
                shutil.rmtree(partial / WALK, ignore_errors=True)  # not before: without it nothing could be resumed
                _publish(partial, folder)
            except BaseException:
                if not resumable:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            shutil.rmtree(partial, ignore_errors=True)  # where another run published first


@contextmanager
def _signs_of_life(partial: Path) -> Iterator[None]:
    """Within the context the folder looks freshly written, so that no other machine takes it for abandoned."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(SIGN_OF_LIFE_SECONDS):
            with suppress(OSError):  # the computation itself will say what is wrong with the folder
                os.utime(partial)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        # Another run finished the same stage first; its result is as good as ours.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _abandoned(folder: Path) -> list[Path]:
    """What processes that are no more left of the same stage; what was written to last comes first."""
    prefix = f".partial-{folder.name}-"
    own = f"{prefix}{socket.gethostname()}-"
    left: list[tuple[float, Path]] = []
    for partial in folder.parent.glob(f"{prefix}*"):
        process = partial.name.removeprefix(own)
        last = _last_written(partial)
        # Anything but a number belongs to another machine, perhaps one whose name begins like ours.
        if partial.name.startswith(own) and process.isdigit():
            abandoned = not psutil.pid_exists(int(process))
        else:
            abandoned = time.time() - last > ABANDONED_AFTER_SECONDS
        if abandoned:
            left.append((last, partial))
    return [partial for _, partial in sorted(left, reverse=True)]


def _last_written(folder: Path) -> float:
    """Seconds since the epoch; 0 for a folder that just vanished."""
    times = [0.0]
    for entry in [folder, *folder.rglob("*")]:
        with suppress(OSError):  # renamed or removed by its owner meanwhile
            times.append(entry.stat().st_mtime)
    return max(times)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = str(error)
        # safetensors reports a full disk as an error of its own.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in message
        if full:
            raise CacheError(
                f"No disk space left while writing {folder.parent}.\nFree some space or choose another place with "
                "cache_dir=/path; the next run goes on from the finished stages."
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError)) or getattr(error, "errno", None) == errno.EROFS:
            raise CacheError(
                f"The cache {folder.parent} cannot be written: {message}.\nChoose another place with cache_dir=/path."
            ) from error
        raise


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that is part of the result."""
    state = folder / WALK
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and file.name != RECORD and state not in file.parents
    )
    return {str(file.relative_to(folder)): _digest(file) for file in files}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
