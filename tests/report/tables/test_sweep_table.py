"""The table of a sweep, against golden Markdown."""

import json
from pathlib import Path

from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.settings import run_labels
from moeprune.report.tables.sweep_table import methods_table, sweep_table
from moeprune.report.tables.table import Table, markdown

GOLDEN = Path(__file__).parents[1] / "golden"


def texts(table: Table, head: str) -> list[str]:
    return next([cell.text for cell in column.cells] for column in table.columns if column.head == head)


def best(table: Table, head: str) -> list[str]:
    return next([cell.text for cell in column.cells if cell.best] for column in table.columns if column.head == head)


def test_sweep_with_a_failed_run(tmp_path, write_run):
    for number, (method, ratio) in enumerate([("reap", 0.25), ("reap", 0.5), ("random", 0.25), ("random", 0.5)]):
        write_run(tmp_path / str(number), harm=5.0 if method == "random" else 1.0, method=method, ratio=ratio)
    error = ("BudgetError", "ratio 0.99 leaves 3 experts, top-k needs 4.\nLower the ratio.")
    write_run(tmp_path / "4", error=error, overrides=("method=reap", "ratio=0.99"))
    assert markdown(sweep_table(load_sweep(tmp_path))) == (GOLDEN / "sweep.md").read_text()


def test_sweep_of_one_run(tmp_path, write_run):
    write_run(tmp_path / "0")
    assert markdown(sweep_table(load_sweep(tmp_path))) == (GOLDEN / "sweep_of_one_run.md").read_text()


def test_each_model_has_its_dense_row_and_its_own_best(tmp_path, write_run):
    for number, model in enumerate(["tiny_qwen3_moe", "tiny_deepseek_v2"] * 2):
        write_run(tmp_path / str(number), model=model, method=f"method_{number}", harm=1.0 + number)
    table = sweep_table(load_sweep(tmp_path))
    assert texts(table, "run") == ["dense", "0", "2", "dense", "1", "3"]
    assert texts(table, "model") == ["tiny_qwen3_moe"] * 3 + ["tiny_deepseek_v2"] * 3
    assert best(table, "mean\nperplexity") == ["32.50", "39.00"]
    assert best(table, "word_order\n%") == ["83.0 ± 2.0", "78.0 ± 2.0"]
    assert best(table, "MB with\noverhead") == []


def test_values_that_read_the_same_are_all_best(tmp_path, write_run):
    for number, harm in enumerate((1.0, 1.0001, 2.0)):
        write_run(tmp_path / str(number), harm=harm, seed=number)
    assert best(sweep_table(load_sweep(tmp_path)), "mean\nperplexity") == ["32.50", "32.50"]


def test_overrides_that_vary_are_columns(tmp_path, write_run):
    write_run(tmp_path / "0", overrides=("ratio=0.5", "allocator.step=0.10", "tracking=none"))
    write_run(tmp_path / "1", overrides=("ratio=0.50", "tracking=none"))
    table = sweep_table(load_sweep(tmp_path))
    assert texts(table, "allocator.step") == ["-", "0.1", "default"]
    assert [column.head for column in table.columns[:3]] == ["run", "allocator.step", "mean\nperplexity"]


def test_a_ratio_found_for_a_target_in_bytes_is_shown_in_few_digits(tmp_path, write_run):
    for number, ratio in enumerate([0.6705729166666667, 0]):
        write_run(tmp_path / str(number), ratio=ratio)
    assert "0.6706" in texts(sweep_table(load_sweep(tmp_path)), "ratio")


def test_runs_that_ended_otherwise_say_how(tmp_path, write_run):
    for name in ("0", "1"):
        write_run(tmp_path / name)
    (tmp_path / "0" / "metrics.json").unlink()
    (tmp_path / "1" / "manifest.json").write_text(json.dumps({"status": "running", "error": None}))
    table = sweep_table(load_sweep(tmp_path))
    assert texts(table, "status") == ["success, no metrics.json", "running"]
    assert texts(table, "mean\nperplexity") == ["-", "-"]


