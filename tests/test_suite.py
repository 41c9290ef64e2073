"""What the suite asks of itself."""

import os
from pathlib import Path

import pytest


def test_no_two_test_files_have_the_same_name():
    """pytest imports them by their names alone, and refuses the second."""
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.xdist_group("kept together")
def test_tests_of_a_group_stay_on_one_worker(request):
    """With a pytest that pytest-xdist does not know, groups are ignored in silence, and what they share made again."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@kept together")
