"""Perplexity against size: a panel per model, a look per method, and the front of those that nothing beats."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moeprune.errors import InputError
from moeprune.report.figures.labels import Point
from moeprune.report.figures.point_labels import Group, write_labels
from moeprune.report.figures.points import Compressed, bar_length, front
from moeprune.report.figures.style import (
    DENSE_COLOUR,
    DENSE_LINE_COLOUR,
    FRONT_COLOUR,
    FRONT_LOOK,
    JOIN_COLOUR,
    Look,
    draw_legend,
    draw_title,
    looks_of,
    panels_for,
    set_log_scales,
)
from moeprune.report.tables.formats import byte_unit, byte_unit_note
from moeprune.report.tables.takeaway import ABOUT

MARKER_SIZE = 7.5
PANELS_PER_ROW = 3
# With more sizes than this, only those on the front are labelled.
MOST_LABELS = 16


def front_figure(points: Sequence[Compressed]) -> Figure:
    """Mean perplexity relative to dense over bytes with overhead. Raises InputError when no point is finite."""
    if not any(point.is_drawn for point in points):
        raise InputError("There is nothing to plot: no run ended with a finite perplexity.")
    looks = looks_of(point.method for point in points)
    models = list(dict.fromkeys(point.model for point in points if point.is_drawn))
    figure, panels = panels_for(len(models), PANELS_PER_ROW, 6.4, 4.6, 0.5)
    drawn = {
        panel: _draw_panel(panel, [point for point in points if point.model == model], looks)
        for panel, model in zip(panels, models, strict=True)
    }
    draw_title(figure, "Perplexity against size after compression")
    _draw_legend(figure, looks, 3 * min(len(models), PANELS_PER_ROW))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, (groups, best, others) in drawn.items():
        write_labels(panel, groups, [best, [(edge, 1.0) for edge in panel.get_xlim()]], others)
    return figure


def _draw_panel(
    panel: Axes, points: Sequence[Compressed], looks: Mapping[str, Look]
) -> tuple[list[Group], list[Point], list[Point]]:
    """Draw the points of one model; returns what is still to be labelled, the front, and the points without a label."""
    unit_bytes, unit = byte_unit([points[0].dense_bytes])
    dense_at = (points[0].dense_bytes / unit_bytes, 1.0)
    panel.axhline(1, color=DENSE_LINE_COLOUR, linestyle=(0, (5, 4)), linewidth=0.9, zorder=1)
    panel.plot(*dense_at, marker="*", markersize=2 * MARKER_SIZE, color=DENSE_COLOUR, linestyle="", zorder=5)
    drawn = [point for point in points if point.is_drawn]
    places_of: dict[str, list[Point]] = {}
    for point in drawn:
        place = (point.bytes / unit_bytes, point.perplexity.mean)
        _draw_point(panel, place, bar_length(point.perplexity), looks[point.method])
        places_of.setdefault(point.size_name, []).append(place)
    for places in places_of.values():
        upwards = sorted(places, key=lambda place: place[1])
        panel.plot(*zip(*upwards, strict=True), color=JOIN_COLOUR, linewidth=1.0, zorder=2)
    rivals = [point for point in drawn if not point.is_reference]
    best = front([(point.bytes / unit_bytes, point.perplexity.mean) for point in rivals], ABOUT)
    if best:
        panel.plot(*zip(*best, strict=True), color=FRONT_COLOUR, **FRONT_LOOK)
    set_log_scales(panel, *zip(dense_at, *(place for places in places_of.values() for place in places), strict=True))
    panel.set_title(points[0].model, fontsize=11)
    left_out = len(points) - len(drawn)
    note = f"\n{left_out} not drawn: perplexity not finite" if left_out else ""
    panel.set_xlabel(f"size with overhead [{unit}; {byte_unit_note(unit)}]{note}")
    panel.set_ylabel("mean perplexity / dense")
    groups = [Group("dense", [dense_at]), *_labels(places_of, best)]
    labelled = {place for group in groups for place in group.points}
    return groups, best, [place for places in places_of.values() for place in places if place not in labelled]


def _labels(places_of: Mapping[str, list[Point]], best: Sequence[Point]) -> list[Group]:
    """A label for every size, bold where one of its points is on the front; of many sizes, for these only."""
    groups = []
    for text, places in places_of.items():
        leads = any(place in best for place in places)
        if leads or len(places_of) <= MOST_LABELS:
            groups.append(Group(text, places, weight="bold" if leads else "normal"))
    return groups


def _draw_point(panel: Axes, place: Point, error: float, look: Look) -> None:
    if error > 0:
        panel.errorbar(*place, yerr=error, color=look.colour, elinewidth=1, capsize=2.5, zorder=3)
    panel.plot(*place, **_marker(look), zorder=4)


def _marker(look: Look) -> dict[str, Any]:
    """A pale face in a strong edge, so that points on top of each other all stay visible."""
    edge = {"color": look.colour, "markeredgecolor": look.colour, "markeredgewidth": 1.5}
    face = {"markerfacecolor": to_rgba(look.colour, 0.3)}
    return {"marker": look.marker, "markersize": MARKER_SIZE, "linestyle": "", **edge, **face}


def _draw_legend(figure: Figure, looks: Mapping[str, Look], columns: int) -> None:
    methods = [Line2D([], [], label=name, **_marker(look)) for name, look in looks.items()]
    dense = Line2D([], [], label="dense", marker="*", markersize=12, color=DENSE_COLOUR, linestyle="")
    joined = Line2D([], [], label="same ratio and quantizer", color=JOIN_COLOUR, linewidth=1.2)
    best = Line2D([], [], label="Pareto front (bold labels)", color=FRONT_COLOUR, **FRONT_LOOK)
    handles = [*methods, dense, *([joined] if len(methods) > 1 else []), best]
    title = "Labels: routed-expert channels removed, and quantizer. Both axes are logarithmic."
    draw_legend(figure, handles, columns, title=title)
