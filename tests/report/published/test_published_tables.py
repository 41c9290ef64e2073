"""Published tables beside ours."""

import json
import math

import pytest

from moeprune.report.published.join import joined, printed_rows
from moeprune.report.published.order import order_table
from moeprune.report.published.tables import published_tables
from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.seeds import rows_of

PAPER_TASKS = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "boolq", "winogrande")
QWEN = "qwen1_5_moe_a2_7b"


def cells(table, head):
    return next(list(column.cells) for column in table.columns if column.head == head)


def test_ours_stand_beside_the_published_numbers_of_the_same_model(tmp_path, write_run):
    for seed in (0, 1):
        write_run(
            tmp_path / str(seed), model=QWEN, method="mone", ratio=0.383, quantizer="none", seed=seed,
            tasks=PAPER_TASKS, harm=1.0 + seed,
        )  # fmt: skip
    write_run(tmp_path / "2", model=QWEN, method="c_prune", ratio=0.383, quantizer="nf4", tasks=PAPER_TASKS)
    overrides = (f"model={QWEN}", "method=moe_slimming", "ratio=0.25", "quantizer=none")
    write_run(tmp_path / "3", error=("OSError", "disk"), overrides=overrides)
    (table,) = published_tables(["Tab. R11"], rows_of(load_sweep(tmp_path)), tmp_path)
    printed = printed_rows("Tab. R11")
    place = next(n for n, row in enumerate(printed) if (row.method, row.ratio) == ("mone", 0.383))
    challenge = cells(table, "arc_challenge\nours / publ. / diff.")
    ours = 100 * (0.9 - 0.1 * 1.5 * 0.383)  # mean of harms 1 and 2
    assert challenge[place].text == f"{ours:.1f} / 35.5 / {ours - 35.5:+.1f}"
    assert challenge[place].number == pytest.approx(ours - 35.5)
    assert challenge[place].runs == ("0", "1")
    average = ours * sum(1 / 2**number for number in range(6)) / 6
    assert cells(table, "average\nours")[place].number == pytest.approx(average)
    assert cells(table, "difference")[place].number == pytest.approx(average - printed[place].mean_of_row)
    other_bits = next(n for n, row in enumerate(printed) if (row.method, row.ratio) == ("c_prune", 0.383))
    assert challenge[other_bits].text == "- / 34.6 / -"
    assert challenge[other_bits].note == "not among these runs"
    failed = next(n for n, row in enumerate(printed) if (row.method, row.ratio) == ("moe_slimming", 0.25))
    assert challenge[failed].note == "run 3: failed: OSError: disk"
    assert challenge[failed].runs == ("3",)


def test_on_another_model_directions_stand_beside_each_other(tmp_path, write_run):
    for number, (method, harm) in enumerate([("moe_slimming", 1.0), ("mone", 4.0), ("he_layerwise", 2.0)]):
        write_run(tmp_path / str(number), method=method, ratio=0.375, quantizer="none", harm=harm)
    rows = rows_of(load_sweep(tmp_path))
    (table,) = published_tables(["Tab. R11"], rows, tmp_path)
    printed = printed_rows("Tab. R11")
    place = next(n for n, row in enumerate(printed) if (row.method, row.ratio) == ("mone", 0.383))
    points = cells(table, "tiny_qwen3_moe\npoints")
    assert points[place].number == pytest.approx(-100 * 0.1 * 4 * 0.375 * 0.75)  # over two tasks, one half as good
    assert points[place].runs == ("1",)
    assert points[0].note == "not among these runs"
    order = order_table(["Tab. R9", "Tab. R11"], rows)  # of R9, nothing was run
    # Printed: ours 65.3, MoNE 60.5, He et al. 58.4; made up: MoNE is last.
    told = ["Tab. R11", "tiny_qwen3_moe", "2 of 3", "2 of 3"]
    assert [[cell.text for cell in column.cells] for column in order.columns] == [[text] for text in told]
    assert order_table(["Tab. R9"], rows) is None


def test_points_to_dense_are_over_the_tasks_of_the_row(tmp_path, write_run):
    write_run(tmp_path / "0", method="reap", quantizer="none")
    (table,) = published_tables(["Tab. R10"], rows_of(load_sweep(tmp_path)), tmp_path)
    assert cells(table, "average\npoints")[1].text == "-0.3"  # Wanda: 68.02 - 68.32
    assert cells(table, "times\nsmaller")[4].text == "5.12"  # 28.7 / 5.6
    doubtful = [cell for cell in cells(table, "method") if cell.text.endswith("†")]
    assert len(doubtful) == 4 and all(cell.note for cell in doubtful)
    assert not any(column.group == "tiny_qwen3_moe" for column in table.columns)  # nothing of it was run here


