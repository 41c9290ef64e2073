"""Where jobs stand: told by manifests, processes of this machine and of others, SLURM, and the sweep's driver."""

import time
from functools import partial

import pytest
from made_sweeps import HandMadeSweep, Queue, ago, dead_process, process_elsewhere

from moeprune.app import squeue
from moeprune.app.squeue import Entry, ask_slurm
from moeprune.app.sweep_state import State, newest_sweep, read_sweep
from moeprune.errors import InputError
from moeprune.pipeline.process import Process

STAGE = {"name": "statistics", "key": "3f", "state": "computing", "since": ago(minutes=5), "waiting_for": None}
DEAD, HERE, ELSEWHERE = dead_process(), Process.this(), process_elsewhere()
RUNNING = {"status": "running", "stage": STAGE}
WAITING = {"status": "running", "stage": {**STAGE, "state": "waiting", "waiting_for": "process 12 on n1"}}
LONG_SILENT = {**RUNNING, "updated": partial(ago, minutes=17)}
FAILED = {"status": "failed", "error": {"type": "ValueError", "message": "a bug\nin two lines"}}
AGAIN = {"status": "queued", "earlier": [{"status": "killed", "error": None}, FAILED]}


@pytest.fixture
def queue(tmp_path, monkeypatch):
    return Queue(tmp_path / "bin", monkeypatch)


@pytest.fixture
def no_slurm(monkeypatch):
    monkeypatch.setattr(squeue.shutil, "which", lambda _program: None)


def only_job(sweep: HandMadeSweep, **how: bool):
    (job,) = read_sweep(sweep.folder, **how).jobs
    return job.state, job.reason


