"""Several processes give what one does; experts that only some of them reach included."""

import dataclasses
import logging.handlers
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from small_training import SETTINGS, cross_entropy, fails, run_all, train_on_several, trained

from moeprune.errors import BudgetError, InputError
from moeprune.training.distributed import _end_with, fabric_for, launch

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
    logged = logging.handlers.BufferingHandler(100)
    torch_log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    torch_log.addHandler(logged)
    with pytest.raises(BudgetError, match="said in a process"):
        launch(run_all, [jobs], 2)
    torch_log.removeHandler(logged)
    assert not any(record.exc_info for record in logged.buffer)  # a user's mistake shows no traceback
    return folder


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


@pytest.mark.parametrize("run", ["ddp", "resumed"])
def test_two_processes_end_equal_to_each_other_and_to_one(folder, alone, run):
    first, second = (torch.load(folder / run / f"rank_{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    trained_names = [name for name in first if not name.startswith("embedding")]
    assert all(torch.equal(first[name], second[name]) for name in trained_names)
    assert_close(first, alone)


def test_sharded_processes_each_hold_a_part_of_what_one_has(folder, alone):
    parts = [torch.load(folder / "fsdp" / f"rank_{rank}.pt") for rank in (0, 1)]
    assert_close({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, alone)


@pytest.mark.parametrize("run", ["ddp", "resumed", "fsdp"])
def test_one_process_reads_back_what_several_trained(folder, alone, run):
    def never(model, batch):
        raise AssertionError

    assert_close(trained(SETTINGS, folder / run, dropout=DROPOUT, objective=never).state_dict(), alone)
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
        _end_with(parent)
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
