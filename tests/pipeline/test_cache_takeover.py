"""A process that is taken for dead, from another machine: it is, or it sleeps and wakes, at whatever moment."""

import os
import platform
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sharing import (
    IMPATIENT,
    KEY,
    WARY,
    assert_one_sound_result,
    computations,
    in_process,
    is_stopped,
    log_of,
    note,
    outcome_of,
    stop_oneself,
    wait_until,
    want,
    writes,
)

from moeprune.pipeline.lease import Lease
from moeprune.pipeline.workplace import Workplace

HOURS = 5 * 3600


@pytest.fixture
def elsewhere(monkeypatch):
    """This process believes that it runs on another machine than those it has started, and cannot ask for theirs."""

    def move() -> None:
        monkeypatch.setattr(platform, "node", lambda: "node-17")

    return move


def test_a_process_of_another_machine_is_given_its_time_of_silence_then_taken_over(root, elsewhere):
    owner = in_process(root, writes("killed", 60))
    wait_until(lambda: computations(root) == 1)
    owner.kill()
    owner.join()
    elsewhere()
    began = time.monotonic()
    want(root, writes("new"), IMPATIENT)
    assert time.monotonic() - began >= IMPATIENT.abandoned_after
    assert_one_sound_result(root, "new")


def test_a_process_of_another_machine_that_shows_that_it_lives_is_waited_for(root, elsewhere):
    owner = in_process(root, writes("theirs", 1.6 * WARY.abandoned_after))
    wait_until(lambda: computations(root) == 1)
    elsewhere()
    assert want(root, writes("ours"), WARY).cached
    outcome_of(owner, root)
    assert_one_sound_result(root, "theirs")


@pytest.mark.parametrize("hours", [HOURS, -HOURS], ids=["ahead", "behind"])
@pytest.mark.parametrize("killed", [True, False])
def test_clocks_of_other_machines_do_not_matter(root, elsewhere, hours, killed):
    real = time.time

    def wrong_clock() -> None:
        time.time = lambda: real() + hours
        threading.Thread(target=skew_files, args=(root,), daemon=True).start()

    owner = in_process(root, writes("theirs", 60 if killed else 1.6 * WARY.abandoned_after), before=wrong_clock)
    wait_until(lambda: computations(root) == 1)
    elsewhere()
    if killed:
        time.sleep(0.1)
        owner.kill()
        owner.join()
    want(root, writes("ours"), IMPATIENT if killed else WARY)
    assert_one_sound_result(root, "ours" if killed else "theirs")


def skew_files(root: Path) -> None:
    """As a machine with a wrong clock would leave them, again and again."""
    while True:
        for path in root.rglob("*"):
            with suppress(OSError):
                os.utime(path, (time.time(), time.time()))
        time.sleep(0.02)


def stop_before_writing(folder: Path) -> None:
    note(folder)
    stop_oneself()
    for name in ("first.txt", "second.txt"):
        (folder / name).write_text("old")


def stop_in_an_open_file(folder: Path) -> None:
    note(folder)
    (folder / "second.txt").write_text("old")
    with (folder / "first.txt").open("w") as file:
        file.write("ol")
        file.flush()
        stop_oneself()
        file.write("d")


def stop_and_make_the_folder_again(folder: Path) -> None:
    note(folder)
    stop_oneself()
    folder.mkdir(parents=True, exist_ok=True)
    writes("old")(folder)


def stops_in(kind: type, method: str, after: bool):
    """What a process calls first that is to stop before or after a step of the cache's own, the first time."""

    def patch() -> None:
        usual = getattr(kind, method)

        def stopping(self, *arguments):
            setattr(kind, method, usual)
            if not after:
                stop_oneself()
            result = usual(self, *arguments)
            if after:
                stop_oneself()
            return result

        setattr(kind, method, stopping)

    return patch


