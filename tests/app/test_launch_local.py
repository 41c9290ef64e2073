"""Sweeps of light jobs with hydra/launcher=basic and =local: what runs, and what is left when jobs die."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import moeprune
from moeprune.app.launching import basic, local, waiting
from moeprune.app.launching.compose import ComposedJob
from moeprune.app.launching.local import LocalSettings, Pool, environment_of_jobs, gpus_of_slots
from moeprune.app.main import config_folder
from moeprune.app.manifest import manifest
from moeprune.errors import InputError

Sweep = Callable[..., BaseException | None]
SETTINGS = LocalSettings(parallel_jobs=2, gpus_per_job=None, cpus_per_job=None, timeout_min=10, max_num_timeout=0)


def light_job(config: DictConfig) -> int:
    """Does what ``seed`` says, and leaves a note of what it was."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    with manifest(run_dir, list(HydraConfig.get().overrides.task)):
        names = ("OMP_NUM_THREADS", "PYTHONPATH")
        note = {"cache_dir": config.cache_dir, "argv": sys.argv, "cwd": os.getcwd(), "pid": os.getpid()}
        (run_dir / "note.json").write_text(json.dumps({**note, **{name: os.environ.get(name) for name in names}}))
        if config.seed == 1:
            raise InputError("as it was asked to", change="Nothing.")
        if config.seed == 2:
            os._exit(3)
        if config.seed == 9:
            time.sleep(60)
    return config.seed * 10


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Iterator[Sweep]:
    """``sweep("seed=0,1")`` sweeps light jobs in ``tmp_path/sweep``, and returns what the driver ends with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*words: str) -> BaseException | None:
        monkeypatch.setattr(sys, "argv", ["moeprune", "--multirun", "hydra.sweep.dir=sweep", *words])
        try:
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(light_job)()
        except (Exception, SystemExit) as error:
            return error
        return None

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def note_of(number: int) -> dict:
    return json.loads(Path(f"sweep/{number}/note.json").read_text())


def status_of(number: int) -> str:
    return json.loads(Path(f"sweep/{number}/manifest.json").read_text())["status"]


def status_of_all() -> list[str]:
    return [status_of(int(manifest.parent.name)) for manifest in sorted(Path("sweep").glob("*/manifest.json"))]


def test_basic_loads_all_code_but_what_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "whole.py").write_text("")
    (tmp_path / "of_an_extra.py").write_text("import not_installed")
    monkeypatch.setattr(moeprune, "__path__", [str(tmp_path)])
    basic._load_all_code()
    assert sys.modules.pop("moeprune.whole").__file__ == str(tmp_path / "whole.py")


def test_basic_runs_the_other_jobs_after_one_has_failed_and_records_all(sweep, monkeypatch):
    loaded = []
    monkeypatch.setattr(basic, "_load_all_code", lambda: loaded.append(status_of_all()))
    monkeypatch.setenv("MOEPRUNE_CACHE", "then")
    error = sweep("seed=0,1,4")
    assert isinstance(error, InputError) and "as it was asked to" in str(error)
    assert status_of_all() == ["success", "failed", "success"]
    assert loaded == [[]]  # before the first job
    record = json.loads(Path("sweep/sweep.json").read_text())
    assert (record["launcher"], record["snapshot"]) == ("basic", None)
    assert [(job["number"], job["folder"], job["overrides"]) for job in record["jobs"]] == [
        (0, "0", ["seed=0"]), (1, "1", ["seed=1"]), (2, "2", ["seed=4"]),
    ]  # fmt: skip


def test_local_runs_all_jobs_from_a_snapshot_also_when_one_fails_and_one_is_killed(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(waiting, "SETTLED_SECONDS", 0.0)
    monkeypatch.setenv("MOEPRUNE_CACHE", "of-the-submission")
    error = sweep("hydra/launcher=local", "hydra.launcher.cpus_per_job=3", "seed=1,2,0,3")
    assert "Job #0 seed=1 failed: InputError: as it was asked to\nNothing." in str(error)
    assert [status_of(number) for number in range(4)] == ["failed", "running", "success", "success"]
    record = json.loads(Path("sweep/sweep.json").read_text())
    snapshot = tmp_path / "sweep" / record["snapshot"]
    note = note_of(3)
    assert note["cache_dir"] == "of-the-submission"
    assert note["argv"][1:] == ["--multirun", "hydra.sweep.dir=sweep", "hydra/launcher=local",
                                "hydra.launcher.cpus_per_job=3", "seed=1,2,0,3"]  # fmt: skip
    assert (note["cwd"], note["OMP_NUM_THREADS"]) == (str(tmp_path), "3")
    assert note["PYTHONPATH"].split(":")[0] == str(snapshot)
    assert len({note_of(number)["pid"] for number in range(4)}) == 4
    assert "InputError: as it was asked to" in Path("sweep/0/job.out").read_text()


def test_a_driver_that_is_stopped_ends_its_jobs_and_their_manifests_say_so(tmp_path):
    code = (
        "import hydra, signal, test_launch_local as t\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "hydra.main(version_base='1.3', config_path=str(t.config_folder()), config_name='config')(t.light_job)()"
    )
    words = [
        "--multirun",
        "hydra.sweep.dir=sweep",
        "hydra/launcher=local",
        "hydra.launcher.parallel_jobs=1",
        "seed=9,0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "HYDRA_FULL_ERROR": "1"}
    driver = subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "sweep/0/note.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(30) != 0
    content = json.loads((tmp_path / "sweep/0/manifest.json").read_text())
    assert content["status"] == "interrupted"
    assert not Path(f"/proc/{content['pid']}").exists()
    assert not (tmp_path / "sweep/1").exists()


def test_a_process_number_that_comes_again_has_not_the_result_of_the_job_before(tmp_path, monkeypatch):
    class Process:
        pid = 7

        def __init__(self, *_words: object, **_settings: object) -> None:
            pass

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(local.subprocess, "Popen", Process)
    jobs = [SimpleNamespace(job=ComposedJob(number, tmp_path / str(number), (), DictConfig({}))) for number in (0, 1)]
    pool = Pool(jobs, [{}], tmp_path, SETTINGS)
    (first,) = pool.start_more()
    first.result.write_text("of the first")
    (second,) = pool.start_more()
    assert (first.id, first.job.number, second.id, second.job.number) == ("7", 0, "7", 1)
    assert not second.result.exists()


def test_cores_are_divided_among_the_jobs_that_run_at_once(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(13)))
    assert environment_of_jobs(SETTINGS, Path("/snapshot"))["OMP_NUM_THREADS"] == "6"


def test_jobs_that_run_at_once_get_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    two_each = LocalSettings(2, gpus_per_job=2, cpus_per_job=None, timeout_min=10, max_num_timeout=0)
    assert gpus_of_slots(SETTINGS) == [{}, {}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpus_of_slots(two_each)] == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(InputError, match="needs 4 GPUs; this machine shows 3"):
        gpus_of_slots(two_each)
    none_at_all = LocalSettings(2, gpus_per_job=0, cpus_per_job=None, timeout_min=10, max_num_timeout=0)
    assert gpus_of_slots(none_at_all) == [{"CUDA_VISIBLE_DEVICES": ""}] * 2
