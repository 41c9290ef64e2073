"""Grids of ratios and quantizers: what is one, its Pareto front, and what wins within a budget."""

import csv
import json
import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.report.runs.grid import Grid, GridPoint, best_within, find_grids
from moeprune.report.runs.results import load_sweep
from moeprune.report.tables.grid_tables import grid_tables, grid_takeaway, write_grid_csv
from moeprune.report.tables.table import Table

RATIOS, QUANTIZERS = (0, 0.25, 0.5), ("hqq2", "none", "nf4", "rtn8")


def texts(table: Table, head: str) -> list[str]:
    return next([cell.text for cell in column.cells] for column in table.columns if column.head == head)


@pytest.fixture
def sweep(tmp_path, write_run):
    """Two models at every ratio and quantizer."""
    for number, (model, ratio, quantizer) in enumerate(
        product(("tiny_qwen3_moe", "tiny_deepseek_v2"), RATIOS, QUANTIZERS)
    ):
        write_run(tmp_path / str(number), model=model, ratio=ratio, quantizer=quantizer)
    return tmp_path


def change_metrics(run_dir, change):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    change(metrics)
    (run_dir / "metrics.json").write_text(json.dumps(metrics))


def point(metrics, size: int, perplexity: float) -> GridPoint:
    """A run of this size and perplexity; everything else as in ``metrics``."""
    final = type(metrics.final)(
        **{
            **vars(metrics.final),
            "mean_perplexity": perplexity,
            "bytes": type(metrics.final.bytes)(size, size, size),
        }
    )
    return GridPoint(
        f"{size} {perplexity}", type(metrics)(**{**vars(metrics), "variants": (metrics.variants[0], final)})
    )


def test_each_model_has_a_grid_with_the_most_bits_first(sweep):
    grids = find_grids(load_sweep(sweep))
    assert [(grid.model, grid.method) for grid in grids] == [
        ("tiny_qwen3_moe", "moe_slimming"),
        ("tiny_deepseek_v2", "moe_slimming"),
    ]
    for grid in grids:
        assert grid.ratios == RATIOS
        assert grid.quantizers == ("none", "rtn8", "nf4", "hqq2")
        assert [grid.bits_of(quantizer) for quantizer in grid.quantizers] == [16, 8, 4, 2]
        assert [each.ratio for each in grid.of_quantizer("nf4")] == list(RATIOS)


def test_a_grid_of_few_runs_or_of_one_line_is_none(tmp_path, write_run):
    for number, ratio in enumerate(RATIOS):
        write_run(tmp_path / str(number), ratio=ratio)
    assert find_grids(load_sweep(tmp_path)) == []
    write_run(tmp_path / "3", ratio=0.25, quantizer="rtn8")
    assert find_grids(load_sweep(tmp_path)) == []  # 4 of 6 places
    write_run(tmp_path / "4", ratio=0.5, quantizer="rtn8")
    (grid,) = find_grids(load_sweep(tmp_path))
    assert (0, "rtn8") not in grid.point_of
    ppl, _, _ = grid_tables([grid])
    assert texts(ppl, "rtn8\n8 bits") == ["-", "26.70", "31.41"]


def test_runs_of_other_methods_fill_other_grids(tmp_path, write_run):
    for number, (method, ratio, quantizer) in enumerate(product(("reap", "mone"), (0.25, 0.5), ("none", "nf4"))):
        write_run(tmp_path / str(number), method=method, ratio=ratio, quantizer=quantizer)
    write_run(tmp_path / "8", method="reap", ratio=0.75, quantizer="none", removes=False)
    grids = find_grids(load_sweep(tmp_path))
    assert [(grid.method, grid.ratios) for grid in grids] == [("reap", (0.25, 0.5)), ("mone", (0.25, 0.5))]
    assert texts(grid_tables(grids)[-1], "method")[0] == "reap"


@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1.0, 2.0, 3.0, math.inf, math.nan])), min_size=1, max_size=8)
)
def test_the_front_is_what_no_other_point_beats(made_up_results, values):
    points = [point(made_up_results, size, perplexity) for size, perplexity in values]
    grid = Grid("", "", (), (), {(float(i), ""): each for i, each in enumerate(points)})
    on_front = [each in grid.front for each in points]
    for (size, perplexity), is_on in zip(values, on_front, strict=True):
        beaten = any(
            (other_size <= size and other < perplexity) or (other_size < size and other <= perplexity)
            for other_size, other in values
        )
        assert is_on == (math.isfinite(perplexity) and not beaten)
    assert [each.bytes for each in grid.front] == sorted(each.bytes for each in grid.front)