STOPS = {
    "before writing": (stop_before_writing, None, "new"),
    "in an open file": (stop_in_an_open_file, None, "new"),
    "making its folder again": (stop_and_make_the_folder_again, None, "new"),
    "before publishing": (writes("old"), stops_in(Workplace, "publish", after=False), "new"),
    "sure that it may publish": (writes("old"), stops_in(Workplace, "is_lost", after=True), "new"),
    "after publishing": (writes("old"), stops_in(Lease, "give_back", after=False), "old"),
}


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize(("compute", "before", "expected"), STOPS.values(), ids=STOPS)
def test_a_process_that_sleeps_while_it_is_taken_over_ends_with_the_new_owners_result(
    root, elsewhere, compute, before, expected, resumable
):
    old = in_process(root, compute, before=before, resumable=resumable)
    wait_until(lambda: is_stopped(old))
    elsewhere()
    folder = want(root, writes("new"), IMPATIENT, resumable).folder
    published = {file.name: file.read_bytes() for file in folder.iterdir()}
    os.kill(old.pid, signal.SIGCONT)
    assert set(outcome_of(old, root)["content"].values()) == {expected}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == published
    assert_one_sound_result(root, expected)
    assert ("lost the stage" in log_of(old, root)) == (expected == "new")


def test_a_process_that_wakes_while_the_new_owner_computes_waits_for_it(root, elsewhere):
    old = in_process(root, stop_before_writing)
    wait_until(lambda: is_stopped(old))
    elsewhere()

    def compute(folder: Path) -> None:
        (folder / "first.txt").write_text("new")
        os.kill(old.pid, signal.SIGCONT)
        wait_until(lambda: "computes it, waiting" in log_of(old, root))
        (folder / "second.txt").write_text("new")

    want(root, compute, IMPATIENT)
    assert outcome_of(old, root)["cached"]
    assert f"lost the stage to node-17 (process {os.getpid()})" in log_of(old, root)
    assert_one_sound_result(root, "new")


@pytest.mark.parametrize("other_machine", [True, False])
def test_the_next_owner_goes_on_from_what_a_killed_one_has_written(root, elsewhere, other_machine):
    owner = in_process(root, writes("layers", 60), resumable=True)
    wait_until(lambda: any(file.read_text() for file in root.rglob("first.txt")))  # a file is there before its text
    owner.kill()
    owner.join()
    if other_machine:
        elsewhere()

    def compute(folder: Path) -> None:
        assert (folder / "first.txt").read_text() == "layers"
        (folder / "second.txt").write_text("layers")

    want(root, compute, IMPATIENT, resumable=True)
    assert_one_sound_result(root, "layers")


def test_a_killed_takeover_loses_nothing(root, elsewhere, monkeypatch):
    """A copy that was cut short must not hide what it was made from."""
    owner = in_process(root, writes("layers", 60), resumable=True)
    wait_until(lambda: any(file.read_text() for file in root.rglob("first.txt")))  # a file is there before its text
    owner.kill()
    owner.join()

    def cut_short() -> None:
        elsewhere()
        monkeypatch.setattr("shutil.copytree", lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    second = in_process(root, writes("layers"), IMPATIENT, resumable=True, before=cut_short)
    second.join()
    assert second.exitcode == -signal.SIGKILL
    want(root, lambda folder: (folder / "second.txt").write_text((folder / "first.txt").read_text()), IMPATIENT, True)
    assert_one_sound_result(root, "layers")


@pytest.mark.parametrize("seed", range(2))
def test_processes_killed_and_stopped_at_random_moments_end_with_one_sound_result(root, elsewhere, seed):
    rng, moved = random.Random(seed), (None, elsewhere)

    def start():
        resumable = True  # so that folders are taken over too
        before = rng.choice(moved)
        return in_process(root, writes("same", rng.uniform(0, 0.15)), IMPATIENT, resumable, before)

    processes, until = [start() for _ in range(5)], time.monotonic() + 3
    while time.monotonic() < until:
        time.sleep(rng.uniform(0, 0.05))
        place = rng.randrange(len(processes))
        process = processes[place]
        if process.is_alive() and rng.random() < 0.3:
            os.kill(process.pid, signal.SIGSTOP)
        elif process.is_alive() and rng.random() < 0.5:
            process.kill()
        if not process.is_alive():
            processes[place] = start()
            if rng.random() < 0.5 and (root / "shared" / KEY).exists():
                rng.choice(list((root / "shared" / KEY).glob("*"))).write_text("damaged")
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGCONT)
    for process in processes:
        process.join(30)
        assert process.exitcode in (0, -signal.SIGKILL)
    want(root, writes("same"), IMPATIENT, resumable=True)
    want(root, writes("same"), IMPATIENT, resumable=True)
    assert_one_sound_result(root, "same")
