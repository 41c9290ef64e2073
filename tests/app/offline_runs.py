"""Reads the file of an offline W&B run back.

The file is a log in LevelDB's format after a header of 7 bytes: blocks of 32 KiB with chunks of (checksum, length,
kind, data), where kind says whether a chunk is a whole record (1) or its first (2), a middle (3) or its last part (4).
W&B's own reader is inside its service; the records are parsed with its own protocol.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, CHUNK = 7, 32768, 7
WHOLE, LAST = 1, 4
PATIENCE_SECONDS = 20.0


@dataclass
class OfflineRun:
    """What a run file holds: the run's own record, its config, history rows, summary, metric definitions, artifacts."""

    path: Path
    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None


def offline_runs(run_dir: Path) -> list[OfflineRun]:
    """The offline runs in a run directory, oldest first. Waits for their ends, which W&B writes a moment late."""
    started = time.monotonic()
    while True:
        found = [read(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]
        if all(run.exit_code is not None for run in found) or time.monotonic() - started > PATIENCE_SECONDS:
            return found
        time.sleep(0.1)


def read(path: Path) -> OfflineRun:
    found = OfflineRun(path)
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "summary":
            found.summary |= _values(record.summary.update)
        elif kind == "metric":
            found.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found.artifacts[record.artifact.type] = record.artifact
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    at, parts = HEADER, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < CHUNK:  # too little for another chunk: zeros to the end of the block
            at += left
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + CHUNK : at + CHUNK + length]
        at += CHUNK + length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
