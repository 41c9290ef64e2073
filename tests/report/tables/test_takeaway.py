"""The takeaway of a sweep."""

import json
import math
import shutil
from itertools import product

import pytest

from moeprune.report.runs.results import load_sweep
from moeprune.report.tables.sweep_table import sweep_table
from moeprune.report.tables.takeaway import takeaway


@pytest.mark.parametrize("winner", ["moe_slimming", "reap", "random"])
def test_the_takeaway_follows_the_numbers(tmp_path, write_run, winner):
    number = 0
    for ratio in (0.25, 0.5):
        for method in ("moe_slimming", "reap", "random"):
            write_run(
                tmp_path / str(number), harm=1.0 if method == winner else 2.0 + number, method=method, ratio=ratio
            )
            number += 1
    at_a_quarter, text = takeaway(load_sweep(tmp_path)).splitlines()
    assert at_a_quarter.startswith(f"tiny_qwen3_moe at ratio 0.25 with quantizer nf4: {winner} (run ")
    assert text.startswith(f"tiny_qwen3_moe at ratio 0.5 with quantizer nf4: {winner} (run ")
    assert "has the lowest mean perplexity of 3 runs, 32.50 (1.300 times dense)" in text
    assert "takes 1.42 MB with overhead against 8.60 MB dense (6.06 times smaller)" in text


def test_the_takeaway_compares_at_every_setting_on_its_own(tmp_path, write_run):
    write_run(tmp_path / "0", method="reap", ratio=0.25)
    write_run(tmp_path / "1", method="random", ratio=0.25, harm=2.0)
    write_run(tmp_path / "2", method="reap", ratio=0.75)
    quarter, three_quarters = takeaway(load_sweep(tmp_path)).splitlines()
    assert three_quarters.startswith("tiny_qwen3_moe at ratio 0.75 with quantizer nf4: reap (run 2) is the only run")
    assert quarter == (
        "tiny_qwen3_moe at ratio 0.25 with quantizer nf4: reap (run 0) has the lowest mean perplexity of 2 runs, 27.62 "
        "(1.105 times dense); random (run 1) follows with 29.25 (5.9% higher). "
        "reap (run 0) takes 1.89 MB with overhead against 8.60 MB dense (4.55 times smaller)."
    )


def test_of_many_rivals_the_best_three_are_named(tmp_path, write_run):
    for number in range(8):
        write_run(tmp_path / str(number), method=f"method_{number}", harm=8.0 - number)
    (text,) = takeaway(load_sweep(tmp_path)).splitlines()
    assert "method_7 (run 7) has the lowest mean perplexity of 8 runs, 32.50 (1.300 times dense)" in text
    assert (
        "method_6 (run 6) follows with 39.00 (20.0% higher), then method_5 (run 5) with 45.50 (40.0% higher), " in text
    )
    assert "and method_0 (run 0) is last" in text


def test_a_run_that_removes_no_channels_competes_with_none(tmp_path, write_run):
    write_run(tmp_path / "0", method="reap")
    write_run(tmp_path / "1", method="random", harm=2.0)
    write_run(tmp_path / "2", method="wanda_unstructured", harm=0.1, removes=False)
    compared, left_out = takeaway(load_sweep(tmp_path)).splitlines()
    assert "reap (run 0) has the lowest mean perplexity of 2 runs" in compared
    assert left_out == ("Not compared, for they remove no channels: wanda_unstructured (run 2).")
    column = next(column for column in sweep_table(load_sweep(tmp_path)).columns if "mean" in column.head)
    assert [cell.best for cell in column.cells] == [False, True, False, False]


def test_the_takeaway_of_one_run_claims_no_rank(tmp_path, write_run):
    write_run(tmp_path / "0", method=None, quantizer="none")
    assert takeaway(load_sweep(tmp_path)) == (
        "tiny_qwen3_moe at ratio 0.5 without quantizer: attribution + coverage (run 0) is the only run, with mean "
        "perplexity 31.25 (1.250 times dense). attribution + coverage (run 0) takes 5.68 MB with overhead against "
        "8.60 MB dense (1.52 times smaller)."
    )


def test_the_takeaway_tells_ties_infinities_and_unfinished_runs(tmp_path, write_run):
    for number, method in enumerate(("reap", "random", "frequency")):
        write_run(tmp_path / str(number), method=method)
    write_run(tmp_path / "3", error=("BudgetError", "too much"))
    assert "all 3 runs have the same mean perplexity, 32.50" in takeaway(load_sweep(tmp_path))
    metrics = json.loads((tmp_path / "2" / "metrics.json").read_text())
    metrics["variants"][-1]["mean_perplexity"] = math.nan
    (tmp_path / "2" / "metrics.json").write_text(json.dumps(metrics))
    text = takeaway(load_sweep(tmp_path))
    assert "reap (run 0) and random (run 1) share the lowest mean perplexity of 3 runs, 32.50" in text
    assert "frequency (run 2) follows with one that is not finite" in text
    assert text.endswith("Not compared, for want of results: run 3 (failed).")


