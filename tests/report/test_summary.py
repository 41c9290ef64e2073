"""The reports as files."""

import csv
import io
import json
from itertools import product

import pytest
from rich.console import Console

from moeprune.report.summary import write_run_report, write_sweep_report


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


def test_the_sweep_report_writes_three_files_and_tells_where(tmp_path, write_run, console):
    write_run(tmp_path / "0", method="reap")
    write_run(tmp_path / "1", method="random", harm=3.0)
    write_run(tmp_path / "2", error=("BudgetError", "too much\nlower it"), overrides=("ratio=0.99",))
    written = write_sweep_report(tmp_path, console)
    assert [path.name for path in written] == ["sweep.md", "sweep.csv", "perplexity_vs_bytes.png"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(path.name for path in written)
    shown = console.file.getvalue()
    assert all(str(path) in shown for path in written)
    assert "reap (run 0) has the lowest" in (tmp_path / "sweep.md").read_text()
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open(newline="")))
    assert [(row["run"], row["variant"]) for row in rows] == [
        *((run, variant) for run in "01" for variant in ("dense", "pruned", "pruned+nf4")),
        ("2", ""),
    ]
    assert float(rows[2]["mean_perplexity"]) == 32.5
    assert float(rows[2]["tasks.word_order.accuracy"]) == pytest.approx(0.83)
    assert int(rows[2]["bytes.with_overhead"]) == 1_419_000
    assert rows[-1]["error"] == "BudgetError: too much\nlower it"


def test_the_csv_says_what_a_recovery_took(tmp_path, write_run, console):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", recovery="dora", quantizer="none")
    write_sweep_report(tmp_path, console)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open(newline="")))
    assert [row["recovery.training_tokens"] for row in rows] == ["", "", "", "200000", "200000"]
    assert float(rows[-1]["recovery.learning_rates.routers"]) == 1e-6
    assert rows[-1]["order"] == "prune > recover > quantize"


def test_the_report_of_a_large_sweep_tells_what_its_runs_shared(tmp_path, write_run, console):
    for number in range(7):
        write_run(tmp_path / str(number), method=f"method_{number}", scorer=f"scorer_{number}", harm=1.0 + number)
    written = write_sweep_report(tmp_path, console)
    assert [path.name for path in written] == ["sweep.md", "sweep.csv", "perplexity_vs_bytes.png", "methods.png"]
    text = (tmp_path / "sweep.md").read_text()
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == ["### Sweep of 7 runs", "### Methods", "### Where the time went", "### Time of each run"]
    shared = "7 runs used 1 statistics pass of 9.50 seconds in all"
    assert shared in text
    shown = " ".join(console.file.getvalue().split())
    assert shared in shown
    assert "Time of each run" not in shown


def test_the_report_of_a_grid_has_its_tables_and_its_picture(tmp_path, write_run, console):
    for number, (ratio, quantizer) in enumerate(product((0, 0.25, 0.5), ("none", "rtn8", "nf4"))):
        write_run(tmp_path / str(number), ratio=ratio, quantizer=quantizer)
    names = [path.name for path in write_sweep_report(tmp_path, console)]
    pictures = ["perplexity_vs_bytes.png", "pareto.png", "pareto.svg"]
    assert names == ["sweep.md", "sweep.csv", "grid.md", "grid.csv", *pictures]
    heads = [line for line in (tmp_path / "grid.md").read_text().splitlines() if line.startswith("### ")]
    assert heads == [
        "### tiny_qwen3_moe, moe_slimming: mean perplexity by ratio and quantizer",
        "### tiny_qwen3_moe, moe_slimming: MB with overhead by ratio and quantizer",
        "### Best within a budget of bytes",
    ]
    text = (tmp_path / "sweep.md").read_text()
    assert "9 runs are on the Pareto front" in text
    assert "is the only run" not in text  # each place of a grid has one run


def test_a_sweep_in_which_all_failed_is_still_reported(tmp_path, write_run, console):
    write_run(tmp_path / "0", error=("BudgetError", "too much"))
    written = write_sweep_report(tmp_path, console)
    assert [path.name for path in written] == ["sweep.md", "sweep.csv"]
    assert "failed: BudgetError: too much" in console.file.getvalue()


def test_the_run_report_writes_its_tables(tmp_path, write_run, console):
    run_dir = write_run(tmp_path / "0")
    assert write_run_report(run_dir, console) == [run_dir / "table.md"]
    text = (run_dir / "table.md").read_text()
    for part in ("| pruned+nf4 |", "### What is in how many bits", "### Stages", "| evaluation/pruned  |"):
        assert part in text
    assert "### Recovery" not in text
    assert "pruned+nf4" in console.file.getvalue()


def test_the_run_report_tells_what_the_recovery_did(tmp_path, write_run, made_up_loss_curve, console):
    run_dir = write_run(tmp_path / "0", recovery="dora")
    (run_dir / "loss_curve.jsonl").write_text("".join(f"{json.dumps(point)}\n" for point in made_up_loss_curve))
    written = write_run_report(run_dir, console)
    assert [path.name for path in written] == ["table.md", "loss_curve.png", "loss_curve.svg"]
    text = (tmp_path / "0" / "table.md").read_text()
    assert "### Recovery: tiny_qwen3_moe, dora" in text
    assert "200,000 that count in the loss" in text
    assert "order prune > recover > quantize" in text


def test_the_run_report_draws_the_diagnostics(tmp_path, write_run, made_up_diagnostics, console):
    run_dir = write_run(tmp_path / "0")
    (run_dir / "diagnostics.json").write_text(json.dumps(made_up_diagnostics))
    written = write_run_report(run_dir, console)
    assert run_dir / "kept_channels.png" in written
    assert all(path.exists() for path in written)


def test_the_report_of_a_failed_run_is_its_error(tmp_path, write_run, console):
    run_dir = write_run(tmp_path / "0", error=("BudgetError", "too much"))
    assert write_run_report(run_dir, console) == []
    assert console.file.getvalue() == "Run 0: failed: BudgetError: too much\n"
    assert not (run_dir / "table.md").exists()
