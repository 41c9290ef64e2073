"""Where the time of a sweep went, against golden Markdown and sums by hand."""

import json
from pathlib import Path

import pytest

from moeprune.report.runs.results import load_sweep
from moeprune.report.tables.table import markdown
from moeprune.report.tables.times import run_times_table, stage_times_table

GOLDEN = Path(__file__).parents[1] / "golden"


def texts(table, head):
    return next([cell.text for cell in column.cells] for column in table.columns if column.head == head)


def change_stages(run_dir, change):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    change(metrics["stages"])
    (run_dir / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def sweep(tmp_path, write_run):
    """Three scorers on one statistics pass, which run 0 computed; run 2 asked for a pass of its own."""
    for number, method in enumerate(("moe_slimming", "reap", "heapr")):
        write_run(tmp_path / str(number), method=method, scorer=method)
    write_run(tmp_path / "3", error=("BudgetError", "too much"))
    change_stages(tmp_path / "0", lambda stages: stages[1].update(cached=False))
    own = {"stage": "pass/gradient", "key": "g", "cached": False, "seconds": 30.0, "peak_memory_gib": 1.0}
    change_stages(tmp_path / "2", lambda stages: stages.append(own))
    return load_sweep(tmp_path)


def test_tables_of_a_sweep(sweep):
    text = f"{markdown(stage_times_table(sweep))}\n{markdown(run_times_table(sweep))}"
    assert text == (GOLDEN / "times.md").read_text()


def test_a_shared_result_counts_once(sweep):
    table = stage_times_table(sweep)
    stages = texts(table, "stage")
    assert stages == [
        "calibration", "statistics", "calibration_report", "pass/gradient", "scores", "plan", "diagnostics", "pruned",
        "evaluation/dense", "evaluation/pruned",
    ]  # fmt: skip
    assert texts(table, "runs that\nused it") == list("3331333333")
    assert texts(table, "different\nresults") == list("1111333313")
    assert texts(table, "computed\nin this sweep") == list("0101333303")
    once = 0.04 + 9.5 + 0.5 + 30 + 3 * (0.25 + 0.5 + 0.125 + 3.25) + 8 + 3 * 4
    alone = 3 * (0.04 + 9.5 + 0.5 + 0.25 + 0.5 + 0.125 + 3.25 + 8 + 4) + 30
    assert f"Every result once: {once:.1f} seconds; each run by itself: {alone:.1f} seconds." in table.caption
    assert "3 runs used 1 statistics pass of 9.50 seconds in all" in table.caption
    assert "took 0.75 seconds (median; 0.75 to 0.75)" in table.caption


def test_each_run_says_what_it_computed_and_what_it_found(sweep):
    table = run_times_table(sweep)
    assert texts(table, "method") == ["moe_slimming", "reap", "heapr"]
    assert texts(table, "calibration,\nstatistics") == ["9.50 (0.04)", "(9.54)", "(9.54)"]
    assert texts(table, "extra\npasses") == ["-", "-", "30.00"]
    assert texts(table, "scores\n+ plan") == ["0.75", "0.75", "0.75"]
    assert texts(table, "computed\nin all") == ["17.62", "8.12", "38.12"]


def test_what_tells_runs_of_one_method_apart_is_shown(tmp_path, write_run):
    for number, ratio in enumerate((0.25, 0.5)):
        write_run(tmp_path / str(number), ratio=ratio)
    table = run_times_table(load_sweep(tmp_path))
    assert texts(table, "ratio") == ["0.25", "0.5"]
    assert texts(table, "method") == ["moe_slimming", "moe_slimming"]
