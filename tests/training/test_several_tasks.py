"""Tasks of one job, as SLURM starts them: they train together, ignore signals, and end with the first."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import light_work
import pytest
from light_work import TASKS, OwnError, marks, together

from moeprune.errors import BudgetError, InputError, LostProcessError
from moeprune.training import meeting, tasks
from moeprune.training.meeting import Place
from moeprune.training.processes import Order
from moeprune.training.tasks import current_crew, lead, require_as_many_tasks

SECONDS = 30


def eventually(condition) -> bool:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(found)


def is_running(process: int) -> bool:
    """Also one that has ended is listed until its parent asks for its exit code."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


class Job:
    """A job of several tasks on this host; ``orders`` are what the first one has the others do."""

    def __init__(self, folder: Path, *orders, ranks=range(TASKS), restart=0) -> None:
        self.folder, self.restart = folder, restart
        (folder / "orders.pickle").write_bytes(pickle.dumps(list(orders)))
        self.tasks = {rank: self.task(rank) for rank in ranks}

    def task(self, rank: int) -> subprocess.Popen:
        variables = {
            "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(self.restart), "SLURM_STEP_NUM_TASKS": str(TASKS),
            "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b,GPU-c",
        }  # fmt: skip
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen([sys.executable, light_work.__file__, str(self.folder)], env=environment)

    def ended(self) -> list[int]:
        """Exit codes."""
        return [task.wait(SECONDS) for task in self.tasks.values()]

    def raised(self) -> list[str]:
        return json.loads((self.folder / "raised.json").read_text())

    def kill(self) -> None:
        for task in self.tasks.values():
            task.kill()
            task.wait()


@pytest.fixture
def start(tmp_path):
    """Starts jobs, and leaves nothing running."""
    jobs = []

    def start(*orders, **settings) -> Job:
        jobs.append(Job(tmp_path, *orders, **settings))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def test_each_task_takes_part_in_every_training_whatever_signals_the_job_gets(start, tmp_path):
    job = start((light_work.waits_for, tmp_path, "first"), (light_work.waits_for, tmp_path, "second"))
    assert eventually(lambda: len(marks(tmp_path, "first")) == TASKS)
    at_work = marks(tmp_path, "first")
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        for process in [*(mark["pid"] for mark in at_work), *(job.tasks[rank].pid for rank in (1, 2))]:
            os.kill(process, number)
    (tmp_path / "second.go").touch()
    time.sleep(0.3)
    assert all(is_running(mark["pid"]) for mark in at_work)
    (tmp_path / "first.go").touch()
    assert job.ended() == [0, 0, 0]
    for found in (at_work, marks(tmp_path, "second")):
        assert [mark["RANK"] for mark in found] == ["0", "1", "2"]
        assert [mark["CUDA_VISIBLE_DEVICES"] for mark in found] == ["GPU-a", "GPU-b", "GPU-c"]
        assert {(mark["WORLD_SIZE"], mark["LOCAL_RANK"], mark["MASTER_PORT"]) for mark in found} == {("3", "0", "1234")}
        assert [mark["parent"] for mark in found] == [task.pid for task in job.tasks.values()]


def cpu_ticks(process: int) -> int:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_task_that_waits_costs_nothing_and_ends_with_a_job_that_never_trains(start, tmp_path):
    (tmp_path / "hold").touch()
    job = start()
    assert eventually(lambda: list(tmp_path.glob("tasks-7-0.json")))
    time.sleep(1)
    before = [cpu_ticks(job.tasks[rank].pid) for rank in (1, 2)]
    time.sleep(1)
    assert [cpu_ticks(job.tasks[rank].pid) for rank in (1, 2)] == before
    (tmp_path / "hold").unlink()
    assert job.ended() == [0, 0, 0]
    late = job.task(1)
    assert late.wait(SECONDS) == 0


def test_a_task_ends_when_the_first_was_killed_before_it_had_an_order(start, tmp_path):
    (tmp_path / "hold").touch()
    job = start()
    assert eventually(lambda: list(tmp_path.glob("tasks-7-0.json")))
    job.tasks[0].kill()
    assert job.ended() == [-signal.SIGKILL, 0, 0]
    late = job.task(1)
    assert late.wait(SECONDS) == 0
    # The job's next start is another meeting.
    (tmp_path / "hold").unlink()
    again = start((light_work.leave_mark, tmp_path, "again"), restart=1)
    assert again.ended() == [0, 0, 0]
    assert len(marks(tmp_path, "again")) == TASKS


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGUSR2])
def test_all_end_when_task_0_ends(start, tmp_path, how):
    """Killed, or preempted as by submitit."""
    job = start((light_work.waits_for, tmp_path, "work"))
    assert eventually(lambda: len(marks(tmp_path, "work")) == TASKS)
    job.tasks[0].send_signal(how)
    first, *others = job.ended()
    assert first == (-signal.SIGKILL if how == signal.SIGKILL else 255)
    assert others == [0, 0]
    assert eventually(lambda: not any(is_running(mark["pid"]) for mark in marks(tmp_path, "work")))


