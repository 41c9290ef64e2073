"""The figures of a run's diagnostics."""

import json

import numpy as np
import pytest

from moeprune.errors import InputError
from moeprune.report.figures.diagnostics import load_diagnostics
from moeprune.report.figures.diagnostics_plots import (
    concentration_figure,
    kept_channels_figure,
    kept_widths_figure,
    router_entropy_figure,
    write_diagnostics_plots,
)
from moeprune.report.figures.style import write_figure


@pytest.fixture
def path(tmp_path, made_up_diagnostics):
    path = tmp_path / "diagnostics.json"
    path.write_text(json.dumps(made_up_diagnostics))
    return path


def test_each_figure_is_written_as_png_and_svg(path):
    names = ("kept_channels", "kept_widths", "router_entropy", "score_concentration")
    written = write_diagnostics_plots(path, path.parent)
    assert [file.name for file in written] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written[::2])
    assert all(b"<svg" in file.read_bytes()[:1000] for file in written[1::2])
    assert len(list(path.parent.iterdir())) == 9


def test_the_same_figure_gives_the_same_bytes(tmp_path, path):
    drawn = []
    for _ in range(2):
        files = [tmp_path / "entropy.png", tmp_path / "entropy.svg"]
        write_figure(router_entropy_figure(load_diagnostics(path)), *files)
        drawn.append([file.read_bytes() for file in files])
    assert drawn[0] == drawn[1]


def test_without_channel_scores_there_is_no_concentration_to_draw(path, made_up_diagnostics):
    made_up_diagnostics |= {"channel_scores": None, "coverage": None, "without_channel_scores": "whole experts"}
    path.write_text(json.dumps(made_up_diagnostics))
    assert load_diagnostics(path).concentration is None
    (panel,) = kept_widths_figure(load_diagnostics(path)).axes
    assert panel.get_title() == "Kept width"


def test_lorenz_curves_carry_the_mean_gini_of_the_experts_that_have_one(path):
    lorenz, by_layer = concentration_figure(load_diagnostics(path).concentration).axes
    labels = [text.get_text() for text in lorenz.get_legend().get_texts()]
    assert labels[0] == "layer 0: Gini 0.30, top 10% hold 30%"
    assert lorenz.lines[1].get_ydata().tolist() == [0, 0.2, 1]
    assert by_layer.lines[-1].get_ydata().tolist() == [0.5, 0.4, 0.3]


def test_many_layers_get_a_colour_scale_instead_of_a_legend(path, made_up_diagnostics):
    scores = made_up_diagnostics["channel_scores"]
    for name in ("lorenz", "gini", "top_tenth", "layer_gini"):
        scores[name] = scores[name] * 4
    path.write_text(json.dumps(made_up_diagnostics))
    figure = concentration_figure(load_diagnostics(path).concentration)
    assert figure.axes[0].get_legend() is None
    assert figure.axes[2].get_ylabel() == "MoE layer"


def test_the_heat_map_shows_every_width_and_leaves_removed_experts_without_colour(path):
    figure = kept_channels_figure(load_diagnostics(path))
    panel = figure.axes[0]
    assert [text.get_text() for text in panel.texts] == ["0", "16", "8", "8", "4", "4", "12", "12", "8", "8", "8", "8"]
    (image,) = panel.images
    assert np.ma.getmaskarray(image.get_array()).sum() == 1
    assert image.get_clim() == (0, 16)
    assert figure.get_suptitle() == "Kept channels: 96 of 192 (50.0%)"


def test_merged_experts_are_not_called_removed(path, made_up_diagnostics):
    made_up_diagnostics["merged_into"] = [[1, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    path.write_text(json.dumps(made_up_diagnostics))
    found = load_diagnostics(path)
    assert kept_channels_figure(found).axes[0].get_xlabel() == "expert (grey: merged into another expert)"
    assert "merged: 1" in [text.get_text() for text in kept_widths_figure(found).axes[0].get_legend().get_texts()]


def test_bars_count_the_experts_of_each_width(path):
    widths, coverage = kept_widths_figure(load_diagnostics(path)).axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in widths.patches}
    assert bars == {0: 1, 4: 2, 8: 6, 12: 2, 16: 1}
    assert coverage.get_title() == "Coverage 2.1 of at most 2.2 (gap 4.55%)"


def test_entropy_stands_beside_its_greatest_value(path):
    (panel,) = router_entropy_figure(load_diagnostics(path)).axes
    assert [bar.get_height() for bar in panel.patches] == [0.7, 1.0, 1.3]
    assert [text.get_text() for text in panel.texts] == ["ln 4 = 1.39: uniform routing"]


@pytest.mark.parametrize("text", ['{"width": ', '{"width": 16}'])
def test_damaged_diagnostics_name_the_file(path, text):
    path.write_text(text)
    with pytest.raises(InputError, match=r"diagnostics\.json is damaged"):
        load_diagnostics(path)
