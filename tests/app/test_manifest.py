"""The manifest: true while a run runs and after it ended, however it ended, and never half-written."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moeprune.app import manifest as module
from moeprune.app.manifest import MANIFEST, manifest, mark, queue_again, write_atomically
from moeprune.errors import BudgetError
from moeprune.pipeline.cache import Artifact
from moeprune.pipeline.process import Process


def read(run_dir: Path) -> dict:
    return json.loads((run_dir / MANIFEST).read_text())


def test_it_says_running_while_the_run_runs_and_success_after(tmp_path):
    with manifest(tmp_path, ["ratio=0.5"]):
        content = read(tmp_path)
        assert (content["status"], content["error"], content["pid"]) == ("running", None, os.getpid())
        assert content["overrides"] == ["ratio=0.5"]
        assert "ended" not in content
    content = read(tmp_path)
    assert (content["status"], content["error"]) == ("success", None)
    assert content["started"] <= content["ended"]


def test_an_error_that_the_user_can_act_on_is_told_without_a_traceback_and_passes_on(tmp_path):
    with pytest.raises(BudgetError, match="too much"), manifest(tmp_path, []):
        raise BudgetError("too much")
    content = read(tmp_path)
    assert content["status"] == "failed"
    assert content["error"] == {"type": "BudgetError", "message": "too much"}
    assert "ended" in content


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3), MemoryError()])
def test_any_other_error_is_told_with_its_traceback_and_passes_on(tmp_path, error):
    with pytest.raises(type(error)), manifest(tmp_path, []):
        raise error
    content = read(tmp_path)
    assert content["status"] == "failed"
    assert content["error"]["type"] == type(error).__name__
    assert "test_manifest.py" in content["error"]["traceback"]


def test_an_interruption_is_told_as_one(tmp_path):
    with pytest.raises(KeyboardInterrupt), manifest(tmp_path, []):
        raise KeyboardInterrupt
    assert read(tmp_path)["status"] == "interrupted"


def test_a_run_that_starts_again_in_the_same_directory_replaces_the_manifest(tmp_path):
    with pytest.raises(BudgetError), manifest(tmp_path, ["ratio=0.9"]):
        raise BudgetError("too much")
    with manifest(tmp_path, ["ratio=0.5"]):
        assert read(tmp_path)["status"] == "running"
    assert (read(tmp_path)["status"], read(tmp_path)["error"]) == ("success", None)


def test_a_write_that_breaks_off_leaves_the_old_text(tmp_path, monkeypatch):
    file = tmp_path / "metrics.json"
    write_atomically(file, "old")
    write_text = Path.write_text

    def break_off(path: Path, text: str) -> None:
        write_text(path, text[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", break_off)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "newer")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_atomically(file, "newer")
    assert file.read_text() == "newer"
    assert os.listdir(tmp_path) == ["metrics.json"]


def artifact(stage: str) -> Artifact:
    return Artifact(stage, "3f", Path(stage), cached=False, seconds=1.0, peak_memory_gib=1.0)


def test_it_says_which_process_where_runs_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    this = Process.this()
    with manifest(tmp_path, []):
        content = read(tmp_path)
        assert (content["host"], content["slurm_job_id"]) == (this.host, "12_3")
        assert content["process"] == {"machine": this.machine, "started": this.started}


def test_it_follows_the_run_from_stage_to_stage(tmp_path):
    with manifest(tmp_path, []) as progress:
        progress.runs_until("score")
        assert (read(tmp_path)["until"], read(tmp_path)["stage"]) == ("score", None)
        progress.waiting("statistics", "3f", "process 7 on n1")
        waiting = read(tmp_path)["stage"]
        assert (waiting["name"], waiting["state"], waiting["waiting_for"]) == (
            "statistics",
            "waiting",
            "process 7 on n1",
        )
        progress.computing("statistics", "3f", tmp_path)
        computing = read(tmp_path)["stage"]
        assert (computing["state"], computing["waiting_for"]) == ("computing", None)
        assert computing["since"] >= waiting["since"]
        progress.finished(artifact("statistics"))
        assert (read(tmp_path)["stage"], read(tmp_path)["stages_done"]) == (None, 1)
        progress.evaluated("dense", {})
    assert (read(tmp_path)["status"], read(tmp_path)["stages_done"]) == ("success", 1)


def test_a_run_that_waits_has_waited_since_the_first_time_that_it_said_so(tmp_path, monkeypatch):
    with manifest(tmp_path, []) as progress:
        monkeypatch.setattr(module, "now", lambda: "first")
        progress.waiting("statistics", "3f", "process 7 on n1")
        monkeypatch.setattr(module, "now", lambda: "later")
        progress.waiting("statistics", "3f", "process 8 on n2")
        assert read(tmp_path)["stage"]["since"] == "first"
        assert read(tmp_path)["stage"]["waiting_for"] == "process 8 on n2"
        progress.waiting("scores", "3f", "process 8 on n2")
        assert read(tmp_path)["stage"]["since"] == "later"


def test_what_was_at_work_when_a_run_failed_stays_told(tmp_path):
    with pytest.raises(ValueError, match="a bug"), manifest(tmp_path, []) as progress:
        progress.computing("plan", "3f", tmp_path)
        raise ValueError("a bug")
    assert read(tmp_path)["stage"]["name"] == "plan"


def test_each_attempt_keeps_how_those_before_ended(tmp_path):
    with pytest.raises(ValueError, match="a bug"), manifest(tmp_path, []):
        raise ValueError("a bug")
    with manifest(tmp_path, []) as progress:
        progress.write(status="running")  # killed here: nothing more is written
        killed = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(killed)
    with manifest(tmp_path, []):
        mark(tmp_path, "preempted")
    queue_again(tmp_path)
    assert (read(tmp_path)["status"], read(tmp_path)["error"]) == ("queued", None)
    queue_again(tmp_path)
    with manifest(tmp_path, []):
        pass
    content = read(tmp_path)
    assert (content["status"], content["attempt"]) == ("success", 3)
    assert [earlier["status"] for earlier in content["earlier"]] == ["failed", "killed", "preempted"]
    assert content["earlier"][0]["error"] == {"type": "ValueError", "message": "a bug"}
    assert all(earlier["started"] <= earlier["ended"] for earlier in content["earlier"])


def test_a_sign_of_life_is_written_again_and_again_until_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIGN_OF_LIFE_SECONDS", 0.01)
    times = iter(f"{count:03}" for count in range(1000))
    monkeypatch.setattr(module, "now", lambda: next(times))
    with manifest(tmp_path, []):
        first = read(tmp_path)["updated"]
        deadline = time.monotonic() + 20
        while read(tmp_path)["updated"] == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read(tmp_path)["updated"] > first
    ended = (tmp_path / MANIFEST).read_text()
    time.sleep(0.1)
    assert (tmp_path / MANIFEST).read_text() == ended
    assert not [thread for thread in threading.enumerate() if thread.name == "manifest" and thread.is_alive()]


def test_a_run_that_a_signal_marks_is_not_called_failed_by_what_takes_it_out_of_its_work(tmp_path):
    def preempt(*_: object) -> None:
        mark(tmp_path, "preempted")
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, preempt)
    try:
        with pytest.raises(SystemExit), manifest(tmp_path, []) as progress:
            for number in range(1000):
                if number == 500:
                    os.kill(os.getpid(), signal.SIGUSR2)
                progress.computing("statistics", str(number), tmp_path)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (read(tmp_path)["status"], read(tmp_path)["error"]) == ("preempted", None)
    assert os.listdir(tmp_path) == [MANIFEST]


def test_a_run_that_is_gone_is_marked_in_its_file(tmp_path):
    mark(tmp_path, "preempted")
    assert os.listdir(tmp_path) == []
    with manifest(tmp_path, ["ratio=0.5"]):
        killed = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(killed)
    for status in ("preempted", "timed_out"):
        mark(tmp_path, status)
        assert (read(tmp_path)["status"], read(tmp_path)["overrides"]) == (status, ["ratio=0.5"])


def test_a_run_that_said_how_it_ended_keeps_its_word(tmp_path):
    with manifest(tmp_path, []):
        pass
    mark(tmp_path, "killed")
    assert read(tmp_path)["status"] == "success"


def test_a_forked_child_writes_nothing_in_the_name_of_the_run(tmp_path):
    with manifest(tmp_path, []) as progress:
        before = (tmp_path / MANIFEST).read_text()
        progress._pid += 1  # as in a child
        progress.computing("plan", "3f", tmp_path)
        mark(tmp_path, "preempted")
        assert (tmp_path / MANIFEST).read_text() == before
        progress._pid -= 1


@pytest.fixture
def full_disk(monkeypatch):
    """Call it to fill the disk."""

    def fill() -> None:
        def no_space(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_text", no_space)

    return fill


def test_a_full_disk_stops_no_run_and_hides_no_error(tmp_path, full_disk, caplog):
    with pytest.raises(BudgetError, match="too much"), manifest(tmp_path, []) as progress:
        full_disk()
        progress.computing("plan", "3f", tmp_path)
        progress.finished(artifact("plan"))
        raise BudgetError("too much")
    assert len([line for line in caplog.messages if "cannot be written" in line]) == 1
    assert read(tmp_path)["status"] == "running"


def test_a_run_that_cannot_say_that_it_succeeded_did_not(tmp_path, full_disk):
    with pytest.raises(OSError, match="No space left"), manifest(tmp_path, []):
        full_disk()


def test_the_log_file_says_what_ended_the_run_and_the_terminal_hears_it_from_others(tmp_path, capsys):
    handler = logging.FileHandler(tmp_path / "moeprune.log")
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(BudgetError), manifest(tmp_path, []):
            raise BudgetError("too much")
        with pytest.raises(ValueError, match="a bug"), manifest(tmp_path, []):
            raise ValueError("a bug")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    plain, bug, *trace = (tmp_path / "moeprune.log").read_text().splitlines()
    assert (plain, bug) == ("ended by BudgetError: too much", "ended by ValueError: a bug")
    assert any("test_manifest.py" in line for line in trace)
    assert capsys.readouterr() == ("", "")


def test_a_process_that_is_killed_leaves_a_whole_manifest(tmp_path):
    script = f"""
from pathlib import Path
from moeprune.app.manifest import manifest
with manifest(Path({str(tmp_path)!r}), []) as progress:
    print("begun", flush=True)
    while True:
        progress.computing("plan", "3f", Path())
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(0.1)
    process.kill()
    process.communicate()
    assert read(tmp_path)["status"] == "running"
    with manifest(tmp_path, []):
        assert read(tmp_path)["earlier"][-1]["status"] == "killed"
