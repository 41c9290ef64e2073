"""What the suite asks of itself."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from tqdm import tqdm


def test_no_two_test_files_have_the_same_name():
    """pytest imports them by their names alone, and refuses the second."""
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.xdist_group("kept together")
def test_tests_of_a_group_stay_on_one_worker(request):
    """With a pytest that pytest-xdist does not know, groups are ignored in silence, and what they share made again."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@kept together")


def killed_while_it_draws() -> None:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def draws() -> None:
    list(tqdm(range(2)))


def test_a_copy_of_this_process_that_is_killed_leaves_no_progress_bar_locked():
    """tqdm's own lock is one for all copies of a process, and nobody opens it for one that is dead."""
    list(tqdm(range(2)))
    for work, ends_with in ((killed_while_it_draws, -signal.SIGKILL), (draws, 0)):
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(timeout=20)
        process.kill()
        process.join()
        assert process.exitcode == ends_with