def test_dense_measured_differently_is_told(tmp_path, write_run):
    for name in ("0", "1"):
        write_run(tmp_path / name)
    metrics = json.loads((tmp_path / "1" / "metrics.json").read_text())
    metrics["variants"][0]["mean_perplexity"] = 26.0
    (tmp_path / "1" / "metrics.json").write_text(json.dumps(metrics))
    table = sweep_table(load_sweep(tmp_path))
    assert "Dense tiny_qwen3_moe measured 25.00 to 26.00" in table.caption
    assert texts(table, "perplexity\n/ dense") == ["1.000", "1.300", "1.250"]


def test_methods_of_one_meaning_each_are_explained_in_a_table_of_their_own(tmp_path, write_run):
    write_run(tmp_path / "0", method="reap", scorer="reap", allocator="whole_experts")
    write_run(tmp_path / "1", method="mone", scorer="mone", allocator="whole_experts", surgery="constant")
    write_run(tmp_path / "2", error=("BudgetError", "too much"), overrides=("method=camera",))
    runs = load_sweep(tmp_path)
    heads = [column.head for column in sweep_table(runs).columns]
    assert "method" in heads and not {"scorer", "allocator", "surgery"} & set(heads)
    methods = methods_table(runs)
    assert [column.head for column in methods.columns] == ["method", "scorer", "surgery"]
    assert texts(methods, "scorer") == ["reap", "mone"]
    assert texts(methods, "surgery") == ["none", "constant"]


def test_a_method_run_with_two_scorers_keeps_the_column(tmp_path, write_run):
    write_run(tmp_path / "0", method="reap", scorer="reap")
    write_run(tmp_path / "1", method="reap", scorer="ean")
    write_run(tmp_path / "2", method="mone", scorer="mone")
    runs = load_sweep(tmp_path)
    assert texts(sweep_table(runs), "scorer") == ["-", "reap", "ean", "mone"]
    assert methods_table(runs) is None


def test_what_recoveries_cost_has_columns_and_order_is_told_where_it_matters(tmp_path, write_run):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", recovery="dora")
    write_run(tmp_path / "2", recovery="dora", order=["prune", "quantize", "recover"])
    write_run(tmp_path / "3", error=("ValueError", "no"), overrides=("recovery=dora", "order=[prune,quantize,recover]"))
    table = sweep_table(load_sweep(tmp_path))
    assert texts(table, "recovery") == ["-", "none", "dora", "dora", "dora"]
    usual, other = "prune > recover > quantize", "prune > quantize > recover"
    assert texts(table, "order") == ["-", usual, usual, other, other]
    assert texts(table, "training\ntokens") == ["-", "-", "200,000", "200,000", "-"]
    assert texts(table, "recovery\nseconds") == ["-", "-", "400.0", "400.0", "-"]
    assert texts(table, "trained\nparameters") == ["-", "-", "0.13M", "0.13M", "-"]


def test_training_data_are_told_of_runs_that_were_trained(tmp_path, write_run):
    write_run(tmp_path / "0")
    write_run(tmp_path / "1", recovery="dora", training_data="alpaca")
    table = sweep_table(load_sweep(tmp_path))
    assert "training_data" not in [column.head for column in table.columns]
    assert "training_data alpaca" in table.caption
    write_run(tmp_path / "2", recovery="dora")
    table = sweep_table(load_sweep(tmp_path))
    assert texts(table, "training_data") == ["-", "-", "alpaca", "embedded"]
    assert run_labels(load_sweep(tmp_path)) == [
        "recovery none",
        "recovery dora, training_data alpaca",
        "recovery dora, training_data embedded",
    ]


def test_the_caption_says_the_order_only_where_stages_could_be_swapped(tmp_path, write_run):
    write_run(tmp_path / "quantized" / "0")
    write_run(tmp_path / "both" / "0", recovery="dora")
    assert "order" not in sweep_table(load_sweep(tmp_path / "quantized")).caption
    assert "order prune > recover > quantize" in sweep_table(load_sweep(tmp_path / "both")).caption


def test_quantizers_are_not_rivals_of_each_other(tmp_path, write_run):
    for number, (quantizer, harm) in enumerate([("none", 1.0), ("none", 2.0), ("nf4", 1.0), ("nf4", 2.0)]):
        write_run(tmp_path / str(number), quantizer=quantizer, method=f"method_{harm}", harm=harm)
    assert best(sweep_table(load_sweep(tmp_path)), "mean\nperplexity") == ["31.25", "32.50"]
