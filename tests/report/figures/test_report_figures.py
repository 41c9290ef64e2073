"""Which figures a report has, and that they are drawn the same each time."""

import json
from dataclasses import replace

import pytest

from moeprune.errors import InputError
from moeprune.report.figures.points import compressed
from moeprune.report.figures.published_plot import Pair, published_figure, published_pairs
from moeprune.report.figures.report_figures import comparison_figures, diagnostics_figures, published_figures
from moeprune.report.figures.speed_plot import has_speed, speed_figure
from moeprune.report.figures.style import write_figure
from moeprune.report.published.results import published_results
from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.seeds import Spread, rows_of


@pytest.fixture
def rows(tmp_path, write_run):
    number = 0
    for method, allocator, harm in (("moe_slimming", "coverage", 1.0), ("frequency", "whole_experts", 2.0)):
        for ratio in (0.25, 0.5):
            for seed in (0, 1):
                choices = {"method": method, "allocator": allocator, "ratio": ratio, "seed": seed}
                write_run(tmp_path / "sweep" / str(number), harm=harm + seed / 10, quantizer="none", **choices)
                number += 1
    return rows_of(load_sweep(tmp_path / "sweep"))


def test_a_sweep_over_ratios_has_curves_and_a_front_but_no_speed(tmp_path, rows):
    figures = comparison_figures(rows, tmp_path)
    assert [figure.files[0].name for figure in figures] == [
        "perplexity_by_ratio.svg", "accuracy_by_ratio.svg", "perplexity_by_size.svg",
    ]  # fmt: skip
    for figure in figures:
        svg, png = figure.files
        assert b"<svg" in svg.read_bytes()[:1000] and png.read_bytes().startswith(b"\x89PNG")
        assert figure.title and figure.caption.endswith(".")


def test_the_same_points_give_the_same_bytes(tmp_path, rows):
    points = [replace(point, prefill=Spread(1.5, 0.1, 2), decode=Spread(1.2, None, 1)) for point in compressed(rows)]
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_figure(speed_figure(points), tmp_path / name / "speed.svg")
    assert (tmp_path / "one" / "speed.svg").read_bytes() == (tmp_path / "other" / "speed.svg").read_bytes()


def test_nothing_measured_is_nothing_drawn(tmp_path, write_run):
    write_run(tmp_path / "0", error=("BudgetError", "too much"))
    assert comparison_figures(rows_of(load_sweep(tmp_path)), tmp_path) == ()


def test_diagnostics_of_a_run_are_drawn_into_the_report(tmp_path, write_run, made_up_diagnostics):
    folder, into = write_run(tmp_path / "0"), tmp_path / "figures"
    into.mkdir()
    (run,) = load_sweep(tmp_path)
    assert diagnostics_figures(run, into) == ()
    (folder / "diagnostics.json").write_text(json.dumps(made_up_diagnostics))
    before = sorted(folder.iterdir())
    titles = [figure.title for figure in diagnostics_figures(run, into)]
    assert "Router entropy: tiny_qwen3_moe" in titles and "Kept channels: tiny_qwen3_moe" in titles
    assert (into / "tiny_qwen3_moe" / "router_entropy.svg").stat().st_size > 0
    assert sorted(folder.iterdir()) == before  # a report writes nothing into a run


def test_speed_is_a_line_per_method_and_size_beside_dense(rows):
    points = compressed(rows)
    assert not has_speed(points)
    with pytest.raises(InputError, match="no run measured its speed"):
        speed_figure(points)
    measured = [replace(point, prefill=Spread(1.5, 0.1, 2), decode=Spread(1.2, None, 1)) for point in points]
    (panel,) = speed_figure(measured).axes
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert set(names) == {"moe_slimming, 25%", "moe_slimming, 50%", "frequency, 25%", "frequency, 50%"}
    assert panel.get_xlim()[0] == 0 and panel.get_xlim()[1] > 1.6


def test_published_pairs_are_of_the_same_model_and_tasks(tmp_path, write_run):
    ours = (row for row in published_results() if row.method == "moe_slimming" and row.tasks and not row.variant)
    printed = next(row for row in ours if row.ratio and row.bits == 16)
    folder = write_run(tmp_path / "0", ratio=printed.ratio, quantizer="none")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["model"] = printed.model
    for variant in metrics["variants"]:
        variant["tasks"] = {task: {"accuracy": 0.5, "stderr": 0.01, "n": 100} for task in printed.tasks}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = rows_of(load_sweep(tmp_path))
    pairs = [pair for pair in published_pairs([printed.table], rows) if "moe_slimming" in pair.name]
    assert pairs[0].model == printed.model
    assert pairs[0].published == pytest.approx(sum(printed.tasks.values()) / len(printed.tasks))
    assert pairs[0].ours.mean == pytest.approx(50)
    (figure,) = published_figures([printed.table], rows, tmp_path)
    assert figure.files[0].name == "published.svg"
    assert published_figures(["Tab. R1"], rows, tmp_path) == ()


def test_a_doubtful_published_number_is_marked():
    pairs = [Pair("m", "reap, 25%", 50.0, Spread(51.0, 0.5, 3), is_suspect=doubt) for doubt in (False, True)]
    figure = published_figure(pairs)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["reap, 25%", "reap, 25% †"]
    assert "doubtful" in figure.legends[0].get_title().get_text()
    with pytest.raises(InputError, match="nothing to plot"):
        published_figure([])
