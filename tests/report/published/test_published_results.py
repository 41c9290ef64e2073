"""The published numbers, and what is doubtful in them."""

import csv
from importlib.resources import files
from pathlib import Path

from moeprune.report.published.results import published_experiments, published_results

RESULTS = files("moeprune.resources") / "published" / "results.csv"


def found(table, model, method, ratio=None, bits=16, variant=""):
    (row,) = [
        row
        for row in published_results()
        if (row.table, row.model, row.method, row.ratio, row.bits, row.variant)
        == (table, model, method, ratio, bits, variant)
    ]
    return row


def test_every_number_of_the_file_is_read():
    lines = list(csv.DictReader(RESULTS.read_text().splitlines()))
    values = [value for row in published_results() for value in row.values.values()]
    assert len(values) == len(lines) == 729
    tables = {row.table for row in published_results()}
    numbered = {f"Tab. R{number}" for number in (4, 5, 7, 8, 9, 10, 11, 12)}
    assert tables == numbered | {
        "Tab. R6 (top-k)", "Tab. R6 (reallocation)", "abstract", "REAP README", "HEAPr README",
    }  # fmt: skip


def test_a_row_has_our_names_its_settings_and_its_numbers():
    row = found("Tab. R11", "qwen1_5_moe_a2_7b", "he_layerwise", 0.383)
    assert (row.average, row.storage_gb, row.tasks["boolq"]) == (58.44, 17.78, 64.86)
    assert list(row.tasks) == ["arc_challenge", "arc_easy", "hellaswag", "piqa", "boolq", "winogrande"]
    by_variant = {row.variant: row.settings for row in published_results() if row.variant}
    assert by_variant["m=64"] == {"model.minimum_width": "64"}
    assert by_variant["Top-k=1"] == {"model.experts_per_token": "1"}
    assert by_variant["layer loss smoothing=Sqrt (ours) -"] == {"allocator.smoothing": "sqrt"}
    assert by_variant["Metric=largest removed scores;a=256"] == {
        "allocator.reallocation": "most_score", "model.alignment": "256",
    }  # fmt: skip
    assert found("REAP README", "qwen3_30b_a3b", "reap", 0.25).values == {
        "code_average": 55.1, "multiple_choice_average": 66.5,
    }  # fmt: skip


def test_the_averages_that_are_not_the_mean_of_their_row_are_these_nine():
    wrong = {
        (row.table, row.model, row.method, row.ratio, row.variant): (row.average, round(row.mean_of_row, 2))
        for row in published_results()
        if any("not the mean" in doubt for doubt in row.doubts)
    }
    qwen, lite = "qwen1_5_moe_a2_7b", "deepseek_v2_lite"
    assert wrong == {
        ("Tab. R9", "deepseek_moe_16b", "he_layerwise", 0.25, ""): (59.7, 61.28),
        ("Tab. R9", lite, "moe_slimming", 0.5, ""): (58.67, 64.92),
        ("Tab. R6 (top-k)", qwen, "dense", 0.0, "Top-k=2"): (62.98, 60.56),
        ("Tab. R6 (top-k)", qwen, "moe_slimming", 0.5, "Top-k=2"): (58.27, 55.14),
        ("Tab. R6 (top-k)", qwen, "dense", 0.0, "Top-k=1"): (60.56, 54.84),
        ("Tab. R6 (top-k)", qwen, "moe_slimming", 0.5, "Top-k=1"): (55.15, 50.12),
        ("Tab. R6 (top-k)", lite, "dense", 0.0, "Top-k=2"): (54.84, 55.65),
        ("Tab. R6 (top-k)", lite, "dense", 0.0, "Top-k=1"): (62.23, 45.86),
        ("Tab. R6 (top-k)", lite, "moe_slimming", 0.5, "Top-k=1"): (59.08, 43.16),
    }
    averages = [row for row in published_results() if row.average is not None and row.tasks]
    for row in averages:  # all others are, to rounding
        key = (row.table, row.model, row.method, row.ratio, row.variant)
        assert key in wrong or abs(row.average - sum(row.tasks.values()) / len(row.tasks)) < 0.0151


def test_figures_that_stand_in_two_places_are_marked_in_both():
    ours = found("Tab. R9", "deepseek_v2_lite", "moe_slimming", 0.25, 4)
    assert "same figures as Tab. R9, deepseek_moe_16b Ours at 25%, 4 bits" in ours.doubts
    mone = found("Tab. R10", "deepseek_v2_lite", "mone", 0.25, 4)
    assert mone.doubts == ("same figures as Tab. R9, deepseek_v2_lite He et al. at 25%, 4 bits",)
    c_prune = found("Tab. R10", "qwen1_5_moe_a2_7b", "c_prune", 0.25, 4)
    assert c_prune.doubts == ("same figures as Tab. R11, qwen1_5_moe_a2_7b C-Prune at 25%, 16 bits",)


def test_every_row_that_the_file_calls_suspect_is_doubted_and_a_repeated_run_is_not():
    for line in csv.DictReader(RESULTS.read_text().splitlines()):
        if line["note"].startswith("suspect"):
            rows = [row for row in published_results() if row.variant == line["variant"] and row.doubts]
            assert any(row.values.get(line["metric"]) == float(line["value"]) for row in rows)
    # Tab. R4 and R8 print one run twice, under what may well be the same settings.
    assert (
        found("Tab. R4", "qwen1_5_moe_a2_7b", "moe_slimming", variant="layer loss smoothing=Sqrt (ours) -").doubts == ()
    )


def test_every_experiment_of_the_paper_is_described():
    folder = Path(__file__).parents[3] / "conf" / "experiment" / "paper"
    names = {file.stem.removesuffix("_embedded") for file in folder.glob("*.yaml")}
    assert names == set(published_experiments())


def test_every_table_that_an_experiment_names_is_there():
    tables = {row.table for row in published_results()}
    named = {table for about in published_experiments().values() for table in about.tables}
    assert named == tables
    assert all(about.title and about.question.endswith("?") for about in published_experiments().values())
