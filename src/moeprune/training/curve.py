"""The loss curve of a training run, one JSON line per point."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class LossCurve:
    """Appends lines that have a ``step``; a resumed run takes back those after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def take_back(self, step: int) -> None:
        """Keep the lines up to ``step``; also drops one that was only written in part."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if _step(line) <= step]
        partial = self._path.with_suffix(".partial")
        with partial.open("w") as curve:
            _write(curve, "".join(f"{line}\n" for line in kept))
        partial.replace(self._path)

    def append(self, point: Mapping[str, Any]) -> None:
        with self._path.open("a") as curve:
            _write(curve, json.dumps(point) + "\n")


def _write(curve: TextIO, lines: str) -> None:
    """What a checkpoint stands for is on the disk before it, also where the host crashes."""
    curve.write(lines)
    curve.flush()
    os.fsync(curve.fileno())


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
