"""Several processes, here those of two tasks, give what one does; experts that only some of them reach included."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from small_training import SETTINGS, cross_entropy, fails, run_all, train_on_several, trained

from moeprune.errors import BudgetError, InputError
from moeprune.training.distributed import fabric_for, launch
from moeprune.training.processes import end_with
from moeprune.training.tasks import lead

pytestmark = pytest.mark.xdist_group("distributed")  # one process trains what all tests look at

DROPOUT = 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left: trained with DDP and FSDP from the start, and with DDP from a checkpoint of one."""
    folder = tmp_path_factory.mktemp("several")
    several = dataclasses.replace(SETTINGS, devices=2)
    stopped_after_3(folder / "resumed")
    jobs = [
        partial(train_on_several, folder / "ddp", several, DROPOUT),
        partial(train_on_several, folder / "resumed", several, DROPOUT),
        partial(train_on_several, folder / "fsdp", dataclasses.replace(several, strategy="fsdp"), DROPOUT),
        partial(fails, BudgetError("said in a process")),
    ]
    variables, said = pytest.MonkeyPatch.context(), pytest.raises(BudgetError, match="said in a process")
    with variables as context, second_task(folder, context), lead(folder), said:
        launch(run_all, [jobs], 2)
    return folder


@contextmanager
def second_task(folder, variables):
    """That of a SLURM job of two tasks, on a node with another name; this process is the first."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}.items():
        variables.setenv(name, value)
    follows = "socket.gethostname = lambda: 'other'; tasks.follow(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", f"import pathlib, socket, sys; from moeprune.training import tasks; {follows}"]
    environment = {**os.environ, "SLURM_PROCID": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([*command, str(folder)], env=environment) as task:
        yield
    assert task.returncode == 0


class StoppedError(Exception):
    pass


def stopped_after_3(folder) -> None:
    def stops(model, batch):
        if (folder / "checkpoints" / "step_00000003.safetensors").exists():
            raise StoppedError
        return cross_entropy(model, batch)

    with pytest.raises(StoppedError):
        trained(SETTINGS, folder, dropout=DROPOUT, objective=stops)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(SETTINGS, tmp_path_factory.mktemp("alone"), dropout=DROPOUT)


def assert_close(values, model) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(values[name], tensor, rtol=1e-8, atol=1e-9)


def never(model, batch):
    raise AssertionError


def test_two_processes_end_equal_to_each_other_and_to_one(folder, alone, subtests):
    """One test, as several may be shared out among processes that would each train."""
    runs = ("ddp", "resumed", "fsdp")
    parts = {run: [torch.load(folder / run / f"rank_{rank}.pt") for rank in (0, 1)] for run in runs}
    for run in ("ddp", "resumed"):
        first, second = parts[run]
        with subtests.test(run):
            assert first.keys() == second.keys()
            trained_names = [name for name in first if not name.startswith("embedding")]
            assert all(torch.equal(first[name], second[name]) for name in trained_names)
            assert_close(first, alone)
    with subtests.test("each holds a part of what one has"):
        assert_close({name: torch.cat([part[name] for part in parts["fsdp"]]) for name in parts["fsdp"][0]}, alone)
    for run in parts:
        with subtests.test(f"one process reads back {run}"):
            read_back = trained(SETTINGS, folder / run, dropout=DROPOUT, objective=never)
            assert_close(read_back.state_dict(), alone)
            assert len((folder / run / "loss_curve.jsonl").read_text().splitlines()) == 3


def test_one_device_needs_no_process():
    called = []
    launch(called.append, ["here"], 1)
    assert called == ["here"]


def test_float16_does_not_shard():
    with pytest.raises(InputError, match="precision=16-mixed does not work with strategy=fsdp"):
        fabric_for(torch.device("cpu"), devices=2, strategy="fsdp", precision="16-mixed")


def killed_with_a_child(folder) -> None:
    parent = os.getpid()
    if os.fork() == 0:
        (folder / "child").write_text(str(os.getpid()))
        end_with(parent)
    while not (folder / "child").exists():
        time.sleep(0.01)
    os.kill(parent, signal.SIGKILL)


def is_running(process: int) -> bool:
    """Also one that has ended is listed until its parent asks for its exit code."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's list of processes")
def test_processes_end_when_the_one_that_launched_them_is_killed(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_with_a_child, args=[tmp_path])
    process.start()
    process.join()
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 20
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)
