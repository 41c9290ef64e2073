"""What the cache holds, whether it is sound, and what of it may go. Safe beside runs that use and fill it."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moeprune.errors import CacheError
from moeprune.pipeline.disk import last_written, size
from moeprune.pipeline.lease import Owner, held_by_the_living, holder, lease_folder, take
from moeprune.pipeline.record import DamagedError, read_record, read_sound_record
from moeprune.pipeline.use import IN_USE_SECONDS, last_used
from moeprune.pipeline.workplace import DAMAGED, FENCED, PARTIAL, REMOVED, set_aside

STORED, COMPUTING, UNFINISHED, ASIDE = "stored", "computing", "unfinished", "set aside"
_KEY = re.compile(r"[0-9a-f]{32}")
_HIDDEN = re.compile(rf"({'|'.join(map(re.escape, (PARTIAL, FENCED, DAMAGED, REMOVED)))})([0-9a-f]{{32}})-.+")


@dataclass(frozen=True)
class Entry:
    """A folder of the cache. ``used`` is in seconds since the epoch by the file system's clock, ``record`` what
    ``stage.json`` says, empty where there is none."""

    stage: str
    key: str
    folder: Path
    state: str
    bytes: int
    used: float
    record: Mapping[str, Any]

    @property
    def final(self) -> Path:
        """Where the stage's result is or would be."""
        return self.folder.with_name(self.key)

    @property
    def made_by(self) -> dict[str, str]:
        """What made it, for people; empty where the record does not say."""
        told = self.record.get("made_by")
        return {name: str(value) for name, value in told.items()} if isinstance(told, dict) else {}

    @property
    def created(self) -> float:
        """Seconds since the epoch by the clock of the machine that made it; the last use where the record is silent."""
        try:
            return datetime.fromisoformat(self.record["created"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return self.used


def inventory(root: Path) -> list[Entry]:
    """Every stage under ``root``, stored or not, by stage and last use. Raises CacheError when there is no folder."""
    if not root.is_dir():
        raise CacheError(f"There is no cache in {root}.\nName its folder with --cache-dir.")
    entries = []
    for place, folders, _files in os.walk(root):
        stage = str(Path(place).relative_to(root))
        for name in sorted(folders):
            if _KEY.fullmatch(name) or name.startswith("."):
                folders.remove(name)
                entry = _entry(stage, Path(place, name))
                entries += [entry] if entry else []
    return sorted(entries, key=lambda entry: (entry.stage, entry.used))


def _entry(stage: str, folder: Path) -> Entry | None:
    hidden = _HIDDEN.fullmatch(folder.name)
    if hidden:
        kind, key = hidden.groups()
        alive = held_by_the_living(lease_folder(folder.with_name(key)))
        state = ASIDE if kind in (DAMAGED, REMOVED) else COMPUTING if alive and kind == PARTIAL else UNFINISHED
        return Entry(stage, key, folder, state, size(folder), last_written(folder), {})
    if not _KEY.fullmatch(folder.name):
        return None
    try:
        record = read_record(folder)
    except DamagedError:
        record = {}
    except FileNotFoundError:  # removed meanwhile
        return None
    return Entry(stage, folder.name, folder, STORED, size(folder), last_used(folder), record)


def why_damaged(entry: Entry) -> str | None:
    """Read every byte of a stored stage; set it aside when it is damaged, and say how. None for a sound one."""
    try:
        read_sound_record(entry.folder)
        return None
    except FileNotFoundError:
        return None
    except DamagedError:
        pass
    # Once more where nobody else can be replacing it.
    with _alone(entry) as alone:
        try:
            read_sound_record(entry.folder)
        except FileNotFoundError:
            return None
        except DamagedError as error:
            if not alone:
                return f"{error}; it is being computed again"
            set_aside(entry.folder)
            return str(error)
    return None


def to_prune(entries: Sequence[Entry], now: float, older_than: float, limit: float) -> list[Entry]:
    """What may go: whatever was set aside, what was not used for ``older_than`` seconds, and of the rest what was not
    used for longest, until no more than ``limit`` bytes are left. Nothing that is computed or was used just now."""
    removable = [entry for entry in entries if not _in_use(entry, now)]
    chosen = [entry for entry in removable if entry.state == ASIDE or now - entry.used > older_than]
    left = sum(entry.bytes for entry in entries) - sum(entry.bytes for entry in chosen)
    for entry in sorted(removable, key=lambda entry: entry.used):
        if left > limit and entry not in chosen:
            chosen.append(entry)
            left -= entry.bytes
    return chosen


def _in_use(entry: Entry, now: float) -> bool:
    return entry.state == COMPUTING or (entry.state == STORED and now - entry.used < IN_USE_SECONDS)


def remove(entry: Entry) -> bool:
    """Remove what nobody uses; False when somebody has come to use it since it was listed, or when some of its files
    may not be removed.

    A stage loses its name in one step, so that no run finds half of it.
    """
    with _alone(entry) as alone:
        if not alone or entry.used != _used_now(entry, entry.folder):
            return False
        aside = set_aside(entry.final) if entry.state == STORED else entry.folder
        if entry.state == STORED and last_used(aside) != entry.used and not entry.final.exists():
            aside.rename(entry.final)
            return False
    shutil.rmtree(aside, ignore_errors=True)
    return not aside.exists()


def _used_now(entry: Entry, folder: Path) -> float:
    return last_used(folder) if entry.state == STORED else last_written(folder)


@contextmanager
def _alone(entry: Entry) -> Iterator[bool]:
    """Within the context nobody else computes the stage; False when somebody does."""
    leases = lease_folder(entry.final)
    held = holder(leases)
    lease = None if held_by_the_living(leases) else take(leases, Owner.here("moeprune-cache"), over=held)
    try:
        yield lease is not None
    finally:
        if lease is not None:
            lease.give_back()
