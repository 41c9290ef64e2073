"""The figure of perplexity against size."""

import json
import math
from itertools import combinations

import pytest
from matplotlib.figure import Figure

from moeprune.errors import InputError
from moeprune.report.plots import perplexity_figure, plot_perplexity_against_bytes
from moeprune.report.results import load_sweep

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def runs(tmp_path, write_run):
    number = 0
    for model in ("tiny_qwen3_moe", "tiny_deepseek_v2"):
        for method, harm in (("moe_slimming", 1.0), ("reap", 1.5), ("random", 6.0)):
            for ratio in (0.25, 0.5, 0.75):
                for quantizer in ("none", "nf4"):
                    choices = {"model": model, "method": method, "ratio": ratio, "quantizer": quantizer}
                    write_run(tmp_path / "sweep" / str(number), harm=harm, **choices)
                    number += 1
    return load_sweep(tmp_path / "sweep")


def test_the_plot_is_a_png_and_nothing_else_is_left(tmp_path, runs):
    folder = tmp_path / "plots"
    folder.mkdir()
    plot_perplexity_against_bytes(runs, folder / "plot.png")
    assert (folder / "plot.png").read_bytes().startswith(PNG_SIGNATURE)
    assert [path.name for path in folder.iterdir()] == ["plot.png"]


def test_a_failing_plot_leaves_the_old_one_and_no_rest(tmp_path, runs, monkeypatch):
    folder = tmp_path / "plots"
    folder.mkdir()
    (folder / "plot.png").write_bytes(b"the old plot")

    def half_written(_figure, path, **_options):
        path.write_bytes(PNG_SIGNATURE)
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        plot_perplexity_against_bytes(runs, folder / "plot.png")
    assert [path.name for path in folder.iterdir()] == ["plot.png"]
    assert (folder / "plot.png").read_bytes() == b"the old plot"


def test_one_panel_per_model_and_one_label_per_ratio_and_quantizer(runs):
    figure = perplexity_figure(runs)
    assert [panel.get_title() for panel in figure.axes] == ["tiny_qwen3_moe", "tiny_deepseek_v2"]
    for panel in figure.axes:
        assert panel.get_yscale() == "log"
        labels = {text.get_text() for text in panel.texts}
        assert labels == {"dense", "25%", "50%", "75%", "25% nf4", "50% nf4", "75% nf4"}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["moe_slimming", "reap", "random", "dense", "same ratio and quantizer"]


def test_no_label_covers_another_or_leaves_its_panel(runs):
    for panel in perplexity_figure(runs).axes:
        frame = panel.get_window_extent()
        extents = [text.get_window_extent() for text in panel.texts]
        assert not any(one.overlaps(other) for one, other in combinations(extents, 2))
        assert all(frame.x0 <= extent.x0 and extent.x1 <= frame.x1 for extent in extents)
        assert all(frame.y0 <= extent.y0 and extent.y1 <= frame.y1 for extent in extents)


def test_a_perplexity_that_is_not_finite_is_left_out_and_told(tmp_path, write_run):
    for number, perplexity in enumerate((40.0, math.inf, math.nan)):
        run_dir = write_run(tmp_path / str(number))
        metrics = json.loads((run_dir / "metrics.json").read_text())
        metrics["variants"][-1]["mean_perplexity"] = perplexity
        (run_dir / "metrics.json").write_text(json.dumps(metrics))
    (panel,) = perplexity_figure(load_sweep(tmp_path)).axes
    assert "2 not drawn: perplexity not finite" in panel.get_xlabel()


def test_nothing_to_plot_is_an_error(tmp_path, write_run):
    write_run(tmp_path / "0", error=("BudgetError", "too much"))
    with pytest.raises(InputError, match="nothing to plot"):
        perplexity_figure(load_sweep(tmp_path))
