"""The figure that tells many methods apart."""

import json
import math
from dataclasses import replace

import pytest
from words import cut_off

from moeprune.errors import InputError
from moeprune.report.figures.methods_plot import crowded_sizes, methods_figure
from moeprune.report.figures.points import compressed
from moeprune.report.runs.results import load_sweep
from moeprune.report.runs.seeds import Spread, rows_of


def points_of(folder):
    return compressed(rows_of(load_sweep(folder)))


@pytest.fixture
def points(tmp_path, write_run):
    """Seven methods at ratio 0.5, the later the better; one at ratio 0.25."""
    for number in range(7):
        write_run(tmp_path / str(number), method=f"method_{number}", harm=7.0 - number)
    write_run(tmp_path / "7", method="method_0", ratio=0.25)
    return sorted(points_of(tmp_path), key=lambda point: -point.ratio)


def test_a_size_with_many_runs_has_a_panel_and_its_methods_are_sorted(points):
    (panel,) = methods_figure(points).axes
    assert panel.get_title() == "tiny_qwen3_moe, 50% removed, nf4"
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        f"method_{number}" for number in range(6, -1, -1)
    ]
    assert [text.get_text() for text in panel.texts][:2] == ["1.300", "1.560"]
    assert panel.yaxis_inverted()


def test_no_words_are_cut_off_at_an_edge(points):
    long = [replace(point, method=f"{point.method}_by_a_long_name", whole_experts=True) for point in points[:7]]
    figure = methods_figure([*long, *(replace(point, ratio=0.25) for point in long)])
    assert len(figure.axes) == 2
    assert cut_off(figure) == []
    assert "squares: whole experts" in figure.get_supxlabel()


def test_few_runs_need_no_such_figure(points):
    assert crowded_sizes(points[1:]) == {}
    with pytest.raises(InputError, match="no size has more than 6"):
        methods_figure(points[1:])


@pytest.mark.parametrize("perplexity", [math.inf, math.nan])
def test_a_perplexity_that_is_not_finite_stands_last_and_is_told(tmp_path, points, perplexity):
    path = tmp_path / "6" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["variants"][-1]["mean_perplexity"] = perplexity
    path.write_text(json.dumps(metrics))
    (panel,) = methods_figure(points_of(tmp_path)).axes
    assert panel.get_yticklabels()[-1].get_text() == "method_6"
    assert panel.texts[-1].get_text() == "not finite"


def test_seeds_have_a_bar_of_one_deviation(points):
    spread = [replace(point, perplexity=Spread(2.0 + number, 0.25, 3)) for number, point in enumerate(points[:7])]
    (panel,) = methods_figure(spread).axes
    (bars,) = panel.containers[0].lines[2]
    (segment,) = bars.get_segments()
    assert segment[:, 0].tolist() == pytest.approx([1.75, 2.25])


def test_a_few_recoveries_are_told_apart_with_their_seconds(tmp_path, write_run):
    for number, (recovery, harm) in enumerate((("none", 3.0), ("lora", 2.0), ("dora", 1.0))):
        write_run(tmp_path / str(number), recovery=recovery, harm=harm)
    figure = methods_figure(points_of(tmp_path))
    (panel,) = figure.axes
    names = ["recovery dora", "recovery lora", "recovery none"]
    assert [label.get_text() for label in panel.get_yticklabels()] == names
    assert [text.get_text() for text in panel.texts] == ["1.300  (400 s)", "1.560  (400 s)", "1.820"]
    assert figure.get_suptitle() == "Recoveries by perplexity (seconds of training)"
