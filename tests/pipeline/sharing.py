"""Processes that want the same stage of one cache, and what happened to them."""

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moeprune.pipeline.cache import StageCache
from moeprune.pipeline.identity import stage_key
from moeprune.pipeline.lease import Timing
from moeprune.pipeline.record import read_sound_record

KEY = stage_key("shared", 1, {}, [])
# Whoever is judged by his silence alone would hold up a test for as long.
PATIENT = Timing(beat=0.05, abandoned_after=60, first_look=0.01, longest_look=0.05)
IMPATIENT = Timing(beat=0.05, abandoned_after=0.6, first_look=0.01, longest_look=0.05)
# For those who must not be taken for dead on a busy machine, but would be if nobody looked at their counter.
WARY = replace(IMPATIENT, abandoned_after=1.2)
LIMIT_SECONDS = 60

FORK = multiprocessing.get_context("fork")
Compute = Callable[[Path], None]


def want(root: Path, compute: Compute, timing: Timing = PATIENT, resumable: bool = False, **settings):
    return StageCache(root, timing=timing, **settings).get("shared", 1, {}, [], compute, resumable)


def writes(text: str, seconds: float = 0.0) -> Compute:
    """A computation that takes a while, and is noted beside the cache's stages."""

    def compute(folder: Path) -> None:
        note(folder)
        (folder / "first.txt").write_text(text)
        time.sleep(seconds)
        (folder / "second.txt").write_text(text)

    return compute


def note(folder: Path) -> None:
    """That a computation has begun; a file of its own, whatever the cache's root is."""
    notes = folder.parents[3] / "notes"
    notes.mkdir(exist_ok=True)
    (notes / f"{time.monotonic_ns()}-{os.getpid()}").touch()


def computations(root: Path) -> int:
    return len(list((root.parent / "notes").glob("*")))


def in_process(root: Path, compute: Compute, timing: Timing = PATIENT, resumable: bool = False, before=None):
    """A running process that wants the stage; ``before`` is called in it first. Its result and log go to files."""

    def work() -> None:
        logging.basicConfig(filename=root.parent / f"log-{os.getpid()}", level=logging.INFO, force=True)
        if before is not None:
            before()
        artifact = want(root, compute, timing, resumable)
        content = {file.name: file.read_text() for file in artifact.folder.glob("*.txt")}
        outcome = {"cached": artifact.cached, "content": content}
        (root.parent / f"outcome-{os.getpid()}").write_text(json.dumps(outcome))

    process = FORK.Process(target=work, daemon=True)
    process.start()
    return process


def outcome_of(process, root: Path) -> dict:
    """``cached`` and ``content`` of a process that ends well."""
    process.join(LIMIT_SECONDS)
    assert process.exitcode == 0
    return json.loads((root.parent / f"outcome-{process.pid}").read_text())


def log_of(process, root: Path) -> str:
    log = root.parent / f"log-{process.pid}"
    return log.read_text() if log.exists() else ""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stop_oneself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def is_stopped(process) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def assert_one_sound_result(root: Path, text: str | None = None) -> None:
    """The stage is there, all of it from one computation, and nothing else is."""
    folder = root / "shared" / KEY
    read_sound_record(folder)
    texts = {file.read_text() for file in folder.glob("*.txt")}
    assert len(texts) == 1
    assert text is None or texts == {text}
    assert [path.name for path in root.rglob(".*")] == []
