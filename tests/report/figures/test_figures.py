"""What all figures share."""

import pytest
from matplotlib.figure import Figure

from moeprune.report.figures.style import COLOURS, MARKERS, empty_figure, looks_of, panels_for, write_figure

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_a_figure_is_written_and_nothing_else_is_left(tmp_path):
    write_figure(empty_figure(1, 1), tmp_path / "plot.png", tmp_path / "plot.svg")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG_SIGNATURE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "plot.svg"]


def test_a_failing_plot_leaves_the_old_one_and_no_rest(tmp_path, monkeypatch):
    (tmp_path / "plot.png").write_bytes(b"the old plot")

    def half_written(_figure, path, **_options):
        path.write_bytes(PNG_SIGNATURE)
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half_written)
    with pytest.raises(OSError, match="disk full"):
        write_figure(empty_figure(1, 1), tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes() == b"the old plot"


def test_names_have_looks_of_their_own():
    names = [f"method {number}" for number in range(len(COLOURS) * len(MARKERS))]
    looks = looks_of([*names, *names])
    assert list(looks) == names
    assert len(set(looks.values())) == len(names)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (3, 1), (4, 2)])
def test_panels_that_are_not_needed_are_blank(count, rows):
    figure, panels = panels_for(count, 3, 2, 1, 0.5)
    assert len(panels) == count and all(panel.axison for panel in panels)
    assert sum(panel.axison for panel in figure.axes) == count
    assert figure.get_size_inches().tolist() == [2 * min(count, 3), 0.5 + rows]
