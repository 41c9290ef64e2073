"""Pruning against quantisation, as a figure: perplexity against real bytes, a line per quantizer, the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moeprune.errors import InputError
from moeprune.report.figures.labels import Point
from moeprune.report.figures.point_labels import Group, write_labels
from moeprune.report.figures.style import (
    DENSE_COLOUR,
    DENSE_LINE_COLOUR,
    FRONT_COLOUR,
    FRONT_LOOK,
    Look,
    draw_legend,
    draw_title,
    looks_of,
    panels_for,
    set_log_scales,
    write_figure,
)
from moeprune.report.runs.grid import Grid, GridPoint
from moeprune.report.tables.formats import byte_unit, byte_unit_note
from moeprune.report.tables.grid_tables import quantizer_text

# A perplexity this many times the dense one stands at the upper edge, so that the useful ones keep their room.
MOST_TO_DENSE = 3.0
ARROW = "$\\uparrow$"
PANELS_PER_ROW = 2
DARKER = 0.8  # of text, which is thinner than lines
RATIO_SIZE, FRONT_SIZE = 7.5, 8.5

Line = Sequence[Point]


def plot_pareto(grids: Sequence[Grid], *paths: Path) -> None:
    """Write the figure; a path changes only once its file is complete. Raises InputError when there is no grid."""
    write_figure(pareto_figure(grids), *paths)


def pareto_figure(grids: Sequence[Grid]) -> Figure:
    """A panel per grid. Raises InputError when there is none."""
    if not grids:
        raise InputError("There is nothing to plot: no runs fill a grid of ratios and quantizers.")
    figure, panels = panels_for(len(grids), PANELS_PER_ROW, 6.6, 5.0, 0.7)
    looks = looks_of(name for grid in grids for name in grid.quantizers)
    drawn = {panel: _draw_panel(panel, grid, looks) for panel, grid in zip(panels, grids, strict=True)}
    draw_title(figure, "Pruning and quantisation: perplexity against bytes")
    _draw_legend(figure, grids, looks)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, (groups, lines) in drawn.items():
        write_labels(panel, groups, lines)
    return figure


def _draw_panel(panel: Axes, grid: Grid, looks: Mapping[str, Look]) -> tuple[list[Group], list[Line]]:
    """Draw one grid; returns what is still to be labelled, and the lines that labels should not cover."""
    metrics = grid.points[0].metrics
    unit_bytes, unit = byte_unit([grid.dense_bytes])
    dense = metrics.dense.mean_perplexity
    edge = MOST_TO_DENSE * dense

    def place(point: GridPoint) -> Point:
        return point.bytes / unit_bytes, min(point.perplexity, edge)

    dense_at = (grid.dense_bytes / unit_bytes, dense)
    panel.axhline(dense, color=DENSE_LINE_COLOUR, linestyle=(0, (5, 4)), linewidth=0.9, zorder=1)
    panel.plot(*dense_at, marker="*", markersize=14, color=DENSE_COLOUR, linestyle="", zorder=5)
    front = [place(point) for point in grid.front if point.perplexity <= edge]
    _draw_line(panel, front, color=FRONT_COLOUR, **FRONT_LOOK)
    groups, lines = [Group("dense", [dense_at], FRONT_SIZE)], []
    for quantizer in grid.quantizers:
        look = looks[quantizer]
        points = [point for point in grid.of_quantizer(quantizer) if math.isfinite(point.perplexity)]
        lines.append([place(point) for point in points if point.perplexity <= edge])
        _draw_line(panel, lines[-1], color=look.colour, marker=look.marker, markersize=5, linewidth=1.3, zorder=4)
        for point in points:
            if point.perplexity > edge:
                panel.plot(*place(point), color=look.colour, marker=ARROW, markersize=8, linestyle="", zorder=4)
            groups.append(_label(point, place(point), look.colour, point in grid.front))
    set_log_scales(panel, *zip(*(point for group in groups for point in group.points), strict=True))
    panel.set_title(f"{grid.model}, {grid.method}", fontsize=11)
    panel.set_xlabel(f"size with overhead [{unit}; {byte_unit_note(unit)}]{_left_out(grid)}")
    panel.set_ylabel("mean perplexity (geometric, over texts)")
    return groups, [*lines, [(end, dense) for end in panel.get_xlim()]]


def _label(point: GridPoint, at: Point, colour: str, on_front: bool) -> Group:
    text = f"{100 * point.ratio:g}%"
    red, green, blue = to_rgb(colour)
    dark = to_hex((DARKER * red, DARKER * green, DARKER * blue))
    return Group(text, [at], *((FRONT_SIZE, dark, "bold") if on_front else (RATIO_SIZE, dark, "normal")))


def _draw_line(panel: Axes, places: Sequence[Point], **look: Any) -> None:
    if places:
        panel.plot(*zip(*places, strict=True), **look)


def _left_out(grid: Grid) -> str:
    infinite = sum(not math.isfinite(point.perplexity) for point in grid.points)
    return f"\n{infinite} not drawn: perplexity not finite" if infinite else ""


def _draw_legend(figure: Figure, grids: Sequence[Grid], looks: Mapping[str, Look]) -> None:
    lines = []
    for name, look in looks.items():
        grid = next(grid for grid in grids if name in grid.quantizers)
        text = quantizer_text(grid, name, ", ")
        lines.append(Line2D([], [], label=text, color=look.colour, marker=look.marker, markersize=5, linewidth=1.3))
    dense = Line2D([], [], label="dense", marker="*", markersize=12, color=DENSE_COLOUR, linestyle="")
    front = Line2D([], [], label="Pareto front (bold labels)", color=FRONT_COLOUR, **FRONT_LOOK)
    title = f"Labels: routed-expert channels removed. {_conditions(grids)}{_arrows(grids)} Axes: logarithmic."
    draw_legend(figure, [*lines, dense, front], 4 * min(len(grids), PANELS_PER_ROW), title=title)


def _conditions(grids: Sequence[Grid]) -> str:
    """The data and seeds that the runs share; what they do not share is in the names of the methods."""
    metrics = [point.metrics for grid in grids for point in grid.points]
    texts = []
    for key in ("calibration", "recovery", "seed"):
        values = {str(getattr(each, key)) for each in metrics}
        texts += [f"{key} {value}" for value in values if len(values) == 1]
    return f"{', '.join(texts).capitalize()}." if texts else ""


def _arrows(grids: Sequence[Grid]) -> str:
    beyond = any(MOST_TO_DENSE < point.to_dense < math.inf for grid in grids for point in grid.points)
    return f" Arrows: above {MOST_TO_DENSE:g} times dense." if beyond else ""
