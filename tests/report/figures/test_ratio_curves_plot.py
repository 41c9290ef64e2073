"""Quality by ratio, as a figure."""

from dataclasses import replace

import pytest
from words import cut_off

from moeprune.errors import InputError
from moeprune.report.figures.points import Compressed
from moeprune.report.figures.ratio_curves_plot import ACCURACY, PERPLEXITY, has_curves, ratio_curves_figure
from moeprune.report.runs.seeds import Spread


def point(method="moe_slimming", ratio=0.5, quantizer="none", whole_experts=False, model="tiny_qwen3_moe", harm=1.0):
    perplexity = Spread(1 + harm * ratio**2, 0.02, 3)
    accuracy = Spread(-20 * harm * ratio, 1.0, 3)
    size = 8e6 * (1 - 0.8 * ratio)
    return Compressed(
        model, method, ratio, quantizer, whole_experts, False, size, 8_000_000, perplexity, accuracy
    )  # fmt: skip


@pytest.fixture
def points():
    methods = (("moe_slimming", False, 1.0), ("frequency", True, 3.0))
    return [
        point(method, ratio, quantizer, whole, harm=harm)
        for method, whole, harm in methods
        for ratio in (0.25, 0.383, 0.75)
        for quantizer in ("none", "nf4")
    ]


def test_a_panel_per_model_and_quantizer_with_a_line_per_method(points):
    other = [replace(each, model="tiny_deepseek_v2") for each in points if each.quantizer == "none"]
    figure = ratio_curves_figure([*sorted(points, key=lambda each: each.quantizer), *other], PERPLEXITY)
    assert [panel.get_title() for panel in figure.axes[:3]] == [
        "tiny_qwen3_moe", "tiny_qwen3_moe, nf4", "tiny_deepseek_v2",
    ]  # fmt: skip
    first = figure.axes[0]
    assert len(first.containers) == 2  # one line with its error bars for each method
    assert [label.get_text() for label in first.get_xticklabels()] == ["25", "38.3", "75"]
    assert first.get_ylim() == figure.axes[1].get_ylim()  # panels of one model can be compared
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["moe_slimming", "frequency"]


def test_channels_and_whole_experts_have_lines_and_marks_of_their_own(points):
    figure = ratio_curves_figure(points, PERPLEXITY)
    ours, theirs = (container.lines[0] for container in figure.axes[0].containers)
    assert ours.get_linestyle() != theirs.get_linestyle()
    assert ours.get_markerfacecolor() != theirs.get_markerfacecolor() == "white"
    assert ours.get_marker() != theirs.get_marker()


def test_error_bars_are_one_standard_deviation(points):
    figure = ratio_curves_figure(points, ACCURACY)
    (bars,) = figure.axes[0].containers[0].lines[2]
    heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert heights == pytest.approx([2.0, 2.0, 2.0])
    assert "one standard deviation over 3 seeds" in figure.legends[0].get_title().get_text()


def test_one_ratio_is_no_curve_and_nothing_is_an_error(points):
    assert has_curves(points, PERPLEXITY)
    assert not has_curves([each for each in points if each.ratio == 0.25], PERPLEXITY)
    assert not has_curves([replace(each, accuracy=None) for each in points], ACCURACY)
    with pytest.raises(InputError, match="nothing to plot"):
        ratio_curves_figure([replace(each, is_reference=True) for each in points], PERPLEXITY)


def test_a_method_has_the_same_colour_whatever_else_is_drawn(points):
    reference = replace(points[0], method="wanda_unstructured", is_reference=True)
    alone = ratio_curves_figure([reference, *points], PERPLEXITY).axes[0].containers[0].lines[0]
    assert alone.get_color() == "#D55E00"  # the second look, as in figures that show the reference


def test_of_more_quantizers_than_methods_each_has_a_line(points):
    ours = [each for each in points if each.method == "moe_slimming"]
    figure = ratio_curves_figure(ours, PERPLEXITY)
    (panel,) = figure.axes
    assert panel.get_title() == "tiny_qwen3_moe, moe_slimming"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not quantised", "nf4"]


def test_the_legend_of_many_methods_has_as_many_columns_as_fit(points):
    many = [replace(each, method=f"{each.method}_number_{number}") for number in range(8) for each in points]
    for shown in (many, [each for each in many if each.quantizer == "none"]):
        figure = ratio_curves_figure(shown, PERPLEXITY)
        assert cut_off(figure) == []
        assert len(figure.legends[0].get_texts()) == 16
        panel = figure.axes[0].get_window_extent()
        assert panel.height > 0.7 * panel.width  # the legend takes its room from none of them