@pytest.mark.parametrize(
    ("manifest", "process", "driver", "state", "reason"),
    [
        ({"status": "success"}, DEAD, DEAD, State.SUCCESS, ""),
        (FAILED, DEAD, DEAD, State.FAILED, "ValueError: a bug"),
        ({"status": "interrupted", "error": {"type": "KeyboardInterrupt", "message": ""}}, DEAD, DEAD,
         State.INTERRUPTED, ""),
        ({"status": "timed_out"}, DEAD, DEAD, State.TIMED_OUT, ""),
        ({"status": "preempted"}, DEAD, HERE, State.PREEMPTED, "starts again"),
        ({"status": "preempted"}, DEAD, DEAD, State.KILLED, "preempted, and the driver is gone"),
        (RUNNING, HERE, DEAD, State.RUNNING, ""),
        (WAITING, HERE, DEAD, State.WAITING, "for statistics by process 12 on n1"),
        (LONG_SILENT, HERE, DEAD, State.RUNNING, ""),
        (RUNNING, DEAD, DEAD, State.KILLED, "its process is gone"),
        (WAITING, DEAD, HERE, State.KILLED, "its process is gone"),
        (RUNNING, ELSEWHERE, DEAD, State.RUNNING, ""),
        (LONG_SILENT, ELSEWHERE, DEAD, State.SILENT, "for 17 min"),
        (None, None, HERE, State.QUEUED, ""),
        (None, None, ELSEWHERE, State.QUEUED, ""),
        (None, None, DEAD, State.NEVER_STARTED, "the sweep's driver ended before its turn"),
        ({"status": "killed"}, DEAD, DEAD, State.KILLED, "ended without a word"),
        (AGAIN, DEAD, HERE, State.QUEUED, ""),
        (AGAIN, DEAD, DEAD, State.NEVER_STARTED,
         "the sweep's driver ended before its turn; before that: failed, ValueError: a bug"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_slurm")
def test_a_job_without_slurm(tmp_path, manifest, process, driver, state, reason):
    sweep = HandMadeSweep(tmp_path / "sweep", driver)
    sweep.add(manifest, by=process)
    assert only_job(sweep) == (state, reason)


@pytest.mark.parametrize(
    ("manifest", "process", "line", "state", "reason"),
    [
        (None, None, "Resources||PENDING", State.QUEUED, "Resources"),
        (None, None, "None|n1|RUNNING", State.RUNNING, "starting"),
        (None, None, "None||CANCELLED", State.NEVER_STARTED, "its SLURM job has ended (CANCELLED)"),
        (None, None, None, State.NEVER_STARTED, "its SLURM job has ended"),
        (AGAIN, DEAD, None, State.NEVER_STARTED, "its SLURM job has ended; before that: failed, ValueError: a bug"),
        ({"status": "killed"}, DEAD, "None||TIMEOUT", State.KILLED, "ended without a word (TIMEOUT)"),
        ({"status": "killed"}, DEAD, "BeginTime||PENDING", State.QUEUED, "starts again; BeginTime"),
        (RUNNING, HERE, "None|n1|RUNNING", State.RUNNING, ""),
        (RUNNING, ELSEWHERE, "None|n1|RUNNING", State.RUNNING, ""),
        (LONG_SILENT, ELSEWHERE, "None|n1|RUNNING", State.RUNNING, "silent for 17 min"),
        (RUNNING, ELSEWHERE, None, State.KILLED, "ended without a word"),
        (RUNNING, ELSEWHERE, "NonZeroExitCode|n1|NODE_FAIL", State.KILLED, "ended without a word (NODE_FAIL)"),
        (RUNNING, DEAD, "None|n1|OUT_OF_MEMORY", State.KILLED, "ended without a word (OUT_OF_MEMORY)"),
        (RUNNING, DEAD, "BeginTime||PENDING", State.QUEUED, "was stopped, starts again; BeginTime"),
        (RUNNING, DEAD, "None|n2|RUNNING", State.RUNNING, "starting again"),
        (RUNNING, DEAD, "None|n2|COMPLETING", State.RUNNING, "ending"),
        ({"status": "preempted"}, DEAD, "BeginTime||PENDING", State.PREEMPTED, "starts again; BeginTime"),
        ({"status": "preempted"}, DEAD, "None|n1|RUNNING", State.RUNNING, "starting again"),
        ({"status": "preempted"}, DEAD, None, State.KILLED, "preempted, and SLURM does not start it again"),
        (FAILED, DEAD, "None|n1|COMPLETED", State.FAILED, "ValueError: a bug"),
        (FAILED, DEAD, "BeginTime||PENDING", State.QUEUED, "starts again; BeginTime"),
        ({"status": "success"}, DEAD, "None|n1|COMPLETED", State.SUCCESS, ""),
    ],
)  # fmt: skip
def test_a_job_of_slurm(tmp_path, queue, manifest, process, line, state, reason):
    sweep = HandMadeSweep(tmp_path / "sweep")
    sweep.add(manifest, by=process, slurm_job_id="12_3")
    queue.says(*([f"12_3|{line}"] if line else []), "12_4|None|n1|RUNNING")
    assert only_job(sweep) == (state, reason)


@pytest.mark.parametrize("script", ["exit 1", "sleep 5"])
@pytest.mark.parametrize(
    ("manifest", "state"),
    [
        (None, State.SILENT),
        (LONG_SILENT, State.SILENT),
        (RUNNING, State.RUNNING),
        ({"status": "preempted"}, State.SILENT),
    ],
)
def test_a_job_of_slurm_while_slurm_gives_no_answer(tmp_path, queue, monkeypatch, script, manifest, state):
    monkeypatch.setattr(squeue, "TIMEOUT_SECONDS", 0.2)
    sweep = HandMadeSweep(tmp_path / "sweep")
    sweep.add(manifest, by=ELSEWHERE, slurm_job_id="12_3")
    queue.does(script)
    assert only_job(sweep)[0] == state


def test_an_attempt_of_before_the_job_was_submitted_again_does_not_count(tmp_path, queue):
    sweep = HandMadeSweep(tmp_path / "sweep")
    sweep.add({**FAILED, "slurm_job_id": "12_3"}, slurm_job_id="30")
    queue.says("30|Priority||PENDING")
    assert only_job(sweep) == (State.QUEUED, "Priority")


def test_a_driver_in_a_job_of_its_own_is_asked_for_at_slurm(tmp_path, queue):
    driver = Process(ELSEWHERE.host, 1, "another boot", 1.0, "99")
    sweep = HandMadeSweep(tmp_path / "sweep", driver)
    sweep.add(None)
    queue.says("99|None|n1|RUNNING")
    assert only_job(sweep)[0] is State.QUEUED
    queue.says()
    assert only_job(sweep)[0] is State.NEVER_STARTED


@pytest.mark.parametrize(("line", "state"), [("99|None|n1|RUNNING", State.RUNNING), ("", State.KILLED)])
def test_a_job_inside_its_drivers_slurm_job_lives_no_longer_than_that(tmp_path, queue, line, state):
    sweep = HandMadeSweep(tmp_path / "sweep")
    sweep.add({**RUNNING, "slurm_job_id": "99"}, by=ELSEWHERE)
    queue.says(line)
    assert only_job(sweep)[0] is state


def test_a_job_that_ends_while_it_is_looked_at_is_not_called_killed(tmp_path, queue):
    sweep = HandMadeSweep(tmp_path / "sweep")
    sweep.add(RUNNING, by=ELSEWHERE, slurm_job_id="12_3")
    manifest = sweep.folder / "0" / "manifest.json"
    queue.does(f"sed -i 's/running/success/' {manifest}")
    assert only_job(sweep)[0] is State.SUCCESS


def test_slurm_is_asked_once_for_all_and_not_for_what_is_over(tmp_path, queue):
    sweep = HandMadeSweep(tmp_path / "sweep")
    for number in range(5):
        sweep.add({"status": "success"} if number == 0 else None, slurm_job_id=f"{12 + number // 2}_{number}")
    queue.does(f'echo "$@" >> {tmp_path}/asked')
    read_sweep(sweep.folder)
    (asked,) = (tmp_path / "asked").read_text().splitlines()
    assert "--jobs=12,13,14" in asked
    for file in sweep.folder.glob("*/manifest.json"):
        file.unlink()
    only_success = HandMadeSweep(tmp_path / "other")
    only_success.add({"status": "success"}, slurm_job_id="12_0")
    (tmp_path / "asked").unlink()
    read_sweep(only_success.folder)
    assert not (tmp_path / "asked").exists()


def test_jobs_that_slurm_has_forgotten_have_no_line(queue):
    queue.does("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert ask_slurm(["12_0"]) == {}
    queue.says("12_0|None|n1|RUNNING", "12_1|(JobHeldUser)||PENDING")
    assert ask_slurm(["12_0"]) == {"12_0": Entry("RUNNING", "n1"), "12_1": Entry("PENDING", "(JobHeldUser)")}


def test_the_driver_that_asks_starts_nothing_more(tmp_path):
    sweep = HandMadeSweep(tmp_path / "sweep", HERE)
    sweep.add(None)
    assert only_job(sweep)[0] is State.QUEUED
    assert only_job(sweep, by_driver=True)[0] is State.NEVER_STARTED


def test_a_sweep_has_ended_when_its_driver_and_all_its_jobs_have(tmp_path):
    sweep = HandMadeSweep(tmp_path / "sweep", HERE)
    sweep.add({"status": "success"})
    assert not read_sweep(sweep.folder).has_ended
    assert read_sweep(sweep.folder, by_driver=True).has_ended
    sweep.add(RUNNING)
    assert not read_sweep(sweep.folder, by_driver=True).has_ended


def test_a_launcher_that_records_no_jobs_has_those_with_a_manifest(tmp_path):
    sweep = HandMadeSweep(tmp_path / "sweep")
    for number in (10, 9, 0):
        run_dir = sweep.folder / str(number)
        run_dir.mkdir()
        (run_dir / "manifest.json").write_text('{"status": "success", "overrides": ["ratio=0.5"]}')
    assert [job.job.number for job in read_sweep(sweep.folder).jobs] == [0, 9, 10]
    (sweep.folder / "sweep.json").unlink()
    found = read_sweep(sweep.folder)
    assert (found.record, found.driver_gone) == (None, None)
    assert found.jobs[0].job.overrides == ("ratio=0.5",)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"error": null}', '{"status": 3}'])
def test_a_manifest_that_cannot_be_read_is_as_none(tmp_path, text):
    sweep = HandMadeSweep(tmp_path / "sweep", HERE)
    sweep.add(RUNNING)
    (sweep.folder / "0" / "manifest.json").write_text(text)
    assert only_job(sweep)[0] is State.QUEUED


def test_a_manifest_of_an_older_version_is_read(tmp_path):
    sweep = HandMadeSweep(tmp_path / "sweep")
    sweep.add(RUNNING)
    (sweep.folder / "0" / "manifest.json").write_text(
        '{"status": "running", "error": null, "overrides": [], "pid": 7, "started": "2026-01-01T00:00:00+00:00"}'
    )
    assert only_job(sweep)[0] is State.SILENT


def test_a_folder_without_a_sweep_is_told(tmp_path):
    with pytest.raises(InputError, match="not the directory of a sweep"):
        read_sweep(tmp_path)
    with pytest.raises(InputError, match="There is no sweep under"):
        newest_sweep(tmp_path)


def test_the_newest_sweep_is_that_with_the_last_date_and_time(tmp_path):
    for name in ("2026-11-21/20-00-00-sweep", "2026-11-22/09-00-00-sweep", "2026-11-22/08-00-00-sweep"):
        HandMadeSweep(tmp_path / name)
    (tmp_path / "2026-11-23" / "10-00-00-000001").mkdir(parents=True)  # a single run
    assert newest_sweep(tmp_path) == tmp_path / "2026-11-22/09-00-00-sweep"


def test_a_sweep_whose_submission_was_refused_hides_no_other(tmp_path):
    HandMadeSweep(tmp_path / "2026-11-22/09-00-00-sweep").add({"status": "success"})
    HandMadeSweep(tmp_path / "2026-11-22/10-00-00-sweep")
    assert newest_sweep(tmp_path) == tmp_path / "2026-11-22/09-00-00-sweep"


def test_five_hundred_jobs_are_read_in_a_moment(tmp_path):
    sweep = HandMadeSweep(tmp_path / "sweep")
    for number in range(500):
        run_dir = sweep.folder / str(number)
        run_dir.mkdir()
        (run_dir / "manifest.json").write_text('{"status": "success"}')
    began = time.perf_counter()
    assert len(read_sweep(sweep.folder).those(State.SUCCESS)) == 500
    assert time.perf_counter() - began < 5  # measured 0.1 s
