"""A run's manifest: what ran, where it stands, and why it failed. Written by the run itself, atomically."""

import json
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from moeprune.errors import MoepruneError

MANIFEST = "manifest.json"


@contextmanager
def manifest(run_dir: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Keeps ``manifest.json`` true: running while the body runs, then success, failed or interrupted."""
    content: dict[str, object] = {"status": "running", "error": None, "overrides": list(overrides), "pid": os.getpid()}
    content["started"] = _now()
    _write(run_dir, content)
    try:
        yield
    except BaseException as error:
        content["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        content["error"] = {"type": type(error).__name__, "message": str(error)}
        if not isinstance(error, (MoepruneError, KeyboardInterrupt)):
            content["error"]["traceback"] = traceback.format_exc()  # type: ignore[index]
        raise
    else:
        content["status"] = "success"
    finally:
        content["ended"] = _now()
        _write(run_dir, content)


def write_atomically(path: Path, text: str) -> None:
    """Write beside the final name, then rename: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def _write(run_dir: Path, content: dict[str, object]) -> None:
    write_atomically(run_dir / MANIFEST, json.dumps(content, indent=1))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
