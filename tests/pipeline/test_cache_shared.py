"""Processes that want the same stage: one computes, the others wait, and one of them goes on when it is gone."""

import os
import platform
import random
import signal
import time
from pathlib import Path

import pytest
from sharing import (
    FORK,
    KEY,
    PATIENT,
    assert_one_sound_result,
    computations,
    in_process,
    log_of,
    outcome_of,
    wait_until,
    want,
    writes,
)

from moeprune.pipeline.cache import StageCache
from moeprune.pipeline.lease import lease_folder
from moeprune.pipeline.progress import Silent


def test_of_eight_processes_one_computes_and_the_others_say_whom_they_wait_for(root):
    start = FORK.Barrier(8)
    processes = [in_process(root, writes("same", 0.4), before=start.wait) for _ in range(8)]
    outcomes = [outcome_of(process, root) for process in processes]
    assert computations(root) == 1
    assert sorted(outcome["cached"] for outcome in outcomes) == [False] + 7 * [True]
    assert_one_sound_result(root, "same")
    (maker,) = [process for process, outcome in zip(processes, outcomes, strict=True) if not outcome["cached"]]
    for process in processes:
        if process is not maker:
            assert f"{platform.node()} (process {maker.pid}) computes it, waiting" in log_of(process, root)


class Told(Silent):
    def __init__(self) -> None:
        self.words: list[str] = []

    def waiting(self, stage, key, owner) -> None:
        self.words.append(f"waiting for {owner}")

    def computing(self, stage, key, folder) -> None:
        self.words.append(f"computing {stage} {folder.is_dir()}")

    def finished(self, artifact) -> None:
        self.words.append(f"finished {artifact.cached}")


def test_progress_is_told_of_waiting_computing_and_finishing(root):
    told = Told()
    owner = in_process(root, writes("theirs", 0.3))
    wait_until(lambda: computations(root) == 1)
    want(root, writes("ours"), progress=told)
    assert told.words == [f"waiting for {platform.node()} (process {owner.pid})", "finished True"]
    told.words.clear()
    StageCache(root, told).get("other", 1, {}, [], writes("ours"))
    assert told.words == ["computing other True", "finished False"]


@pytest.mark.parametrize("reaped", [True, False])
def test_when_the_one_that_computes_is_killed_a_waiter_takes_over_at_once(root, reaped):
    owner = in_process(root, writes("killed", 60))
    wait_until(lambda: computations(root) == 1)
    waiters = [in_process(root, writes("new")) for _ in range(3)]
    wait_until(lambda: all("waiting" in log_of(process, root) for process in waiters))
    os.kill(owner.pid, signal.SIGKILL)
    if reaped:
        owner.join()
    killed = time.monotonic()
    outcomes = [outcome_of(process, root) for process in waiters]
    assert time.monotonic() - killed < PATIENT.abandoned_after / 4
    assert [outcome["content"]["second.txt"] for outcome in outcomes] == 3 * ["new"]
    assert computations(root) == 2
    assert_one_sound_result(root, "new")


def test_when_the_one_that_computes_fails_a_waiter_computes_at_once(root):
    def fails(folder: Path) -> None:
        writes("half", 0.3)(folder)
        raise ValueError("broken")

    owner = in_process(root, fails)
    wait_until(lambda: computations(root) == 1)
    waiters = [in_process(root, writes("new", 0.1)) for _ in range(3)]
    assert [outcome_of(waiter, root)["content"]["first.txt"] for waiter in waiters] == 3 * ["new"]
    owner.join()
    assert owner.exitcode == 1
    assert computations(root) == 2
    assert_one_sound_result(root, "new")


def test_processes_that_want_many_stages_in_any_order_all_end(root):
    names = [f"stage{number}" for number in range(5)]

    def walk(order: list[str]) -> None:
        cache = StageCache(root, timing=PATIENT)
        for name in order:
            cache.get(name, 1, {}, [], writes(name, 0.02))

    orders = [random.Random(seed).sample(names, len(names)) for seed in range(6)]
    processes = [FORK.Process(target=walk, args=(order,)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert computations(root) == len(names)
    assert list(root.rglob(".*")) == []


def test_a_forked_child_neither_keeps_the_lease_alive_nor_gives_it_back(root):
    def compute(folder: Path) -> None:
        writes("parent")(folder)
        lease = lease_folder(root / "shared" / KEY) / "1"
        child = os.fork()
        if child == 0:
            raise SystemExit  # runs every clean-up on its way out
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0
        assert lease.exists()

    owner = in_process(root, compute)
    outcome_of(owner, root)
    assert_one_sound_result(root, "parent")
