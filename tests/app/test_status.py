"""What ``moeprune-status`` shows, in terminals of any width and in files, once and while it watches."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_sweeps import HandMadeSweep, ago, dead_process, process_elsewhere
from rich.console import Console

from moeprune.app import status
from moeprune.app.status import run_status
from moeprune.app.sweep_state import read_sweep
from moeprune.app.sweep_text import duration, failure_lines, ranges
from moeprune.errors import InputError
from moeprune.pipeline.process import Process

STATUS = Path(sys.executable).with_name("moeprune-status")
DEAD = dead_process()
STAGE = {"name": "statistics", "key": "3f", "state": "computing", "since": ago(minutes=5), "waiting_for": None}
LONG_MESSAGE = "ratio=0.9 removes 7 of 8 experts and leaves 1, but every token is sent to 2.\nUse less."


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> HandMadeSweep:
    """A sweep of half a day ago, below ``runs``, whose driver died."""
    monkeypatch.chdir(tmp_path)
    return HandMadeSweep(Path("runs/2026-11-22/08-00-00-sweep"), DEAD)


@pytest.fixture
def shown(capsys):
    """``shown("--watch")``: the lines that the command prints."""

    def run(*words: str) -> list[str]:
        assert run_status(words) == 0
        return capsys.readouterr().out.splitlines()

    return run


def row_of(lines: list[str], number: int) -> str:
    table = lines[next(index for index, line in enumerate(lines) if line.startswith("──")) :]
    return next(line for line in table if line.split()[:1] == [str(number)])


def as_in_a_terminal(sweep: HandMadeSweep, width: int) -> list[str]:
    console = Console(width=width, record=True, file=sys.stderr)
    status._print(read_sweep(sweep.folder), console)
    return console.export_text().splitlines()


def test_every_job_has_a_row_with_what_it_was_asked_and_where_it_stands(sweep, shown):
    sweep.add({"status": "success", "started": ago(hours=2), "ended": ago(hours=1)})
    sweep.add({"status": "running", "stage": STAGE, "stages_done": 1, "attempt": 2})
    sweep.add({"status": "running", "stage": {**STAGE, "state": "waiting", "waiting_for": "process 1 on n1"}})
    sweep.add({"status": "running", "updated": ago(minutes=17)}, by=process_elsewhere())
    sweep.add(None)
    lines = shown()
    assert lines[0] == f"Sweep {sweep.folder}"
    assert "12 h 00 min ago" in lines[1]
    assert lines[2].endswith("is gone.")
    assert lines[3] == "1 never started, 1 silent, 1 running, 1 waiting, 1 success"
    assert lines[4] == "All jobs: seed=0"
    assert row_of(lines, 0).split()[1:6] == ["ratio=0.0", "success", "1", "h", "00"]
    assert "running (start 3)" in row_of(lines, 1)
    assert "statistics, 1 done" in row_of(lines, 1)
    assert "2 h 00 min" in row_of(lines, 1)
    assert "waiting for statistics by process 1 on n1" in row_of(lines, 2)
    assert "silent for 17 min" in row_of(lines, 3)
    assert "n7" in row_of(lines, 3)
    assert "never started: the sweep's driver ended" in row_of(lines, 4)
    assert any(line.startswith("silent: its machine cannot be asked from here") for line in lines)


def test_failures_are_told_with_reason_log_and_the_command_that_runs_them_again(sweep, shown):
    sweep.add({"status": "success"})
    sweep.add({"status": "failed", "error": {"type": "BudgetError", "message": LONG_MESSAGE}})
    (sweep.folder / "1" / "moeprune.log").write_text("")
    for _ in range(3):
        sweep.add({"status": "failed", "error": {"type": "ValueError", "message": "a bug"}})
    assert shown()[-5 - LONG_MESSAGE.count("\n") :] == [
        "4 of 5 jobs did not succeed:",
        f"  job 1 (ratio=0.1): failed, BudgetError: {LONG_MESSAGE.splitlines()[0]}",
        *(f"      {line}" for line in LONG_MESSAGE.splitlines()[1:]),
        f"      log: {sweep.folder}/1/moeprune.log",
        "  jobs 2-4 (3 jobs): failed, ValueError: a bug",
        f"Run again what did not succeed:  moeprune-rerun {sweep.folder}",
    ]


def test_a_job_that_was_killed_is_read_up_where_its_process_printed(sweep):
    sweep.add({"status": "running"}, by=DEAD)
    (sweep.folder / "0" / "moeprune.log").write_text("")
    assert f"      log: {sweep.folder}/0/moeprune.log" in failure_lines(read_sweep(sweep.folder))
    (sweep.folder / "0" / "job.out").write_text("Killed")
    assert f"      log: {sweep.folder}/0/job.out" in failure_lines(read_sweep(sweep.folder))


def test_the_command_is_quoted_for_the_shell(tmp_path):
    sweep = HandMadeSweep(tmp_path / "my sweeps" / "it's one", DEAD)
    sweep.add(None)
    (command,) = [line for line in failure_lines(read_sweep(sweep.folder)) if "moeprune-rerun" in line]
    words = command.removeprefix("Run again what did not succeed:  ")
    heard = subprocess.run(["sh", "-c", f"printf '%s|' {words}"], capture_output=True, text=True, check=True)
    assert heard.stdout == f"moeprune-rerun|{sweep.folder}|"


def test_of_a_large_sweep_the_jobs_that_stand_still_share_rows(sweep, shown):
    for number in range(500):
        stands = {"status": "running", "stage": STAGE} if number % 100 == 50 else {"status": "success"}
        failed = {"status": "failed", "error": {"type": "ValueError", "message": "a bug"}}
        sweep.add(failed if number % 10 == 9 else stands, overrides=(f"ratio=0.{number:03}",), save=number == 499)
    lines = shown()
    assert lines[3] == "50 failed, 5 running, 445 success"
    assert len(lines) < 100
    assert [line.split()[:2] for line in lines if "ratio=" in line] == [
        [str(n), f"ratio=0.{n:03}"] for n in range(50, 500, 100)
    ]
    assert "  jobs 9, 19, 29, 39, 49, 59, 69, 79, 89, ..., 499 (50 jobs): failed, ValueError: a bug" in lines


@pytest.mark.parametrize("width", [30, 50, 80, 120, 200])
def test_no_row_is_wider_than_the_terminal_and_nothing_is_lost(sweep, width):
    sweep.add({"status": "failed", "error": {"type": "BudgetError", "message": LONG_MESSAGE}})
    sweep.add(
        {"status": "running", "stage": STAGE}, overrides=("seed=0", "model.path=/a/very/long/path/to/a/checkpoint")
    )
    lines = as_in_a_terminal(sweep, width)
    end_of_table = next(number for number, line in enumerate(lines) if "did not succeed" in line)
    assert max(len(line) for line in lines[:end_of_table]) <= width
    assert "model.path=/a/very/long/path/to/a/checkpoint".startswith(row_of(lines, 1).split()[1])
    assert lines[-1] == f"Run again what did not succeed:  moeprune-rerun {sweep.folder}"  # to be copied: never broken


def test_a_sweep_is_named_or_the_newest_one_is_shown(sweep, shown, tmp_path):
    sweep.add({"status": "success"})
    other = HandMadeSweep(tmp_path / "other", DEAD)
    other.add({"status": "success"})
    assert shown()[0] == f"Sweep {sweep.folder}"
    assert shown(str(other.folder))[0] == f"Sweep {other.folder}"
    with pytest.raises(InputError, match="not the directory of a sweep"):
        run_status([str(tmp_path)])


def test_watching_ends_with_the_sweep_and_tells_a_file_each_change(sweep, shown, monkeypatch):
    sweep.add({"status": "running"})
    sweep.add(None)
    manifest = sweep.folder / "0" / "manifest.json"
    looks = []

    def end_it_at_the_third_look(_seconds: float) -> None:
        looks.append(_seconds)
        if len(looks) == 3:
            manifest.write_text(manifest.read_text().replace('"running"', '"success"'))

    monkeypatch.setattr(status.time, "sleep", end_it_at_the_third_look)
    lines = shown("--watch")
    assert len(looks) == 3
    assert lines[0].endswith(" 1 never started, 1 running")
    assert lines[1] == f"Sweep {sweep.folder}"
    assert "1 never started, 1 success" in lines


def test_watching_a_terminal_shows_the_table_in_place(sweep, monkeypatch):
    sweep.add({"status": "running"}, by=Process.this())
    console = Console(force_terminal=True, width=80, file=open(sweep.folder / "screen", "w"))  # noqa: SIM115
    manifest = sweep.folder / "0" / "manifest.json"
    end = manifest.read_text().replace('"running"', '"success"')
    monkeypatch.setattr(status.time, "sleep", lambda _seconds: manifest.write_text(end))
    status._watched(sweep.folder, console)
    console.file.close()
    screen = (sweep.folder / "screen").read_text()
    assert "running" in screen
    assert screen.endswith("\x1b[2K")  # what was shown in place is gone: the whole table follows


def test_ctrl_c_ends_the_watching_and_says_that_the_sweep_goes_on(sweep):
    sweep.add({"status": "running"}, by=Process.this())
    watching = subprocess.Popen([STATUS, "--watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "1 running" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=30)
    assert watching.returncode == 0
    assert out == f"The sweep goes on. See it with:  moeprune-status {sweep.folder}\n"
    assert err == ""


def test_no_torch_is_loaded(sweep):
    sweep.add({"status": "success"})
    script = "import sys; from moeprune.app.status import run_status; run_status([]); print('torch' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert time.perf_counter() - began < 10  # measured 0.4 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599, "59 min"),
        (7500, "2 h 05 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_ranges():
    assert ranges([]) == ""
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(range(0, 20, 2), most=3) == "0, 2, ..., 18"
    assert ranges(range(0, 6, 2), most=3) == "0, 2, 4"
