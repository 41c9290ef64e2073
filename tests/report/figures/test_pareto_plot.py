"""The figure of pruning against quantisation."""

import json
from itertools import combinations, product

import pytest
from words import cut_off

from moeprune.errors import InputError
from moeprune.report.figures.pareto_plot import pareto_figure, plot_pareto
from moeprune.report.runs.grid import find_grids
from moeprune.report.runs.results import load_sweep


@pytest.fixture
def grids(tmp_path, write_run):
    models, ratios = ("tiny_qwen3_moe", "tiny_deepseek_v2"), (0, 0.15, 0.25, 0.35, 0.45, 0.5)
    quantizers = ("none", "rtn8", "nf4", "gptq3", "hqq2")
    for number, (model, ratio, quantizer) in enumerate(product(models, ratios, quantizers)):
        write_run(tmp_path / str(number), model=model, ratio=ratio, quantizer=quantizer)
    return find_grids(load_sweep(tmp_path))


def test_a_panel_per_model_and_a_label_per_point(grids):
    figure = pareto_figure(grids)
    assert [panel.get_title() for panel in figure.axes] == [
        "tiny_qwen3_moe, moe_slimming",
        "tiny_deepseek_v2, moe_slimming",
    ]
    for panel in figure.axes:
        assert panel.get_xscale() == panel.get_yscale() == "log"
        labels = [text.get_text() for text in panel.texts]
        assert sorted(labels) == sorted(["dense", *(5 * ["0%", "15%", "25%", "35%", "45%", "50%"])])
        bold = [text for text in panel.texts if text.get_fontweight() == "bold"]
        assert len(bold) == len(grids[0].front)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["none, 16 bits", "rtn8, 8 bits"]
    title = figure.legends[0].get_title().get_text()
    assert "Calibration mixed, recovery none, seed 0." in title
    assert "Arrows: above 3 times dense." in title  # 2 bits, at 20 times dense


def test_no_words_are_cut_off_at_an_edge(grids):
    assert cut_off(pareto_figure(grids)) == cut_off(pareto_figure(grids[:1])) == []


def test_labels_keep_off_each_other_and_inside(grids):
    for panel in pareto_figure(grids).axes:
        frame = panel.get_window_extent()
        extents = [text.get_window_extent() for text in panel.texts]
        assert not any(one.overlaps(other) for one, other in combinations(extents, 2))
        assert all(frame.x0 <= extent.x0 and extent.x1 <= frame.x1 for extent in extents)
        assert all(frame.y0 <= extent.y0 and extent.y1 <= frame.y1 for extent in extents)


def test_every_quantizer_has_a_look_of_its_own(tmp_path, write_run):
    names = [f"{kind}{bits}" for kind, bits in product(("rtn", "hqq", "gptq", "own"), (8, 4, 3, 2))]
    for number, (name, ratio) in enumerate(product(names, (0, 0.5))):
        file = write_run(tmp_path / str(number), ratio=ratio) / "metrics.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantizer": name}))
    lines = pareto_figure(find_grids(load_sweep(tmp_path))).legends[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines[: len(names)]}) == len(names)


def test_it_is_written_as_png_and_svg(tmp_path, grids):
    plot_pareto(grids, tmp_path / "pareto.png", tmp_path / "pareto.svg")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "pareto.svg").read_text()


def test_no_grid_is_an_error():
    with pytest.raises(InputError, match="no runs fill a grid"):
        pareto_figure([])
