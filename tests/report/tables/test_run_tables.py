"""The tables of one run, against golden Markdown."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moeprune.report.runs.results import load_metrics, load_run
from moeprune.report.runs.variants import RecoveryDetails
from moeprune.report.tables.run_tables import precision_table, recovery_facts, recovery_table, run_table, stage_table
from moeprune.report.tables.table import markdown

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def metrics(tmp_path, write_run):
    return load_run(write_run(tmp_path / "0")).metrics


def test_run_table(metrics):
    assert markdown(run_table(metrics)) == (GOLDEN / "run.md").read_text()


def test_stage_table(metrics):
    assert markdown(stage_table(metrics)) == (GOLDEN / "stages.md").read_text()


def test_precision_table(metrics):
    assert markdown(precision_table(metrics)) == (GOLDEN / "precision.md").read_text()


def test_recovery_table(tmp_path, write_run):
    metrics = load_run(write_run(tmp_path / "1", recovery="dora")).metrics
    assert markdown(recovery_table(metrics)) == (GOLDEN / "recovery.md").read_text()


@pytest.mark.parametrize(
    ("merged", "text"), [(True, "none: what trained is in the weights"), (False, "kept beside the weights")]
)
def test_what_became_of_the_adapters_is_said(tmp_path, write_run, merged, text):
    metrics = load_run(write_run(tmp_path / "1", recovery="dora")).metrics
    facts = recovery_facts(metrics, replace(metrics.recovery_details, merged=merged, seconds=0.0))
    assert facts["adapters"] == text
    assert facts["seconds"] == "0.00"


def test_a_recovery_that_says_little_is_told_in_few_rows(tmp_path, write_run):
    metrics = load_run(write_run(tmp_path / "1", recovery="dora")).metrics
    little = RecoveryDetails(1000, 10, 2.0, 500, {})
    assert list(recovery_facts(metrics, little)) == [
        "training tokens", "optimizer steps", "seconds", "trained parameters"
    ]  # fmt: skip


def test_a_run_from_before_has_neither_table_and_no_size_in_memory(metrics):
    older = replace(metrics.final, precision=(), bytes=replace(metrics.final.bytes, in_memory=None))
    older = replace(metrics, variants=(metrics.dense, older))
    assert precision_table(older) is None
    assert recovery_table(older) is None
    column = next(column for column in run_table(older).columns if column.head == "MB\nin memory")
    assert column.cells[-1].text == "-"


def test_what_pruning_removed_does_not_count_adapters_that_came_later(tmp_path, write_run):
    before, after = (write_run(tmp_path / name) for name in ("before", "after"))
    metrics = json.loads((after / "metrics.json").read_text())
    metrics["variants"][-1]["parameters"]["total"] += 10**9  # adapters beside the weights
    metrics["variants"][-1]["parameters"]["active"] += 10**9
    (after / "metrics.json").write_text(json.dumps(metrics))
    assert len(metrics["variants"]) > 2
    captions = [run_table(load_metrics(folder)).caption for folder in (before, after)]
    assert "of all parameters" in captions[0]
    assert captions[0] == captions[1]
