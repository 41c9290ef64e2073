"""The loss curve of a training run, one JSON line per point."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class LossCurve:
    """Appends lines that have a ``step``; a resumed run takes back those after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take_back(self, step: int) -> None:
        """Keep the lines up to ``step``; also drops one that was only written in part."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._path)

    def append(self, point: Mapping[str, Any]) -> None:
        with self._path.open("a") as curve:
            curve.write(json.dumps(point) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