@pytest.mark.parametrize("which", ["task", "its process"])
def test_the_first_fails_with_a_clear_error_when_another_task_dies(start, tmp_path, which):
    job = start((light_work.waits_for, tmp_path, "work"))
    assert eventually(lambda: len(marks(tmp_path, "work")) == TASKS)
    os.kill(job.tasks[2].pid if which == "task" else marks(tmp_path, "work")[2]["pid"], signal.SIGKILL)
    exit_codes = job.ended()
    assert exit_codes[:2] == [1, 0]
    kind, message = job.raised()
    assert kind == "LostProcessError"
    expected = "Task 2 of 3 on HOST has ended" if which == "task" else "Process 2 of 3 on HOST was killed by SIGKILL"
    assert expected.replace("HOST", os.uname().nodename) in message
    assert "the same command goes on from the last checkpoint" in message
    assert eventually(lambda: not any(is_running(mark["pid"]) for mark in marks(tmp_path, "work")))


def test_an_error_of_another_task_is_raised_by_the_first_and_ends_all(start):
    job = start((light_work.fails_in, 1, BudgetError("said in a task")))
    assert job.ended() == [1, 0, 0]
    assert job.raised() == ["BudgetError", "said in a task"]


def test_of_several_errors_the_most_telling_is_raised(tmp_path):
    """Here without other tasks: all processes are this one's."""
    with pytest.raises(LostProcessError, match=r"Process 1 of 3 .* was killed by SIGKILL"):
        together(light_work.fails_after_another, 1)
    with pytest.raises(BudgetError, match="what the user can change"):
        together(light_work.says_a_mistake_late, 2)
    with pytest.raises(InputError, match="of a plug-in"):
        together(light_work.fails_in, 0, OwnError("of a plug-in"))
    with pytest.raises(RuntimeError, match=r"(?s)Process 1 of 2 .* failed.*Traceback.*ZeroDivisionError: by zero"):
        together(light_work.fails_in, 1, ZeroDivisionError("by zero"), world=2)


def test_who_has_not_the_key_is_not_listened_to(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "ADMITTED_WITHIN_S", 1)
    first, second = (Place(rank, rank, 2, "7-0") for rank in (0, 1))
    with meeting.listening(tmp_path, first) as listener, ThreadPoolExecutor() as threads:
        (file,) = tmp_path.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        told = json.loads(file.read_text())
        # Whoever scans ports, and who takes the place of either.
        silent = socket.create_connection(("localhost", told["port"]))
        loud = socket.create_connection(("localhost", told["port"]))
        loud.send(b"GET / HTTP/1.1" * 100)
        meeting._write(tmp_path / "tasks-8-0.json", told | {"key": "00" * 32})
        wrong = threads.submit(meeting.connect, tmp_path, Place(1, 1, 2, "8-0"))
        assert listener.next_task(time.monotonic() + 2) is None
        assert wrong.result() is None
        threads.submit(meeting.connect, tmp_path, second)
        _, rank, host = listener.next_task(time.monotonic() + SECONDS)
        assert (rank, host) == (1, socket.gethostname())
        for stranger in (silent, loud):
            stranger.close()


def slurm(monkeypatch, job: str, rank: int, count: int) -> None:
    variables = {"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(count)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_tasks_that_do_not_come_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "ALL_COME_WITHIN_S", 0.1)
    monkeypatch.setattr(meeting, "ALL_COME_WITHIN_S", 0.1)
    slurm(monkeypatch, "7", 0, 3)
    with lead(tmp_path), pytest.raises(LostProcessError, match=r"some of the job's 3 tasks have not come \(1, 2\)"):
        together(light_work.leave_mark, tmp_path, "alone")
    slurm(monkeypatch, "8", 1, 3)
    with pytest.raises(LostProcessError, match="Task 1 waited 0 minutes for task 0: it has not begun"):
        meeting.connect(tmp_path, Place.of_slurm())


def test_as_many_devices_as_tasks(tmp_path, monkeypatch):
    require_as_many_tasks(4)
    slurm(monkeypatch, "7", 0, 3)
    with lead(tmp_path):
        require_as_many_tasks(3)
        with pytest.raises(InputError, match=r"devices=2 in a job of 3 tasks .*\nUse .*devices=3, or a job"):
            require_as_many_tasks(2)
    require_as_many_tasks(2)


def test_a_job_of_one_task_meets_nobody(tmp_path):
    with lead(tmp_path):
        assert current_crew() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("visible", "device", "own"),
    [(None, 1, "1"), ("", 1, ""), ("3,5", 1, "5"), ("GPU-a", 2, "GPU-a")],
)
def test_each_process_sees_its_own_gpu(visible, device, own):
    assert Order(b"", 3, 1, rank=2, device=device).environment(visible)["CUDA_VISIBLE_DEVICES"] == own


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(InputError, match="Process 2 of 3 would need one GPU more than the 2"):
        Order(b"", 3, 1, rank=2, device=2).environment("0,1")


def test_waiting_imports_nothing_heavy():
    command = "import sys, moeprune.training.tasks; print({'torch', 'numpy', 'lightning'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == "set()"


def forked_process_says_what_it_does_on(numbers) -> list:
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, pickle.dumps([signal.getsignal(number) for number in numbers]))
        os._exit(0)
    os.wait()
    return pickle.loads(os.read(read, 1000))


def test_forked_processes_leave_the_signals_of_slurm_to_the_job(tmp_path, monkeypatch):
    """Or each worker of a data loader would put the job back into the queue."""
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: sys.exit(-1)) for number in numbers]
    try:
        with lead(tmp_path):
            found = forked_process_says_what_it_does_on(numbers)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert found == [signal.SIG_IGN, signal.SIG_IGN, signal.SIG_DFL]