@pytest.mark.parametrize(("width", "matches"), [("128", True), ("64", False)])
def test_settings_are_read_from_the_runs_own_config(tmp_path, write_run, width, matches):
    folder = write_run(tmp_path / "0", model=QWEN, ratio=0.25, quantizer="nf4", tasks=PAPER_TASKS)
    (folder / "config.yaml").write_text(f"model:\n  minimum_width: {width}\n")
    rows = rows_of(load_sweep(tmp_path))
    found = [row.variant for row in printed_rows("Tab. R5") if joined(row, rows, QWEN)]
    assert found == [f"m={width}"]
    assert ("m=128" in found) is matches


def test_a_number_of_channels_is_another_setting_on_another_model(tmp_path, write_run):
    folder = write_run(tmp_path / "0", ratio=0.25, quantizer="nf4")
    (folder / "config.yaml").write_text("model:\n  minimum_width: 64\n")
    rows = rows_of(load_sweep(tmp_path))
    assert not any(joined(row, rows, "tiny_qwen3_moe") for row in printed_rows("Tab. R5"))


def test_routing_to_fewer_experts_is_another_model(tmp_path, write_run):
    settings = {"model": QWEN, "quantizer": "none", "tasks": PAPER_TASKS}
    for number, experts in enumerate((None, 1)):
        overrides = (f"model.experts_per_token={experts or 'null'}",)
        write_run(tmp_path / str(number), experts_per_token=experts, overrides=overrides, **settings)
    rows = rows_of(load_sweep(tmp_path))
    top_k = {row.variant: joined(row, rows, QWEN) for row in printed_rows("Tab. R6 (top-k)") if row.model == QWEN}
    assert top_k["Top-k=2"] is None
    assert top_k["Top-k=1"].experts_per_token == 1
    usual = next(row for row in printed_rows("Tab. R11") if (row.method, row.ratio) == ("moe_slimming", 0.5))
    assert joined(usual, rows, QWEN).experts_per_token is None


def test_a_table_of_other_numbers_is_shown_as_printed(tmp_path, write_run):
    write_run(tmp_path / "0")
    (table,) = published_tables(["Tab. R7"], rows_of(load_sweep(tmp_path)), tmp_path)
    assert [cell.text for cell in cells(table, "Total Time (h)")] == ["1.54", "26.02", "23.17"]


def test_of_several_rows_the_nearest_in_ratio_without_further_settings_counts(tmp_path, write_run):
    write_run(tmp_path / "0", method="mone", ratio=0.245, quantizer="none", harm=9.0)
    words = ("model=tiny_qwen3_moe", "method=mone", "ratio=0.25", "quantizer=none")
    write_run(
        tmp_path / "1", method="mone", quantizer="none", harm=8.0, ratio=0.25, overrides=(*words, "allocator.x=1")
    )
    write_run(tmp_path / "2", method="mone", quantizer="none", harm=1.0, ratio=0.25, overrides=words)
    (table,) = published_tables(["Tab. R11"], rows_of(load_sweep(tmp_path)), tmp_path)
    printed = printed_rows("Tab. R11")
    place = next(n for n, row in enumerate(printed) if (row.method, row.ratio) == ("mone", 0.25))
    assert cells(table, "tiny_qwen3_moe\nperplexity / dense")[place].runs == ("2",)


def test_storage_is_compared_in_the_unit_that_the_printed_number_has(tmp_path, write_run):
    write_run(tmp_path / "0", model=QWEN, method="moe_slimming", ratio=0.25, quantizer="none", tasks=PAPER_TASKS)
    (table,) = published_tables(["Tab. R11"], rows_of(load_sweep(tmp_path)), tmp_path)
    place = next(
        n for n, row in enumerate(printed_rows("Tab. R11")) if (row.method, row.ratio) == ("moe_slimming", 0.25)
    )
    assert cells(table, "storage\npublished")[place].text == "20.88 GiB"
    assert cells(table, "ours,\ncounted alike")[place].text.endswith(" GiB")


def test_a_perplexity_that_is_not_a_number_counts_as_worst_in_the_order(tmp_path, write_run):
    for number, method in enumerate(["moe_slimming", "mone", "he_layerwise"]):
        folder = write_run(tmp_path / str(number), method=method, ratio=0.375, quantizer="none", harm=1.0 + number)
        if method == "moe_slimming":  # the best in print
            metrics = json.loads((folder / "metrics.json").read_text())
            metrics["variants"][-1]["mean_perplexity"] = math.nan
            (folder / "metrics.json").write_text(json.dumps(metrics))
    order = order_table(["Tab. R11"], rows_of(load_sweep(tmp_path)))
    assert order.columns[2].cells[0].text == "1 of 3"  # only that MoNE is before He et al.