def test_what_varies_beside_the_method_is_named(tmp_path, write_run):
    write_run(tmp_path / "0", scorer="wanda", recovery="none")
    write_run(tmp_path / "1", scorer="attribution", recovery="dora", harm=2.0)
    text = takeaway(load_sweep(tmp_path))
    assert "moe_slimming (wanda + coverage), recovery none (run 0) has the lowest" in text
    assert "moe_slimming (attribution + coverage), recovery dora (run 1) follows" in text


def test_recoveries_of_one_way_of_pruning_go_by_their_own_names(tmp_path, write_run):
    write_run(tmp_path / "0", recovery="dora")
    write_run(tmp_path / "1", harm=3.0)
    write_run(tmp_path / "2", surgery="refit", harm=2.0)
    text = takeaway(load_sweep(tmp_path))
    assert "nf4: recovery dora (run 0) has the lowest" in text
    assert "surgery refit, recovery none (run 2) follows" in text
    assert "and recovery none (run 1) is last" in text


def test_surgery_is_part_of_what_a_method_bundles(tmp_path, write_run):
    write_run(tmp_path / "0", method=None, scorer="reap", surgery="refit")
    write_run(tmp_path / "1", method=None, scorer="reap", surgery="none", harm=2.0)
    write_run(tmp_path / "2", method="mone", surgery="constant", harm=3.0)
    text = takeaway(load_sweep(tmp_path))
    assert "reap + coverage + refit (run 0) has the lowest" in text
    assert "reap + coverage (run 1) follows" in text
    assert "mone (run 2) is last" in text


def test_ratios_and_quantizers_under_one_budget_of_bytes_are_compared(tmp_path, write_run):
    sizes = {"rtn8": (0.75, 1_500_000), "nf4": (0.5, 1_490_000), "gptq3": (0.25, 1_480_000)}
    for number, (quantizer, (ratio, size)) in enumerate(sizes.items()):
        run_dir = write_run(tmp_path / str(number), quantizer=quantizer, ratio=ratio)
        metrics = json.loads((run_dir / "metrics.json").read_text())
        metrics["variants"][-1]["bytes"]["with_overhead"] = size
        (run_dir / "metrics.json").write_text(json.dumps(metrics))
    assert takeaway(load_sweep(tmp_path)) == (
        "tiny_qwen3_moe in 1.48 to 1.50 MB: 50% nf4 (run 1) has the lowest mean perplexity of 3 runs, 32.50 (1.300 "
        "times dense); 25% gptq3 (run 2) follows with 33.20 (2.2% higher), and 75% rtn8 (run 0) is last with 39.26 "
        "(20.8% higher). 50% nf4 (run 1) takes 1.49 MB with overhead against 8.60 MB dense (5.77 times smaller)."
    )


def test_single_runs_of_other_sizes_are_not_compared(tmp_path, write_run):
    write_run(tmp_path / "0", quantizer="rtn8")
    write_run(tmp_path / "1", quantizer="nf4")
    assert takeaway(load_sweep(tmp_path)).count("is the only run") == 2


def test_what_holds_at_many_ratios_is_said_once(tmp_path, write_run):
    harms = {"reap": 1.0, "mone": 2.0, "random": 4.0}
    for number, (ratio, method, seed) in enumerate(product((0.25, 0.5, 0.75), harms, (0, 1))):
        write_run(tmp_path / str(number), harm=harms[method], method=method, ratio=ratio, seed=seed, quantizer="none")
    (text,) = takeaway(load_sweep(tmp_path)).splitlines()
    assert text == (
        "tiny_qwen3_moe without quantizer, at ratios 0.25, 0.5 and 0.75: reap has the lowest mean perplexity of 3 rows "
        "(means of 2 runs) at each, 1.062, 1.250 and 1.562 times dense; mone follows with 1.059, 1.200 and 1.360 times "
        "as much, and random is last with 1.176, 1.600 and 2.080 times as much."
    )
    for seed in (0, 1):  # the last is now the first, at one of the ratios
        shutil.rmtree(tmp_path / f"{16 + seed}")
        write_run(tmp_path / f"{16 + seed}", harm=0.5, method="random", ratio=0.75, seed=seed, quantizer="none")
    assert [line.partition(":")[0] for line in takeaway(load_sweep(tmp_path)).splitlines()] == [
        f"tiny_qwen3_moe at ratio {ratio} without quantizer" for ratio in (0.25, 0.5, 0.75)
    ]


def test_models_of_other_numbers_of_experts_per_token_are_no_entrants_of_one_size(tmp_path, write_run):
    for number, experts in enumerate((None, 2, 1)):
        folder = write_run(tmp_path / str(number), quantizer="none", harm=1.0 + number)
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({**metrics, "experts_per_token": experts}))
    lines = takeaway(load_sweep(tmp_path)).splitlines()
    assert len(lines) == 3 and all("is the only run" in line for line in lines)
    assert "with 2 experts per token" in lines[1] and "with 1 expert per token" in lines[2]
