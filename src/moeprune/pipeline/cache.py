"""A content-addressed cache of stage results: written atomically, checked when read, shared by all runs.

    CACHE/statistics/3f2a.../statistics.safetensors     what the stage wrote
    CACHE/statistics/3f2a.../stage.json                 what made it: settings, inputs, cost, and a digest of each file

A folder appears under its final name only when it is complete; a damaged one is set aside and computed again.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    ) -> Artifact:
        """The stage's result, from disk when it is there and sound, else made by ``compute(empty folder)``.

        Raises CacheError when the folder cannot be written or the disk is full; nothing is left behind then.
        """
        key = stage_key(stage, version, settings, inputs)
        folder = self.root / stage / key
        stored = self._stored(stage, key, folder)
        if stored is not None:
            log.info("%s %s: reused", stage, key[:12])
            return stored
        log.info("%s %s: computing", stage, key[:12])
        with self._partial_folder(folder) as partial:
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
    def _partial_folder(self, folder: Path) -> Iterator[Path]:
        """A folder to write into, renamed to its final name on success and removed on any failure."""
        owner = f"{socket.gethostname()}-{os.getpid()}"
        partial = folder.with_name(f".partial-{folder.name}-{owner}")
        with _disk_errors(folder):
            _remove_abandoned(folder)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                yield partial
                _publish(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        # Another run finished the same stage first; its result is as good as ours.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine left of the same stage."""
    prefix = f".partial-{folder.name}-{socket.gethostname()}-"
    for left in folder.parent.glob(f"{prefix}*"):
        process = left.name.removeprefix(prefix)
        # Anything but a number belongs to a machine whose name begins like ours.
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


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
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RECORD)
    return {str(file.relative_to(folder)): _digest(file) for file in files}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
