"""The tables of one run, against golden Markdown."""

from pathlib import Path

import pytest

from moeprune.report.results import load_run
from moeprune.report.run_tables import run_table, stage_table
from moeprune.report.tables import markdown

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def metrics(tmp_path, write_run):
    return load_run(write_run(tmp_path / "0")).metrics


def test_run_table(metrics):
    assert markdown(run_table(metrics)) == (GOLDEN / "run.md").read_text()


def test_stage_table(metrics):
    assert markdown(stage_table(metrics)) == (GOLDEN / "stages.md").read_text()
