"""Running again what did not succeed: which jobs, with which command, and that it works."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from made_sweeps import HandMadeSweep, ago, dead_process, process_elsewhere
from omegaconf import OmegaConf

from moeprune.app.main import rerun, status
from moeprune.app.rerun import begin_again, launch_overrides, moeprune_command, quoted
from moeprune.app.sweep_record import SweepRecord
from moeprune.app.sweep_state import State, read_sweep
from moeprune.errors import InputError
from moeprune.pipeline.process import Process

DEAD = dead_process()
FAILED = {"status": "failed", "error": {"type": "ValueError", "message": "a bug"}, "started": ago(hours=1)}
COMMAND = ("--multirun", "scorer=reap,man", "hydra/launcher=slurm", "hydra.launcher.mem_gb=8", "seed=0")


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> HandMadeSweep:
    """A sweep started in ``tmp_path`` whose driver died; jobs: 0 succeeded, 1 failed, 2 never started."""
    monkeypatch.chdir(tmp_path)
    sweep = HandMadeSweep(tmp_path / "my sweep", DEAD, COMMAND)
    sweep.add({"status": "success"})
    sweep.add(FAILED)
    sweep.add(None)
    return sweep


@pytest.fixture
def command(here, monkeypatch, capfd):
    """``command(rerun, "DIR")``: exit code and output of another command, in the folder of ``here``."""

    def run(entry, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"moeprune-{entry.__name__}", *words])
        code = 0
        try:
            entry()
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out + err

    return run


def test_the_command_is_that_of_the_sweep_with_the_jobs_that_did_not_succeed(sweep, capsys):
    assert moeprune_command([str(sweep.folder)]) == [
        "--multirun", "scorer=reap,man", "hydra/launcher=slurm", "hydra.launcher.mem_gb=8", "seed=0",
        "hydra/sweeper=rerun", "hydra.sweep.dir='my sweep'", "hydra.sweeper.jobs=[1,2]", "hydra.sweeper.also=[]",
    ]  # fmt: skip
    assert capsys.readouterr().out == "Run again: job 1-2.\n"


def test_what_the_sweep_said_to_its_own_sweeper_and_of_its_folder_is_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (
        "-m",
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=tpe",
        "hydra.sweeper.n_trials=3",
        "hydra.mode=MULTIRUN",
    )
    own = ("--config-dir", "my_conf", "+experiment=demo", "hydra.job.name=x")
    sweep = HandMadeSweep(tmp_path / "sweep", DEAD, (*words, *own, "hydra.sweep.dir=sweep", "~hydra.sweep.subdir"))
    sweep.add(FAILED)
    assert moeprune_command([str(sweep.folder)])[: len(own) + 2] == ["--multirun", *own, "hydra/sweeper=rerun"]


def test_jobs_that_run_or_may_run_are_left_alone(sweep, capsys):
    sweep.add({"status": "running"}, by=Process.this())
    sweep.add({"status": "running", "updated": ago(minutes=17)}, by=process_elsewhere())
    assert "hydra.sweeper.jobs=[1,2]" in moeprune_command([str(sweep.folder)])
    told = capsys.readouterr().out
    assert "Left alone: running: job 3.\nLeft alone: silent: job 4.\n" in told
    assert "add --silent-too" in told
    assert "hydra.sweeper.jobs=[1,2,4]" in moeprune_command([str(sweep.folder), "--silent-too"])


def test_nothing_to_do_is_said(tmp_path, capsys):
    sweep = HandMadeSweep(tmp_path / "sweep", DEAD)
    sweep.add({"status": "success"})
    assert moeprune_command([str(sweep.folder)]) is None
    assert capsys.readouterr().out == "Nothing to run again: all 1 jobs succeeded.\n"
    sweep.add({"status": "running"}, by=Process.this())
    assert moeprune_command([str(sweep.folder)]) is None
    assert capsys.readouterr().out == "Left alone: running: job 1.\nNothing to run again now.\n"


def test_settings_given_anew_replace_those_of_jobs_and_of_the_launcher(sweep):
    words = moeprune_command([str(sweep.folder), "--also", "ratio=0.25", "hydra.launcher.mem_gb=64", "+x=1"])
    assert [word for word in words if "mem_gb" in word] == ["hydra.launcher.mem_gb=64"]
    assert words[-1] == "hydra.sweeper.also=['ratio=0.25','+x=1']"
    assert launch_overrides(sweep.folder, [1, 2], ["ratio=0.25", "+x=1"]) == [
        ["seed=0", "ratio=0.25", "+x=1", "hydra.sweep.subdir=1"],
        ["seed=0", "ratio=0.25", "+x=1", "hydra.sweep.subdir=2"],
    ]
    with pytest.raises(InputError, match="one value only"):
        moeprune_command([str(sweep.folder), "--also", "ratio=0.25,0.5"])


def test_it_works_from_any_directory(sweep, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    # What the rerun prints must be right in the directory in which it was called.
    assert f"hydra.sweep.dir='{sweep.folder}'" in moeprune_command(["../my sweep"])
    assert Path.cwd() == tmp_path
    record = json.loads((sweep.folder / "sweep.json").read_text())
    (sweep.folder / "sweep.json").write_text(json.dumps({**record, "directory": "/not/there"}))
    capsys.readouterr()
    assert moeprune_command([str(sweep.folder)]) is not None
    assert "/not/there, where the sweep was started, is not there" in capsys.readouterr().out


def test_jobs_that_begin_again_are_queued_and_keep_how_they_ended(sweep):
    begin_again(sweep.folder, [1, 2])
    states = {job.job.number: job for job in read_sweep(sweep.folder).jobs}
    assert [states[number].state for number in (0, 1, 2)] == [State.SUCCESS, State.QUEUED, State.QUEUED]
    assert states[1].manifest["earlier"][-1]["error"] == FAILED["error"]
    assert SweepRecord.read(sweep.folder).driver == Process.this()


def test_what_another_rerun_has_begun_meanwhile_is_not_begun_twice(sweep):
    """Seconds go by between the choice of the jobs and their launch, in which Hydra starts."""
    begin_again(sweep.folder, [1])
    before = SweepRecord.read(sweep.folder)
    with pytest.raises(InputError, match="job 1 is now queued"):
        begin_again(sweep.folder, [1, 2])
    assert SweepRecord.read(sweep.folder) == before
    assert read_sweep(sweep.folder).jobs[2].manifest is None


@given(st.text(st.sampled_from("ab '\"\\${}=,[]()#:"), max_size=12))
def test_any_text_arrives_through_the_grammar_of_hydra(text):
    value = OverridesParser.create().parse_override(f"hydra.sweeper.also=[{quoted(text)}]").value()
    assert OmegaConf.create({"also": value}).also[0] == text


def test_a_sweep_that_fails_in_part_ends_with_the_command_that_runs_that_again_and_it_works(here, command, tiny):
    words = ["--multirun", *tiny, "allocator=whole_experts", "ratio=0.5,0.9", "until=score"]
    outcome = here(*words, "hydra.sweep.dir=runs/a day/my sweep")
    assert outcome.code == 2
    folder = outcome.place / "runs/a day/my sweep"
    first = (folder / "0" / "manifest.json").read_text()

    lines = command(status, str(folder))[1].splitlines()
    assert "1 failed, 1 success" in lines
    again = shlex.split(lines[-1].removeprefix("Run again what did not succeed:"))
    assert again == ["moeprune-rerun", str(folder)]

    code, _ = command(rerun, again[1], "--also", "ratio=0.75")
    assert code == 0
    assert (folder / "0" / "manifest.json").read_text() == first
    manifest = json.loads((folder / "1" / "manifest.json").read_text())
    assert (manifest["status"], manifest["attempt"], manifest["overrides"][-1]) == ("success", 1, "ratio=0.75")
    assert [earlier["error"]["type"] for earlier in manifest["earlier"]] == ["BudgetError"]
    assert re.search(r"hydra:\n(.*\n)* +num: 1\n", (folder / "1" / ".hydra" / "hydra.yaml").read_text())
    assert command(rerun, again[1]) == (0, "Nothing to run again: all 2 jobs succeeded.\n")
    assert list(json.loads((folder / "sweep.json").read_text())["command"])[: len(words)] == words
