"""What lies in a finished stage's folder: the files that it wrote, and ``stage.json``, which says what made them.

CACHE/statistics/3f2a.../statistics.safetensors     what the stage wrote
CACHE/statistics/3f2a.../stage.json                 what made it: settings, inputs, cost, and a digest of each file
"""

import hashlib
import json
from pathlib import Path
from typing import Any

RECORD = "stage.json"
WALK = "walk"  # the folder, inside a resumable stage's, of what it needs to go on and nobody else wants
_HASH_CHUNK = 2**20


class DamagedError(Exception):
    """A stage's folder does not hold what was written there; the message says why."""


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """Write ``stage.json`` with ``content`` and a digest of each file of the result."""
    (folder / RECORD).write_text(json.dumps({**content, "files": digests(folder)}, indent=1))


def read_record(folder: Path) -> dict[str, Any]:
    """``stage.json`` as it is. Raises DamagedError where it is none, FileNotFoundError where there is no folder."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except FileNotFoundError as error:
        if not folder.exists():
            raise
        raise DamagedError(repr(error)) from error
    except (OSError, ValueError) as error:
        raise DamagedError(repr(error)) from error
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise DamagedError(f"its {RECORD} lists no files")
    return record


def read_sound_record(folder: Path) -> dict[str, Any]:
    """``stage.json`` when every file has the digest that it had when it was written.

    Raises DamagedError where not, FileNotFoundError where there is no folder.
    """
    record = read_record(folder)
    try:
        found = digests(folder)
    except OSError as error:
        raise DamagedError(repr(error)) from error
    if record["files"] != found:
        raise DamagedError("its files do not match their digests")
    return record


def digests(folder: Path) -> dict[str, str]:
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
