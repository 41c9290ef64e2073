"""A run killed at any moment ends with the bits and the loss curve of one that was not."""

import dataclasses
import json
import logging
import multiprocessing
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from preempting import lines_of, preempted_again_and_again, signalled
from small_training import SETTINGS, cross_entropy, trained

from moeprune.errors import InputError
from moeprune.training import checkpoints
from moeprune.training.checkpoints import Checkpoints, Progress

# 4 epochs of 3 steps; dropout, so that random numbers are part of it.
LONG = dataclasses.replace(
    SETTINGS, epochs=4, log_every=2, checkpoint_every_steps=3, validation_windows=2, validate_every_steps=5, patience=9
)
DROPOUT = 0.3


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KilledAt:
    """The objective; kills its process in place of a call."""

    def __init__(self, call) -> None:
        self.left = call

    def __call__(self, model, batch):
        self.left -= 1
        if self.left == 0:
            kill()
        return cross_entropy(model, batch)


def slow(model, batch):
    """A whole run takes a second, so that who sends a signal may be late on a busy machine."""
    time.sleep(0.03)
    return cross_entropy(model, batch)


def killed_in_training(folder, call) -> None:
    trained(LONG, folder, dropout=DROPOUT, objective=KilledAt(call))


def killed_in_writing(folder, written) -> None:
    """Kills when the ``written``-th checkpoint lies there in half, under its first name."""

    def save_half(tensors, path, metadata):
        nonlocal written
        written -= 1
        save_file(tensors, path, metadata=metadata)
        if written == 0:
            path.write_bytes(path.read_bytes()[:1000])
            kill()

    save_file, checkpoints.save_file = checkpoints.save_file, save_half
    trained(LONG, folder, dropout=DROPOUT)


def killed_before_renaming_counts(folder, written) -> None:
    """Kills when a checkpoint has its name, and the oldest is not yet gone."""
    paths = Checkpoints._paths

    def paths_or_kill(self):
        nonlocal written
        found = paths(self)
        written -= len(found) > 0
        if written == 0:
            kill()
        return found

    Checkpoints._paths = paths_or_kill
    trained(LONG, folder, dropout=DROPOUT)


def killed_in_the_curve(folder, _written) -> None:
    """Kills when the third line of the loss curve is there in half."""
    curve = folder / "loss_curve.jsonl"

    def call(model, batch):
        if curve.exists() and len(curve.read_text().splitlines()) == 3:
            curve.write_text(curve.read_text()[:-20])
            kill()
        return cross_entropy(model, batch)

    trained(LONG, folder, dropout=DROPOUT, objective=call)


def in_a_process(function, *arguments) -> int:
    """The exit code; the process is a copy of this one, so that it starts at once."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def curve_of(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "loss_curve.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return trained(LONG, folder, dropout=DROPOUT), curve_of(folder)


def assert_as_uninterrupted(uninterrupted, folder) -> None:
    resumed = trained(LONG, folder, dropout=DROPOUT)
    model, curve = uninterrupted
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert curve_of(folder) == curve


def test_the_curve_has_what_it_should(uninterrupted):
    _, curve = uninterrupted
    assert [line["step"] for line in curve] == [2, 4, 5, 6, 8, 10, 12]
    assert ["validation_loss" in line for line in curve] == [False, False, True, False, False, True, True]


@pytest.mark.parametrize(
    "kills",
    [
        # Calls are micro-batches of 2 windows: 5 an epoch (9 windows), and one for each validation.
        [(killed_in_training, 2)],  # before any checkpoint, in the middle of a step
        [(killed_in_training, 8)],  # between two checkpoints
        [(killed_in_training, 8), (killed_in_training, 7), (killed_in_training, 5)],
        [(killed_in_writing, 1)],
        [(killed_in_writing, 2), (killed_in_training, 3), (killed_in_writing, 1)],
        [(killed_before_renaming_counts, 3), (killed_in_training, 1)],
        [(killed_in_the_curve, 0), (killed_in_training, 6)],
    ],
)
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(uninterrupted, tmp_path, kills):
    for function, moment in kills:
        assert in_a_process(function, tmp_path, moment) == -signal.SIGKILL
    assert_as_uninterrupted(uninterrupted, tmp_path)


STATE = ("training/run.py", "training/checkpoints.py", "training/curve.py")
WORK = ("training/steps.py", "training/learner.py")


@pytest.mark.parametrize("files", [STATE, WORK], ids=["state", "work"])
def test_a_run_preempted_at_any_line_ends_as_one_that_was_not(uninterrupted, tmp_path, files):
    """As by Submitit's handler, which raises SystemExit wherever the main thread is."""

    def job(folder) -> None:
        trained(LONG, folder, dropout=DROPOUT)

    lines = lines_of(partial(job, tmp_path / "counted"), files, tmp_path / "lines")
    for seed in range(2):
        folder = tmp_path / str(seed)
        assert preempted_again_and_again(partial(job, folder), files, lines // 2, seed) > 1
        assert_as_uninterrupted(uninterrupted, folder)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL])
