"""Leases: exactly one wins each generation, and death is judged by what the waiter itself has seen."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sharing import FORK

from moeprune.errors import InputError
from moeprune.pipeline import waiting as waiting_module
from moeprune.pipeline.lease import Held, Lease, Owner, Timing, held_by_the_living, holder, take
from moeprune.pipeline.process import Process
from moeprune.pipeline.waiting import Watch, take_turn

ELSEWHERE = Process("node-17", 1, "another boot", 1.0)
QUICK = Timing(beat=0.01, abandoned_after=0.1, first_look=0.01, longest_look=0.02)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "stage" / ".lease-0"


def gone_process() -> Process:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return replace(Process.this(), pid=ended.pid)


def taken(folder: Path, owner: Owner, over: Held | None = None) -> Lease:
    lease = take(folder, owner, over)
    assert lease is not None
    return lease


def test_a_lease_says_whose_it_is_and_stays_json_while_its_counter_rises(folder):
    owner = Owner.here("runs/12")
    lease = taken(folder, owner)
    seen = set()
    for _ in range(12):
        lease.beat()
        held = holder(folder)
        assert (held.generation, held.owner) == (1, owner)
        seen.add(json.loads(held.content)["beat"])
    assert seen == {f"{beat:020d}" for beat in range(1, 13)}
    assert str(held) == f"{platform.node()} (process {os.getpid()}, runs/12)"
    lease.give_back()
    assert holder(folder) is None
    assert not folder.exists()


def contend(folder: Path, start, rounds: int, over: bool, wins) -> None:
    for number in range(rounds):
        place = folder / str(number)
        held = holder(place)
        start.wait()
        if take(place, Owner.here(), held if over else None) is not None:
            with wins.get_lock():
                wins[number] += 1
        start.wait()


@pytest.mark.parametrize("over", [True, False], ids=["takeover", "first lease"])
def test_of_processes_that_race_for_a_lease_exactly_one_wins_every_round(tmp_path, over):
    rounds, contenders = 60, 4
    if over:
        for number in range(rounds):
            taken(tmp_path / str(number), Owner(gone_process() if number == 0 else ELSEWHERE))
    start, wins = FORK.Barrier(contenders), FORK.Array("i", rounds)
    processes = [FORK.Process(target=contend, args=(tmp_path, start, rounds, over, wins)) for _ in range(contenders)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert list(wins) == rounds * [1]


def test_a_lease_is_not_taken_over_from_whom_it_was_given_to_meanwhile(folder):
    first = taken(folder, Owner(ELSEWHERE))
    seen = holder(folder)
    first.file.unlink()
    second = taken(folder, Owner(ELSEWHERE))
    assert take(folder, Owner.here(), over=seen) is None
    assert holder(folder).owner == second.owner
    assert [entry.name for entry in folder.iterdir()] == ["1"]


def test_a_first_lease_that_an_old_listing_suggested_is_withdrawn(folder):
    first = taken(folder, Owner(ELSEWHERE))
    second = taken(folder, Owner(ELSEWHERE), holder(folder))
    first.file.unlink()
    assert take(folder, Owner.here()) is None
    assert holder(folder).owner == second.owner


def test_leases_of_earlier_generations_go_with_the_last(folder):
    lease = taken(folder, Owner(ELSEWHERE))
    for generation in (2, 3):
        lease = taken(folder, Owner.here(), holder(folder))
        assert lease.generation == generation
    lease.give_back()
    assert not folder.exists()


def test_who_lost_a_lease_neither_revives_nor_removes_it(folder):
    lost = taken(folder, Owner.here())
    lost.file.unlink()
    lost.beat()
    assert holder(folder) is None
    new = taken(folder, Owner.here())
    content = holder(folder).content
    lost.beat()
    lost.give_back()
    assert holder(folder) == Held(1, content)
    new.give_back()


def test_a_lease_that_cannot_be_written_is_not_left_empty(folder, monkeypatch):
    def full(*_arguments) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        take(folder, Owner.here())
    assert holder(folder) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": 3}', b"\xff", b'{"process": {"host": "a"}}'])
def test_a_lease_that_says_nothing_is_waited_for_then_taken_over(folder, content):
    folder.mkdir(parents=True)
    (folder / "1").write_bytes(content)
    assert holder(folder).owner is None
    told = []
    lease = take_turn(folder, "stage", Owner.here(), QUICK, told.append, lambda: None)
    assert (lease.generation, len(told)) == (2, 1)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting_module, "time", clock)
    return clock


def watch_for(clock: Clock, watch: Watch, held: Held, seconds: float) -> str | None:
    """What is said after looking every second for so long."""
    said = None
    for _ in range(int(seconds)):
        clock.now += 1
        said = watch.why_free(held)
    return said


def held_by(process: Process, restart: int = 0) -> Held:
    return Held(1, Owner(process, restart).as_json().encode())


def test_silence_counts_from_the_last_change_that_the_waiter_saw(clock):
    watch, held = Watch(Owner.here(), Timing()), held_by(ELSEWHERE)
    assert watch_for(clock, watch, held, 180) is None
    changed = Held(1, held.content.replace(b"0" * 20, b"0" * 19 + b"1"))
    assert watch_for(clock, watch, changed, 180) is None
    assert watch_for(clock, watch, changed, 1) == "it gave no sign of life for 180 s"


def test_a_waiter_that_slept_itself_does_not_count_its_sleep(clock):
    watch, held = Watch(Owner.here(), Timing()), held_by(ELSEWHERE)
    assert watch_for(clock, watch, held, 10) is None
    clock.now += 100_000
    assert watch.why_free(held) is None
    assert watch_for(clock, watch, held, 100) is None


def test_an_earlier_start_of_the_same_slurm_job_is_given_three_signs_of_life(clock, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    before = replace(ELSEWHERE, slurm_job_id="12")
    assert watch_for(clock, Watch(Owner.here(), Timing()), held_by(before), 17).startswith("SLURM has started its job")
    assert watch_for(clock, Watch(Owner.here(), Timing()), held_by(before), 15) is None
    assert watch_for(clock, Watch(Owner.here(), Timing()), held_by(before, restart=1), 100) is None
    other = replace(ELSEWHERE, slurm_job_id="13")
    assert watch_for(clock, Watch(Owner.here(), Timing()), held_by(other), 100) is None


def test_a_process_that_is_gone_is_known_at_once_on_its_own_machine_only(clock):
    watch, gone = Watch(Owner.here(), Timing()), gone_process()
    assert watch.why_free(held_by(gone)) == "its process is gone"
    assert watch.why_free(held_by(replace(gone, host="node-17"))) is None
    assert watch.why_free(held_by(replace(gone, machine="another container"))) is None
    assert watch.why_free(held_by(Process.this())) is None


def test_a_process_number_that_was_given_again_is_another_process():
    this = Process.this()
    assert this.gone is False
    assert replace(this, started=this.started - 1).gone is True


def test_a_process_that_has_ended_but_was_not_waited_for_is_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    owner = replace(Process.this(), pid=child.pid, started=None)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.gone is True
    child.wait()


def test_a_process_that_the_system_hides_counts_as_alive(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])
    usual = Path.read_text

    def hidden(path: Path, *arguments) -> str:
        if path == Path(f"/proc/{child.pid}/stat"):
            raise FileNotFoundError(2, "hidden")
        return usual(path, *arguments)

    monkeypatch.setattr(Path, "read_text", hidden)
    assert replace(Process.this(), pid=child.pid).gone is False
    child.kill()
    child.wait()
    assert replace(Process.this(), pid=child.pid).gone is True


def test_one_look_tells_of_a_lease_that_has_been_silent_for_hours(folder):
    assert not held_by_the_living(folder)
    lease = taken(folder, Owner(ELSEWHERE))
    assert held_by_the_living(folder)
    long_ago = lease.file.stat().st_mtime - 2 * 3600
    os.utime(lease.file, (long_ago, long_ago))
    assert not held_by_the_living(folder)


def test_a_silence_too_short_for_a_few_signs_of_life_is_refused():
    with pytest.raises(InputError, match="Use at least 15 s"):
        Timing(abandoned_after=10)
