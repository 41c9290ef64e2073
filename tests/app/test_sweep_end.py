"""How a sweep begins and ends in its driver: record, table, what failed, exit code."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from made_sweeps import HandMadeSweep, dead_process
from omegaconf import OmegaConf

from moeprune.app import sweep as module
from moeprune.app.sweep import SweepReport
from moeprune.app.sweep_record import SweepJob, SweepRecord
from moeprune.pipeline.process import Process

FAILED = {"status": "failed", "error": {"type": "ValueError", "message": "a bug"}}


def config_of(sweep_dir: Path, sweeper: str = "basic"):
    choices = {"hydra/launcher": "local", "hydra/sweeper": sweeper}
    return OmegaConf.create({"hydra": {"sweep": {"dir": str(sweep_dir)}, "runtime": {"choices": choices}}})


@pytest.fixture
def at_exit(monkeypatch) -> list:
    """What would be called when the process ends."""
    calls: list = []
    monkeypatch.setattr(module.atexit, "register", lambda *call: calls.append(call))
    return calls


def test_a_sweep_is_recorded_when_it_starts(tmp_path, at_exit, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moeprune", "-m", "ratio=0.25,0.5"])
    SweepReport().on_multirun_start(config_of(tmp_path / "sweep"))
    record = SweepRecord.read(tmp_path / "sweep")
    assert (record.command, record.launcher, record.jobs) == (("-m", "ratio=0.25,0.5"), "local", ())
    assert record.driver == Process.this()
    assert len(at_exit) == 1


@pytest.mark.usefixtures("at_exit")
def test_a_rerun_keeps_the_record_of_its_sweep(tmp_path):
    sweep = HandMadeSweep(tmp_path / "sweep", dead_process(), ("-m", "ratio=0.25,0.5"))
    SweepReport().on_multirun_start(config_of(sweep.folder, sweeper="rerun"))
    assert SweepRecord.read(sweep.folder) == sweep.record


@pytest.fixture
def other_process():
    """A process that lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield replace(Process.this(), pid=process.pid, started=None)
        process.communicate()


def test_a_second_sweep_into_a_directory_that_a_living_driver_uses_is_refused(tmp_path, at_exit, capsys, other_process):
    sweep = HandMadeSweep(tmp_path / "sweep", other_process)
    with pytest.raises(SystemExit) as stop:
        SweepReport().on_multirun_start(config_of(sweep.folder))
    assert stop.value.code == 2
    assert f"{sweep.folder} is in use: process {other_process.pid}" in capsys.readouterr().err
    assert SweepRecord.read(sweep.folder) == sweep.record
    assert at_exit == []


@pytest.mark.parametrize(("sweeper", "is_refused"), [("basic", True), ("optuna", False)])
def test_a_second_sweep_over_jobs_that_go_on_without_their_driver_is_refused(tmp_path, at_exit, sweeper, is_refused):
    """Not of a search: it numbers its trials on."""
    sweep = HandMadeSweep(tmp_path / "sweep", dead_process())
    sweep.add({"status": "running"}, by=Process.this())
    with pytest.raises(SystemExit) if is_refused else nullcontext():
        SweepReport().on_multirun_start(config_of(sweep.folder, sweeper))
    assert (SweepRecord.read(sweep.folder) == sweep.record) == is_refused
    assert bool(at_exit) != is_refused


def test_a_directory_whose_sweep_is_over_may_be_used_again(tmp_path, at_exit):
    sweep = HandMadeSweep(tmp_path / "sweep", dead_process())
    sweep.add(FAILED)
    SweepReport().on_multirun_start(config_of(sweep.folder))
    assert SweepRecord.read(sweep.folder).driver == Process.this()
    assert len(at_exit) == 1


@pytest.mark.parametrize("manifest", [FAILED, {"status": "timed_out"}, None])
def test_the_driver_of_a_sweep_in_which_a_job_did_not_succeed_exits_with_1(tmp_path, manifest):
    sweep = HandMadeSweep(tmp_path / "sweep", Process.this())
    sweep.add({"status": "success"})
    SweepReport().on_multirun_end(config_of(sweep.folder))
    sweep.add(manifest)
    with pytest.raises(SystemExit) as stop:
        SweepReport().on_multirun_end(config_of(sweep.folder))
    assert stop.value.code == 1


def test_the_end_says_what_failed_and_how_to_run_it_again(tmp_path, capsys):
    sweep = HandMadeSweep(tmp_path / "sweep", Process.this())
    sweep.add(FAILED)
    sweep.add({"status": "running"}, by=dead_process())
    module._report(sweep.folder)
    out = capsys.readouterr().out
    assert "Sweep of 2 runs" in out
    assert out.splitlines()[-4:] == [
        "2 of 2 jobs did not succeed:",
        "  job 0 (ratio=0.0): failed, ValueError: a bug",
        "  job 1 (ratio=0.1): killed, ended without a word",
        f"Run again what did not succeed:  moeprune-rerun {sweep.folder}",
    ]
    assert json.loads((sweep.folder / "1" / "manifest.json").read_text())["status"] == "killed"


def test_a_driver_that_ends_before_its_jobs_says_how_to_see_them(tmp_path, capsys):
    sweep = HandMadeSweep(tmp_path / "sweep", dead_process())
    sweep.add({"status": "running"}, by=Process.this())
    module._report(sweep.folder)
    told = f"The sweep goes on without this process: 1 running.\nSee it with:  moeprune-status {sweep.folder}\n"
    assert capsys.readouterr().out.endswith(told)


def test_a_report_that_fails_hides_no_failure(tmp_path, capsys):
    sweep = HandMadeSweep(tmp_path / "sweep", Process.this())
    sweep.add(FAILED)
    (sweep.folder / "0" / "metrics.json").write_text("{")
    with pytest.raises(Exception, match="metrics"):
        module._report(sweep.folder)
    assert "1 of 1 job did not succeed" in capsys.readouterr().out


def test_a_job_that_never_wrote_anything_is_told_too(tmp_path, capsys):
    sweep = HandMadeSweep(tmp_path / "sweep", Process.this())
    sweep.record.with_jobs([SweepJob(0, "0", ("ratio=0.5",))]).write(sweep.folder)
    module._report(sweep.folder)
    assert "job 0 (ratio=0.5): never started, the sweep's driver ended before its turn" in capsys.readouterr().out


def test_what_every_job_imports_is_light():
    script = (
        "import sys, moeprune.app.sweep; print([n for n in ('torch', 'matplotlib', 'submitit') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "[]\n"
