"""The driver waits for every job: those that return, those that fail, and those that are gone."""

import errno
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from moeprune.app.launching import waiting
from moeprune.app.launching.compose import ComposedJob
from moeprune.app.launching.waiting import ENDED, QUEUED, RUNNING, Phase, Sent, Watch

TRACEBACK = """Traceback (most recent call last):
  File "a.py", line 3, in load
    return pickle.load(file)
           ^^^^^^^^^^^^^^^^^
OSError: no space
left
"""
GONE = Phase(ENDED, "It was killed.")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A second passes whenever the driver sleeps."""
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(waiting.time, "sleep", lambda _seconds: now.__setitem__(0, now[0] + 1))
    return now


def sent(folder: Path, number: int) -> Sent:
    job = ComposedJob(number, folder / str(number), (f"seed={number}",), OmegaConf.create({}))
    return Sent(job, f"7_{number}", folder / f"{number}.pkl", folder / str(number) / "job.out")


def finish(job: Sent, outcome: str, value: object) -> None:
    job.result.write_bytes(pickle.dumps((outcome, value)))


def outcomes(returned: Sequence) -> list[tuple[JobStatus, str]]:
    return [(each.status, str(each._return_value)) for each in returned]


def test_a_job_that_is_killed_hides_no_other(tmp_path, clock):
    jobs = [sent(tmp_path, number) for number in (2, 1, 0)]
    finish(jobs[2], "success", 0.5)

    def ask(_open: Sequence[Sent]) -> dict[str, Phase]:
        if clock[0] > 30:
            finish(jobs[0], "error", TRACEBACK)
        return {"7_2": Phase(RUNNING), "7_1": GONE}

    returned = Watch(jobs, ask, 1.0).wait()
    assert outcomes(returned) == [
        (JobStatus.COMPLETED, "0.5"),
        (JobStatus.FAILED, f"Job #1 seed=1 failed: It was killed. Its log: {tmp_path}/1/job.out"),
        (JobStatus.FAILED, "Job #2 seed=2 failed: OSError: no space\nleft"),
    ]
    assert [each.overrides for each in returned] == [("seed=0",), ("seed=1",), ("seed=2",)]


def test_our_own_errors_are_told_whole(tmp_path, clock):
    job = sent(tmp_path, 0)
    ours = "moeprune.app.launching.submitted.JobError: "
    finish(
        job,
        "error",
        f"Traceback\nmoeprune.errors.InputError: no\n\nTraceback\n  frame\n{ours}InputError: no\nChange.\n",
    )
    (returned,) = Watch([job], lambda _open: {}, 1.0).wait()
    assert str(returned._return_value) == "Job #0 seed=0 failed: InputError: no\nChange."


def test_a_result_that_cannot_be_read_costs_no_other(tmp_path, clock):
    jobs = [sent(tmp_path, number) for number in range(2)]
    jobs[0].result.write_bytes(pickle.dumps(("success", 0.5))[:-3])
    finish(jobs[1], "success", 0.5)
    (_, told), (status, _) = outcomes(Watch(jobs, lambda _open: {}, 1000.0).wait())
    assert f"Its result {jobs[0].result} cannot be read: " in told
    assert status is JobStatus.COMPLETED


def test_a_file_system_that_fails_for_a_moment_is_waited_for(tmp_path, clock, monkeypatch):
    job, exists = sent(tmp_path, 0), Path.exists
    finish(job, "success", 0.5)

    def sometimes(path: Path) -> bool:
        if clock[0] < 10:
            raise OSError(errno.ESTALE, "stale")
        return exists(path)

    monkeypatch.setattr(Path, "exists", sometimes)
    monkeypatch.setattr(waiting.os, "listdir", lambda _folder: sometimes(tmp_path))
    assert outcomes(Watch([job], lambda _open: {"7_0": Phase(RUNNING)}, 1.0).wait()) == [(JobStatus.COMPLETED, "0.5")]


def test_a_job_that_seems_gone_for_a_moment_is_waited_for(tmp_path, clock):
    job = sent(tmp_path, 0)

    def ask(_open: Sequence[Sent]) -> dict[str, Phase]:
        if clock[0] > 20:
            finish(job, "success", "back")
        return {"7_0": GONE if clock[0] % 5 < 4 else Phase(QUEUED)}

    assert outcomes(Watch([job], ask, 1.0).wait()) == [(JobStatus.COMPLETED, "back")]


def test_a_cluster_that_does_not_answer_is_waited_for_and_told_once(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO)
    job = sent(tmp_path, 0)
    answers = [None, None, None, {"7_0": Phase(RUNNING)}, None] + [{"7_0": GONE}] * 20
    (returned,) = Watch([job], lambda _open: answers.pop(0), 1.0).wait()
    assert returned.status is JobStatus.FAILED
    told = [message for message in caplog.messages if "answer" in message]
    assert [message.split()[:3] for message in told] == [["SLURM", "does", "not"], ["SLURM", "answers", "again."]] * 2


def test_jobs_that_start_later_are_waited_for_too(tmp_path, clock):
    jobs = [sent(tmp_path, number) for number in range(3)]
    unsent = list(jobs)

    def start_more() -> list[Sent] | None:
        if not unsent:
            return None
        finish(unsent[0], "success", None)
        return [unsent.pop(0)]

    assert len(Watch([], lambda _open: {}, 1000.0).wait(start_more)) == 3


def test_it_is_told_how_many_are_where(tmp_path, clock, caplog):
    caplog.set_level(logging.INFO)
    jobs = [sent(tmp_path, number) for number in range(3)]
    finish(jobs[0], "success", None)
    phases = {"7_1": Phase(RUNNING), "7_2": Phase(QUEUED)}

    def ask(_open: Sequence[Sent]) -> dict[str, Phase]:
        return phases if clock[0] < 100 else dict.fromkeys(phases, GONE)

    Watch(jobs, ask, 1.0).wait()
    assert caplog.messages.count("1 done, 0 failed, 1 running, 1 queued") == 2


def test_a_slot_that_is_not_free_yet_ends_nothing(tmp_path, clock):
    """A job writes its result before its process ends."""
    first, second = sent(tmp_path, 0), sent(tmp_path, 1)
    finish(first, "success", 0.5)
    finish(second, "success", 0.25)
    answers = iter([[first], [], [], [second], None])
    returned = Watch([], lambda _open: {}, 1.0).wait(lambda: next(answers))
    assert outcomes(returned) == [(JobStatus.COMPLETED, "0.5"), (JobStatus.COMPLETED, "0.25")]
