"""The figure of perplexity against size."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
from words import cut_off

from moeprune.errors import InputError
from moeprune.report.figures.front_plot import front_figure
from moeprune.report.figures.points import Compressed
from moeprune.report.runs.seeds import Spread


@pytest.fixture(scope="module")
def points():
    found = []
    methods = {"moe_slimming": 1.0, "reap": 1.5, "random": 6.0}
    for model, names in (("tiny_qwen3_moe", methods), ("tiny_deepseek_v2", ["moe_slimming"])):
        for method, harm in ((name, methods[name]) for name in names):
            for ratio in (0.25, 0.5, 0.75):
                for quantizer, bits in (("none", 16), ("nf4", 4.5)):
                    size = 8.6e6 * (1 - 0.8 * ratio) * bits / 16
                    perplexity = Spread((1 + harm * ratio**2) * (1.04 if bits < 16 else 1), 0.01, 3)
                    found.append(Compressed(model, method, ratio, quantizer, False, False, size, 8_600_000, perplexity))
    return found


@pytest.fixture(scope="module")
def figure(points):
    return front_figure(points)


def test_one_panel_per_model_and_one_label_per_ratio_and_quantizer(figure):
    assert [panel.get_title() for panel in figure.axes] == ["tiny_qwen3_moe", "tiny_deepseek_v2"]
    for panel in figure.axes:
        assert panel.get_xscale() == panel.get_yscale() == "log"
        labels = {text.get_text() for text in panel.texts}
        assert labels == {"dense", "25%", "50%", "75%", "25% nf4", "50% nf4", "75% nf4"}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "moe_slimming", "reap", "random", "dense", "same ratio and quantizer", "Pareto front (bold labels)",
    ]  # fmt: skip


def test_no_words_are_cut_off_at_an_edge(points, figure):
    assert cut_off(figure) == []
    ours = [point for point in points if point.model == "tiny_qwen3_moe" and point.method == "moe_slimming"]
    many = [replace(point, method=f"moe_slimming_in_its_variant_{number}") for number in range(15) for point in ours]
    assert cut_off(front_figure(many)) == []


def test_sizes_on_the_front_are_bold(figure):
    bold = {text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"}
    # Ours at 75% (1.5625) and at 50% (1.25) are larger and worse than at 25% nf4 (1.105).
    assert bold == {"75% nf4", "50% nf4", "25% nf4", "25%"}


def test_no_label_covers_another_or_leaves_its_panel(figure):
    for panel in figure.axes:
        frame = panel.get_window_extent()
        extents = [text.get_window_extent() for text in panel.texts]
        assert not any(one.overlaps(other) for one, other in combinations(extents, 2))
        assert all(frame.x0 <= extent.x0 and extent.x1 <= frame.x1 for extent in extents)
        assert all(frame.y0 <= extent.y0 and extent.y1 <= frame.y1 for extent in extents)


def test_of_many_sizes_only_those_on_the_front_are_labelled(points):
    crowd = [
        replace(points[0], ratio=ratio / 100, bytes=8e6 - 1e5 * ratio, perplexity=Spread(5 - ratio / 20, None, 1))
        for ratio in range(5, 60, 3)
    ]
    (panel,) = front_figure(crowd).axes
    assert {text.get_text() for text in panel.texts} == {"dense", "59%"}
    covered = panel.transData.transform([(point.bytes / 1e6, point.perplexity.mean) for point in crowd])
    assert not any(text.get_window_extent().contains(*place) for text in panel.texts for place in covered)


def test_a_perplexity_that_is_not_finite_is_left_out_and_told(points):
    lost = [replace(points[0], perplexity=Spread(value, None, 1)) for value in (math.inf, math.nan)]
    (panel,) = front_figure([points[0], *lost]).axes
    assert "2 not drawn: perplexity not finite" in panel.get_xlabel()
    with pytest.raises(InputError, match="nothing to plot"):
        front_figure(lost)


def test_a_reference_is_shown_but_not_on_the_front(points):
    reference = replace(points[0], method="wanda", is_reference=True, bytes=1e5, perplexity=Spread(0.9, None, 1))
    (panel,) = front_figure([points[0], reference]).axes
    bold = {text.get_text() for text in panel.texts if text.get_fontweight() == "bold"}
    assert bold == {"25%"}
    assert "no channels removed" in {text.get_text() for text in panel.texts}
