"""hydra/launcher=slurm without a SLURM: settings, the batch script, and what is made of the cluster's answers."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from submitit.slurm.slurm import _make_sbatch_string

from moeprune.app.launching import slurm
from moeprune.app.launching.compose import ComposedJob
from moeprune.app.launching.slurm import SlurmSettings, require_slurm, sbatch_parameters
from moeprune.app.launching.waiting import ENDED, QUEUED, RUNNING, Phase, Sent
from moeprune.app.main import config_folder
from moeprune.app.squeue import Entry
from moeprune.errors import InputError

SCRIPTS = config_folder().parent / "slurm"


@pytest.fixture(autouse=True)
def no_site(monkeypatch) -> None:
    monkeypatch.setenv("MOEPRUNE_SITE", "/dev/null")


def settings(*overrides: str, profile: str = "slurm") -> SlurmSettings:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("config", [f"hydra/launcher={profile}", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    params = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    del params["_target_"]
    return SlurmSettings.of(params, profile)


def script(asked: SlurmSettings) -> list[str]:
    parameters = sbatch_parameters(asked, "slurm", Path("/sweep/snap"))
    return _make_sbatch_string("COMMAND", "/sweep/.submitit/%j", **parameters).splitlines()


def test_the_batch_script_asks_for_what_the_settings_say():
    asked = settings(
        "hydra.launcher.partition=gpu", "hydra.launcher.account=me", "hydra.launcher.qos=high",
        "hydra.launcher.nodelist='n[1-2]'", "hydra.launcher.dependency=afterok:7", "hydra.launcher.exclusive=true",
        "+hydra.launcher.additional_parameters.mail-type=END", "hydra.launcher.setup=[module load cuda]",
        "hydra.launcher.srun_args=['--cpu-bind=none']", "hydra.launcher.cpus_per_task=3",
        profile="slurm_one_gpu",
    )  # fmt: skip
    lines = script(asked)
    expected = {
        "partition=gpu", "account=me", "qos=high", "nodelist='n[1-2]'", "dependency=afterok:7", "exclusive",
        "mail-type=END", "cpus-per-task=3", "gpus-per-node=1", "mem=65536M", "time=240", "requeue",
        "job-name=moeprune", "nodes=1", "ntasks-per-node=1", "signal=USR2@120", "open-mode=append",
        "output=/sweep/.submitit/%j/%j_0_log.out",
    }  # fmt: skip
    assert {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")} == expected
    setup = lines[lines.index("# setup") + 1 : lines.index("# command") - 1]
    assert setup[0] == "export OMP_NUM_THREADS=3"
    assert setup.index("module load cuda") < setup.index("export PYTHONSAFEPATH=1")
    assert any(line.startswith("export PYTHONPATH=/sweep/snap") for line in setup)
    assert "export SRUN_CPUS_PER_TASK=3" in setup
    assert any(line.startswith("srun ") and "--cpu-bind=none" in line for line in lines)


def test_the_sites_lines_words_and_options_come_first_and_stay(tmp_path, monkeypatch):
    (tmp_path / "site.yaml").write_text(
        "setup: [module purge]\nsrun_args: [--mpi=none]\nadditional_parameters: {mail-type: FAIL, licenses: a}"
    )
    monkeypatch.setenv("MOEPRUNE_SITE", str(tmp_path / "site.yaml"))
    asked = settings("+hydra.launcher.additional_parameters.mail-type=END", "hydra.launcher.setup=[ulimit -n 4096]")
    parameters = sbatch_parameters(asked, "slurm", Path("/sweep/snap"))
    assert parameters["additional_parameters"] == {"mail-type": "END", "licenses": "a", "requeue": True}
    assert parameters["setup"][1:3] == ["module purge", "ulimit -n 4096"]
    assert parameters["srun_args"] == ["--mpi=none"]


def test_a_job_that_may_not_come_back_says_so_to_slurm():
    lines = script(replace(settings(), requeue=False))
    assert "#SBATCH --no-requeue" in lines and "#SBATCH --requeue" not in lines


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("hydra.launcher.timeout_min=0", "timeout_min=0 is not possible.\nUse a whole number of at least 1."),
        ("hydra.launcher.timeout_min=1:00", "timeout_min=1:00 is not possible.\nGive a whole number"),
        ("hydra.launcher.partition=3", "partition=3 is not possible.\nGive a word or null"),
        ("hydra.launcher.exclusive=maybe", "exclusive=maybe is not possible.\nGive true or false"),
        ("hydra.launcher.setup=module", "setup=module is not possible.\nGive a list of words"),
        ("hydra.launcher.setup=[1]", "setup=[1] is not possible.\nGive a list of words"),
        ("hydra.launcher.mem_gb=-1", "mem_gb=-1 is not possible"),
        ("+hydra.launcher.reservation=friday", "reservation is not a setting of this launcher.\n"),
    ],
)
def test_a_wrong_setting_is_a_plain_error(override, said):
    with pytest.raises(InputError) as caught:
        settings(override)
    assert f"hydra.launcher.{said}" in str(caught.value)


def test_a_machine_without_slurm_is_told_what_to_use(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"This machine has no SLURM: .*\nUse hydra/launcher=local"):
        require_slurm()


def test_every_state_is_queued_running_or_ended(monkeypatch):
    states = ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "OUT_OF_MEMORY", "FAILED"]
    entries = {f"7_{number}": Entry(state, "") for number, state in enumerate(states)}
    monkeypatch.setattr(slurm, "ask_slurm", lambda _ids: entries)
    job = ComposedJob(0, Path("/sweep/0"), (), OmegaConf.create({}))
    sent = [Sent(job, f"7_{number}", Path("/result"), Path("/log")) for number in range(len(states) + 1)]
    phases = [slurm._phases(sent)[each.id] for each in sent]
    assert [phase.word for phase in phases] == [QUEUED, RUNNING, RUNNING, QUEUED, ENDED, ENDED, ENDED]
    assert phases[4] == Phase(ENDED, "It took more memory than hydra.launcher.mem_gb allows.")
    assert "as FAILED" in phases[5].reason and "left the queue" in phases[6].reason
    monkeypatch.setattr(slurm, "ask_slurm", lambda _ids: None)
    assert slurm._phases(sent) is None


def test_what_the_drivers_own_job_was_given_does_not_reach_sbatch(monkeypatch):
    for name in ("SLURM_MEM_PER_NODE", "SBATCH_PARTITION", "SUBMITIT_EXECUTOR", "SLURM_CONF", "MOEPRUNE_CACHE"):
        monkeypatch.setenv(name, "1")
    with slurm._without_the_drivers_job():
        inside = set(os.environ)
    assert {"SLURM_CONF", "MOEPRUNE_CACHE"} <= inside
    assert not {"SLURM_MEM_PER_NODE", "SBATCH_PARTITION", "SUBMITIT_EXECUTOR"} & inside
    assert os.environ["SLURM_MEM_PER_NODE"] == "1"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch) -> Path:
    """`moeprune` and `wandb` that write down how they were called."""
    for name in ("moeprune", "wandb"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" > {tmp_path}/called\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "called"


@pytest.mark.parametrize(
    ("words", "called"),
    [
        (["driver.sbatch", "ratio=0.25,0.5"], ["moeprune", "--multirun", "hydra/launcher=slurm", "ratio=0.25,0.5"]),
        (["driver.sbatch", "hydra/launcher=slurm_cpu"], ["moeprune", "--multirun", "hydra/launcher=slurm_cpu"]),
        (["agent.sbatch", "me/p/abc"], ["wandb", "agent", "--forward-signals", "me/p/abc"]),
        (["agent.sbatch", "abc", "--count", "4"], ["wandb", "agent", "--forward-signals", "--count", "4", "abc"]),
    ],
)
def test_the_batch_files_run_these_commands(stand_ins, words, called):
    subprocess.run(["bash", str(SCRIPTS / words[0]), *words[1:]], check=True)
    assert stand_ins.read_text().splitlines() == called


def test_agents_want_a_sweep(stand_ins):
    done = subprocess.run(["bash", str(SCRIPTS / "agent.sbatch")], capture_output=True, text=True)
    assert done.returncode == 2 and "sbatch slurm/agent.sbatch ENTITY/PROJECT/SWEEP" in done.stderr
    assert not stand_ins.exists()