def test_a_run_stopped_at_any_moment_ends_as_one_that_was_not(uninterrupted, tmp_path, number):
    def job() -> None:
        trained(LONG, tmp_path, dropout=DROPOUT, objective=slow)

    rng, cut_short = random.Random(0), 0
    for _ in range(4):
        cut_short += signalled(job, number, rng.uniform(0.05, 0.2)) != 0
    assert cut_short > 1
    assert_as_uninterrupted(uninterrupted, tmp_path)


def test_checkpoints_hold_what_trains_and_the_last_two_stay(uninterrupted, tmp_path):
    del uninterrupted
    trained(SETTINGS, tmp_path)
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == ["step_00000003.safetensors", "step_00000006.safetensors"]
    tensors, progress = checkpoints_of(tmp_path, {}).latest()
    assert {name.split("/")[0] for name in tensors} == {"parameters", "optimizer"}
    assert not any("embedding" in name for name in tensors)
    assert progress.step == 6


def checkpoints_of(folder, identity) -> Checkpoints:
    """Those of a run, whatever its settings."""
    found = Checkpoints(folder / "checkpoints", identity)
    found._require_same = lambda stored: None
    return found


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"x" * len(data), lambda data: b""])
def test_where_the_last_checkpoint_is_damaged_the_one_before_is_used(uninterrupted, tmp_path, damage, caplog):
    assert in_a_process(killed_in_training, tmp_path, 20) == -signal.SIGKILL
    *_, last = sorted((tmp_path / "checkpoints").iterdir())
    assert last.name == "step_00000009.safetensors"
    last.write_bytes(damage(last.read_bytes()))
    with caplog.at_level(logging.INFO):
        assert_as_uninterrupted(uninterrupted, tmp_path)
    assert f"checkpoint {last} is damaged" in caplog.text
    assert "training goes on from step 6" in caplog.text


def test_a_damaged_checkpoint_goes_with_the_next_that_is_written(tmp_path):
    found = Checkpoints(tmp_path, {})
    for step in (3, 6, 9):
        found.save({"weight": torch.ones(1)}, Progress(step))
    (tmp_path / "step_00000009.safetensors").write_bytes(b"")
    found.save({"weight": torch.ones(1)}, Progress(7))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000006.safetensors",
        "step_00000007.safetensors",
    ]


def test_checkpoints_by_time_come_between_those_by_steps(tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every_steps=100, checkpoint_every_min=0.001 / 60)
    trained(settings, tmp_path, objective=slow)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000005.safetensors", "step_00000006.safetensors"]


def test_a_finished_run_is_only_read_back(uninterrupted, tmp_path):
    trained(LONG, tmp_path, dropout=DROPOUT)

    def never(model, batch):
        raise AssertionError

    again = trained(LONG, tmp_path, dropout=DROPOUT, objective=never)
    for name, tensor in uninterrupted[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert curve_of(tmp_path) == uninterrupted[1]


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    trained(SETTINGS, tmp_path)
    with pytest.raises(InputError, match=r"checkpoints of another training run \(epochs: 2 there, 3 now\)"):
        trained(dataclasses.replace(SETTINGS, epochs=3), tmp_path)


def test_a_run_may_go_on_with_other_micro_batches(tmp_path):
    """As after running out of memory."""

    class StoppedError(Exception):
        pass

    def stops(model, batch):
        if (Path(tmp_path) / "run" / "checkpoints" / "step_00000003.safetensors").exists():
            raise StoppedError
        return cross_entropy(model, batch)

    with pytest.raises(StoppedError):
        trained(SETTINGS, tmp_path / "run", objective=stops)
    other = trained(dataclasses.replace(SETTINGS, micro_batch_size=1, checkpoint_every_steps=1), tmp_path / "run")
    expected = trained(SETTINGS, tmp_path / "whole")
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-8, atol=1e-9)
