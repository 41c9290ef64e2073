"""Runs that differ in their seed alone become one row."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.report.runs.measures import MEAN_PERPLEXITY, accuracy
from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.seeds import distinct, rows_of, spread
from moeprune.report.tables.seed_table import seed_table


def texts(table, head):
    return next([cell.text for cell in column.cells] for column in table.columns if column.head == head)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6))
def test_spread_is_mean_and_sample_deviation(values):
    found = spread(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.std == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_one_value_has_no_deviation_and_infinity_stays():
    assert (spread([3.0]).mean, spread([3.0]).std) == (3.0, None)
    assert (spread([1.0, math.inf]).mean, spread([1.0, math.inf]).std) == (math.inf, None)


def test_seeds_are_one_row_and_everything_else_is_its_own(tmp_path, write_run):
    number = 0
    for method in ("reap", "mone"):
        for quantizer in ("none", "nf4"):
            for seed in (2, 0, 1):
                harm = (1.0 if method == "reap" else 2.0) + 0.1 * seed
                write_run(tmp_path / str(number), method=method, quantizer=quantizer, seed=seed, harm=harm)
                number += 1
    rows = rows_of(load_sweep(tmp_path))
    assert [(row.method, row.quantizer) for row in rows] == [
        ("dense", "none"), ("reap", "none"), ("mone", "none"), ("reap", "nf4"), ("mone", "nf4"),
    ]  # fmt: skip
    assert [row.seeds for row in rows[1:]] == [(0, 1, 2)] * 4
    found = rows[1].spread(MEAN_PERPLEXITY.of)
    values = [25 * (1 + harm * 0.25) for harm in (1.0, 1.1, 1.2)]
    assert (found.mean, found.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert rows[0].spread(MEAN_PERPLEXITY.of).n == 1  # every run measured the same dense model
    table = seed_table("T", rows, tmp_path)
    assert texts(table, "n") == ["-", "3", "3", "3", "3"]
    assert texts(table, "mean\nperplexity")[1] == "31.88 ± 0.62"
    assert texts(table, "word_order\n%") == [
        "90.0 ± 2.0", "84.5 ± 0.5", "79.5 ± 0.5", "82.5 ± 0.5", "77.5 ± 0.5",
    ]  # fmt: skip
    best = next(column for column in table.columns if column.head == "perplexity\n/ dense")
    assert [cell.best for cell in best.cells] == [False, True, False, True, False]
    assert best.cells[1].runs == ("1", "2", "0")
    assert best.cells[1].number == pytest.approx(np.mean(values) / 25)


def test_a_single_run_shows_the_standard_error_of_its_tasks(tmp_path, write_run):
    write_run(tmp_path / "0")
    table = seed_table("T", rows_of(load_sweep(tmp_path)), tmp_path)
    assert texts(table, "word_order\n%") == ["90.0 ± 2.0", "83.0 ± 2.0"]
    assert texts(table, "average\n%") == ["67.5", "62.2"]
    assert "n" not in [column.head for column in table.columns]


def test_a_task_without_a_standard_error_shows_its_accuracy_alone(tmp_path, write_run):
    folder = write_run(tmp_path / "0")
    metrics = json.loads((folder / "metrics.json").read_text())
    for variant in metrics["variants"]:
        variant["tasks"]["word_order"]["stderr"] = None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert texts(seed_table("T", rows_of(load_sweep(tmp_path)), tmp_path), "word_order\n%") == ["90.0", "83.0"]


def test_second_best_is_marked_among_three(tmp_path, write_run):
    for number, harm in enumerate((2.0, 1.0, 3.0)):
        write_run(tmp_path / str(number), method=f"method_{number}", harm=harm)
    table = seed_table("T", rows_of(load_sweep(tmp_path)), tmp_path)
    column = next(column for column in table.columns if column.head == "mean\nperplexity")
    assert [(cell.best, cell.second) for cell in column.cells] == [
        (False, False), (False, True), (True, False), (False, False),
    ]  # fmt: skip


def test_an_unfinished_run_is_missing_with_its_reason_and_a_row_without_results_says_why(tmp_path, write_run):
    overrides = ("model=tiny_qwen3_moe", "ratio=0.5", "quantizer=nf4")
    for seed in (0, 1):
        write_run(tmp_path / str(seed), method="reap", seed=seed, overrides=(*overrides, "method=reap", f"seed={seed}"))
    error = ("BudgetError", "too much\nLower it.")
    write_run(tmp_path / "2", error=error, overrides=(*overrides, "method=reap", "seed=2"))
    write_run(tmp_path / "3", error=error, overrides=(*overrides, "method=mone", "seed=0"))
    rows = rows_of(load_sweep(tmp_path))
    assert [(row.method, row.seeds, len(row.unfinished)) for row in rows[1:]] == [("reap", (0, 1), 1), ("mone", (), 1)]
    table = seed_table("T", rows, tmp_path)
    count = next(column for column in table.columns if column.head == "n")
    assert [cell.text for cell in count.cells] == ["-", "2", "0"]
    assert count.cells[1].note == "run 2: failed: BudgetError: too much"
    mean = next(column for column in table.columns if column.head == "mean\nperplexity")
    assert (mean.cells[2].text, mean.cells[2].note) == ("-", "run 3: failed: BudgetError: too much")


def test_what_is_not_known_of_an_unfinished_run_does_not_part_it_from_its_row(tmp_path, write_run):
    write_run(tmp_path / "0", method="reap", overrides=("method=reap", "seed=0"))
    write_run(tmp_path / "1", error=("OSError", "disk"), overrides=("method=reap", "seed=1"))
    rows = rows_of(load_sweep(tmp_path))
    assert [(row.method, len(row.runs), len(row.unfinished)) for row in rows] == [("dense", 1, 0), ("reap", 1, 1)]


def test_a_run_that_was_started_again_counts_once(tmp_path, write_run):
    for name, when, harm in (("a", "2025-01-01", 1.0), ("b", "2025-01-03", 2.0), ("c", "2025-01-02", 3.0)):
        folder = write_run(tmp_path / name, harm=harm, overrides=("tracking=none",) if name == "b" else ())
        manifest = json.loads((folder / "manifest.json").read_text()) | {"updated": when}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    write_run(tmp_path / "d", seed=1)
    failed = write_run(tmp_path / "e", error=("OSError", "disk"), overrides=("method=moe_slimming",))
    kept, replaced = distinct(load_sweep(tmp_path))
    assert [run.name for run in kept] == ["b", "d", "e"]
    assert [run.name for run in replaced] == ["a", "c"]
    (failed / ".hydra").mkdir()
    (failed / ".hydra" / "config.yaml").write_text("ratio: 0.5\nseed: 1\n")
    choices = {
        "model": "tiny_qwen3_moe", "method": "moe_slimming", "scorer": "attribution", "allocator": "coverage",
        "surgery": "none", "quantizer": "nf4", "calibration": "mixed", "recovery": "none",
    }  # fmt: skip
    (failed / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices}}}))
    kept, replaced = distinct(load_sweep(tmp_path))  # now it is known to be an attempt at what d finished
    assert [run.name for run in kept] == ["b", "d"]


def test_experts_per_token_has_a_dense_row_of_its_own(tmp_path, write_run):
    for number, experts in enumerate((None, 1)):
        overrides = (f"model.experts_per_token={experts or 'null'}",)
        write_run(tmp_path / str(number), experts_per_token=experts, overrides=overrides)
    rows = rows_of(load_sweep(tmp_path))
    assert [(row.experts_per_token, row.method) for row in rows] == [
        (None, "dense"), (None, "moe_slimming"), (1, "dense"), (1, "moe_slimming"),
    ]  # fmt: skip
    assert texts(seed_table("T", rows, tmp_path), "experts\nper token") == ["default", "default", "1", "1"]


def test_a_task_that_some_runs_lack_is_said_to_be_not_measured(tmp_path, write_run):
    write_run(tmp_path / "0", method="reap")
    write_run(tmp_path / "1", method="mone", tasks=("word_order",))
    rows = rows_of(load_sweep(tmp_path))
    assert rows[2].spread(accuracy("arithmetic").of) is None
    column = seed_table("T", rows, tmp_path).columns[-1]
    assert column.head == "arithmetic\n%"
    assert (column.cells[2].text, column.cells[2].note) == ("-", "not measured in these runs")


def test_costs_of_recoveries_speed_and_how_tasks_were_scored_are_told(tmp_path, write_run):
    speeds = {"dense": (100.0, 10.0), "pruned": (150.0, 12.0)}
    for seed in (0, 1):
        folder = write_run(tmp_path / str(seed), recovery="dora", quantizer="none", seed=seed)
        metrics = json.loads((folder / "metrics.json").read_text())
        for variant in metrics["variants"]:
            prefill, decode = (value * (1 + seed) for value in speeds[variant["name"]])
            variant["speed"] = {
                "prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode + seed, "batch_size": 1,
                "prompt_tokens": 8, "new_tokens": 4, "repeats": 3, "device": "cpu",
            }  # fmt: skip
            variant["tasks"]["word_order"] |= {"metric": "acc,none", "fewshot": 0}
            variant["tasks"]["arithmetic"] |= {"metric": "exact_match,strict", "fewshot": 5}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    table = seed_table("T", rows_of(load_sweep(tmp_path)), tmp_path)
    assert texts(table, "training\ntokens") == ["-", "200,000"]
    assert texts(table, "recovery\nseconds") == ["-", "400"]
    assert texts(table, "prefill\n/ dense") == ["1.00", "1.50 ± 0.00"]
    assert texts(table, "decode\n/ dense") == ["1.00", "1.20 ± 0.01"]  # 12 / 10 and 25 / 21
    assert "Solved examples shown first: arithmetic 5." in table.group_captions["tasks"]
    assert "Scored by word_order acc,none, arithmetic exact_match,strict." in table.group_captions["tasks"]


def measured_otherwise(folder, factor):
    """As if another evaluation had been chosen: more tokens, other perplexities."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["evaluation"] = "longer"
    for variant in metrics["variants"]:
        variant["mean_perplexity"] *= factor
        variant["perplexity_tokens"] = {name: 4 * count for name, count in variant["perplexity_tokens"].items()}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_runs_that_measured_something_else_share_no_row_and_no_dense_model(tmp_path, write_run):
    for seed in (0, 1, 2):
        write_run(tmp_path / str(seed), seed=seed, quantizer="none")
        measured_otherwise(write_run(tmp_path / str(3 + seed), seed=seed, quantizer="none"), 1.3)
    runs = load_sweep(tmp_path)
    assert distinct(runs) == (list(runs), [])
    rows = rows_of(runs)
    assert [(row.is_dense, len(row.runs)) for row in rows] == [(True, 3), (False, 3), (True, 3), (False, 3)]
    assert rows[1].rivals != rows[3].rivals
    table = seed_table("T", rows, tmp_path)
    assert texts(table, "mean\nperplexity")[::2] == ["25.00", "32.50"]
    assert texts(table, "evaluation")[0] != texts(table, "evaluation")[2]


def test_the_average_is_over_the_tasks_of_the_rows_own_model(tmp_path, write_run):
    write_run(tmp_path / "0", quantizer="none")
    write_run(tmp_path / "1", quantizer="none", model="tiny_deepseek_v2", tasks=("piqa", "boolq", "mmlu"))
    table = seed_table("T", rows_of(load_sweep(tmp_path)), tmp_path)
    averages = texts(table, "average\n%")
    assert averages[0] == "67.5" and averages[2] == "52.5"  # (90 + 45) / 2; (90 + 45 + 22.5) / 3
