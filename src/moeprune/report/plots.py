"""Perplexity against size, as a figure: one panel per model, one colour and marker per method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moeprune.errors import InputError
from moeprune.report.figures import (
    COLOURS,
    DENSE_COLOUR,
    DENSE_LINE_COLOUR,
    JOIN_COLOUR,
    empty_figure,
    set_log_scales,
    write_figure,
)
from moeprune.report.formats import byte_unit, byte_unit_note
from moeprune.report.labels import Point
from moeprune.report.point_labels import Group, write_labels
from moeprune.report.results import Metrics, Run, Variant
from moeprune.report.settings import run_labels

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = (0, (5, 4))
MARKER_SIZE = 7.5
PANELS_PER_ROW = 3


@dataclass(frozen=True)
class Style:
    """How the runs of one method are drawn in every panel."""

    colour: str
    marker: str


def plot_perplexity_against_bytes(runs: Sequence[Run], path: Path) -> None:
    """Write the figure as a PNG at 150 dpi; ``path`` changes only once the figure is complete.

    Raises InputError when no run has results.
    """
    write_figure(perplexity_figure(runs), path)


def perplexity_figure(runs: Sequence[Run]) -> Figure:
    """Mean perplexity of each run's final variant against its bytes with overhead, with the dense model beside it."""
    measured = [run.results for run in runs if run.results]
    if not measured:
        raise InputError("There is nothing to plot: no run ended with results.")
    names = run_labels([run for run in runs if run.results])
    looks = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    styles = {name: Style(*look) for name, look in zip(dict.fromkeys(names), looks, strict=False)}
    models = list(dict.fromkeys(metrics.model for metrics in measured))
    across = min(len(models), PANELS_PER_ROW)
    down = math.ceil(len(models) / across)
    legend_columns = 3 * across
    height = 4.6 * down + 0.4 + 0.2 * math.ceil((len(styles) + 2) / legend_columns)
    figure = empty_figure(6.4 * across, height)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    groups_of = {}
    for panel, model in zip(panels, models, strict=False):
        styled = [(each, styles[name]) for each, name in zip(measured, names, strict=True) if each.model == model]
        groups_of[panel] = _draw_panel(panel, model, styled)
    for panel in panels[len(models) :]:
        panel.set_axis_off()
    figure.suptitle("Perplexity against size after compression", fontsize=13, fontweight="bold")
    _draw_legend(figure, styles, legend_columns)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, groups in groups_of.items():
        dense_height = groups[0].points[0][1]
        write_labels(panel, groups, lines=[[(edge, dense_height) for edge in panel.get_xlim()]])
    return figure


def _draw_panel(panel: Axes, model: str, styled: Sequence[tuple[Metrics, Style]]) -> list[Group]:
    """Draw the points of one model; returns what is still to be labelled, the dense model first."""
    dense = styled[0][0].dense
    unit_bytes, unit = byte_unit([dense.bytes.with_overhead])
    dense_point = _point(dense, unit_bytes)
    panel.axhline(dense_point[1], color=DENSE_LINE_COLOUR, linestyle=DASHES, linewidth=0.9, zorder=1)
    panel.plot(*dense_point, marker="*", markersize=2 * MARKER_SIZE, color=DENSE_COLOUR, linestyle="", zorder=4)
    points_of: dict[str, list[Point]] = {}
    for metrics, style in styled:
        point = _point(metrics.final, unit_bytes)
        if math.isfinite(point[1]):
            panel.plot(*point, **_marker(style), zorder=3)
            points_of.setdefault(_compression(metrics), []).append(point)
    for points in points_of.values():
        upwards = sorted(points, key=lambda point: point[1])
        panel.plot(*zip(*upwards, strict=True), color=JOIN_COLOUR, linewidth=1.2, zorder=2)
    groups = [Group("dense", [dense_point]), *(Group(text, points) for text, points in points_of.items())]
    set_log_scales(panel, *zip(*(point for group in groups for point in group.points), strict=True))
    panel.set_title(model, fontsize=11)
    left_out = len(styled) - sum(len(points) for points in points_of.values())
    note = f"\n{left_out} not drawn: perplexity not finite" if left_out else ""
    panel.set_xlabel(f"size with overhead [{unit}; {byte_unit_note(unit)}]{note}")
    panel.set_ylabel("mean perplexity (geometric, over texts)")
    return groups


def _point(variant: Variant, unit_bytes: int) -> Point:
    return variant.bytes.with_overhead / unit_bytes, variant.mean_perplexity


def _compression(metrics: Metrics) -> str:
    percent = "no channels removed" if metrics.is_reference else f"{100 * metrics.ratio:g}%"
    return percent if metrics.quantizer == "none" else f"{percent} {metrics.quantizer}"


def _marker(style: Style) -> dict[str, Any]:
    """A pale face in a strong edge, so that points on top of each other all stay visible."""
    edge = {"color": style.colour, "markeredgecolor": style.colour, "markeredgewidth": 1.5}
    face = {"markerfacecolor": to_rgba(style.colour, 0.3)}
    return {"marker": style.marker, "markersize": MARKER_SIZE, "linestyle": "", **edge, **face}


def _draw_legend(figure: Figure, styles: dict[str, Style], columns: int) -> None:
    methods = [Line2D([], [], label=name, **_marker(style)) for name, style in styles.items()]
    dense = Line2D([], [], label="dense", marker="*", markersize=12, color=DENSE_COLOUR, linestyle="")
    joined = Line2D([], [], label="same ratio and quantizer", color=JOIN_COLOUR, linewidth=1.2)
    figure.legend(
        handles=[*methods, dense, joined],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
        title="Labels: routed-expert channels removed, and quantizer. Both axes are logarithmic.",
        title_fontsize=9,
    )
