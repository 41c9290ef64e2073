"""The git state of the code that runs."""

import json
import subprocess
from pathlib import Path

import moeprune

# Beside the package in the snapshot of a sweep's code: where it was copied from, and the git state there.
COPIED_FROM = "copied_from.json"


def git_state() -> dict[str, object] | None:
    """Commit of the source tree and whether it had changes; that of the origin for a copy; None for an installed
    package."""
    package = Path(moeprune.__file__).parent
    note = package.parent / COPIED_FROM
    if note.is_file():
        state: dict[str, object] | None = json.loads(note.read_text())["git"]
        return state

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