def test_within_a_budget_the_lowest_perplexity_wins_and_of_equal_ones_the_smallest(made_up_results):
    points = [point(made_up_results, *each) for each in ((10, 5.0), (20, 4.0), (15, 4.0), (30, 1.0), (5, math.nan))]
    assert best_within(points, 9) is None
    assert best_within(points, 10) is points[0]
    assert best_within(points, 29) is points[2]
    assert best_within(points, 30) is points[3]


def test_the_front_is_bold_in_both_tables(sweep):
    ppl, size = grid_tables(find_grids(load_sweep(sweep)))[:2]
    for table in (ppl, size):
        bold = {column.head: [cell.best for cell in column.cells] for column in table.columns[1:]}
        assert bold["none\n16 bits"] == [True, False, False]
        assert bold["hqq2\n2 bits"] == [True, True, True]
    assert texts(ppl, "ratio") == ["0", "0.25", "0.5"]
    assert texts(ppl, "nf4\n4 bits") == ["26.00", "27.62", "32.50"]
    assert texts(size, "nf4\n4 bits") == ["2.37", "1.89", "1.42"]
    assert "Dense: 25.00." in ppl.caption and "calibration mixed; seed 0" in ppl.caption


def test_budgets_name_the_winner_beside_pruning_and_quantisation_alone(sweep):
    grids = find_grids(load_sweep(sweep))
    budgets = grid_tables(grids)[-1]
    rows = dict(
        zip(
            texts(budgets, "within\nMB"),
            zip(*(texts(budgets, head) for head in ("best", "pruning\nalone", "quantisation\nalone")), strict=True),
            strict=True,
        )
    )
    assert rows["4.30 (2x)"] == ("0% nf4", "-", "26.00 (0% nf4)")
    assert rows["2.15 (4x)"] == ("25% nf4", "-", "500.0 (0% hqq2)")
    assert rows["1.07 (8x)"] == ("25% hqq2", "-", "-")
    assert grid_takeaway(grids[0]) == (
        "tiny_qwen3_moe, moe_slimming: 8 of 12 runs are on the Pareto front of bytes and perplexity; within 2.15 MB (4 "
        "times smaller than dense) 25% nf4 is best, with mean perplexity 27.62 (1.105 times dense); pruning alone has "
        "no run that small, quantisation alone reaches 500.0 (0% hqq2)."
    )


def test_a_grid_too_large_for_any_budget_says_only_its_front(tmp_path, write_run):
    for number, (ratio, quantizer) in enumerate(product((0, 0.25), ("none", "rtn8"))):
        write_run(tmp_path / str(number), ratio=ratio, quantizer=quantizer)
        change_metrics(
            tmp_path / str(number), lambda metrics: metrics["variants"][-1]["bytes"].update(with_overhead=8_000_000)
        )
    (grid,) = find_grids(load_sweep(tmp_path))
    assert grid.budgets() == {}
    assert grid_takeaway(grid).endswith("on the Pareto front of bytes and perplexity.")


def test_runs_from_before_precision_was_written_down_have_a_grid_too(sweep):
    for run_dir in sweep.iterdir():
        change_metrics(run_dir, lambda metrics: [variant.pop("precision") for variant in metrics["variants"]])
    grid = find_grids(load_sweep(sweep))[0]
    assert grid.quantizers == ("none", "rtn8", "nf4", "hqq2")
    assert [column.head for column in grid_tables([grid])[0].columns] == ["ratio", *grid.quantizers]


def test_the_csv_has_a_row_per_run(sweep, tmp_path):
    grids = find_grids(load_sweep(sweep))
    write_grid_csv(grids, tmp_path / "grid.csv")
    rows = list(csv.DictReader((tmp_path / "grid.csv").open(newline="")))
    assert len(rows) == 24
    found = next(row for row in rows if (row["ratio"], row["quantizer"]) == ("0.5", "nf4"))
    assert float(found["mean_perplexity"]) == 32.5
    assert int(found["bytes.with_overhead"]) == 1_419_000
    assert int(found["bytes.in_memory"]) == 2_580_000
    assert float(found["bits"]) == 4
    assert found["on_front"] == "True"
