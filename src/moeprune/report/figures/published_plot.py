"""Average accuracy as published and as measured here, for the same model, method and size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moeprune.errors import InputError
from moeprune.report.figures.points import bar_length
from moeprune.report.figures.style import (
    COLOURS,
    DENSE_COLOUR,
    JOIN_COLOUR,
    draw_legend,
    draw_title,
    panels_for,
    quiet_axes,
)
from moeprune.report.published.join import joined
from moeprune.report.published.results import PublishedResult, published_results
from moeprune.report.runs.measures import average_accuracy
from moeprune.report.runs.seeds import Row, Spread

PANELS_PER_ROW = 2
LINE_HEIGHT, HEAD_HEIGHT = 0.28, 1.0
SUSPECT = "†"


@dataclass(frozen=True)
class Pair:
    """The mean of a printed row in percent, and ours over the same tasks; ``is_suspect``: the row has a note."""

    model: str
    name: str
    published: float
    ours: Spread
    is_suspect: bool = False


def published_pairs(tables: Sequence[str], rows: Sequence[Row]) -> list[Pair]:
    """A pair for each printed row of these tables that has its like among ours; averages are over its tasks."""
    pairs = []
    for printed in published_results():
        own = joined(printed, rows, printed.model) if printed.table in tables and printed.tasks else None
        ours = own.spread(average_accuracy(list(printed.tasks)).of) if own else None
        if ours is not None and printed.mean_of_row is not None:
            name = ", ".join(filter(None, (printed.method, _size(printed), printed.variant)))
            pairs.append(Pair(printed.model, name, printed.mean_of_row, ours, bool(printed.doubts)))
    return pairs


def _size(printed: PublishedResult) -> str:
    percent = "" if printed.ratio is None or printed.is_dense else f"{100 * printed.ratio:.3g}% "
    return f"{percent}{printed.bits} bits"


def published_figure(pairs: Sequence[Pair]) -> Figure:
    """A panel per model, a line per pair. Raises InputError when there is none."""
    if not pairs:
        raise InputError("There is nothing to plot: no run has its like among the published results.")
    panels_of: dict[str, list[Pair]] = {}
    for pair in pairs:
        panels_of.setdefault(pair.model, []).append(pair)
    height = HEAD_HEIGHT + LINE_HEIGHT * max(map(len, panels_of.values()))
    figure, panels = panels_for(len(panels_of), PANELS_PER_ROW, 7.0, height, 0.5)
    for panel, (model, of_model) in zip(panels, panels_of.items(), strict=True):
        _draw_panel(panel, model, of_model)
    draw_title(figure, "Average accuracy: published and measured here")
    look: dict[str, Any] = {"linestyle": "", "markersize": 7}
    handles = [
        Line2D([], [], label="published", color=DENSE_COLOUR, marker="D", markerfacecolor="white", **look),
        Line2D([], [], label="measured here", color=COLOURS[0], marker="o", **look),
    ]
    noted = f"{SUSPECT}: a printed row that is doubtful" if any(pair.is_suspect for pair in pairs) else ""
    draw_legend(figure, handles, 2, title=noted)
    return figure


def _draw_panel(panel: Axes, model: str, pairs: Sequence[Pair]) -> None:
    for place, pair in enumerate(pairs):
        panel.plot([pair.published, pair.ours.mean], [place, place], color=JOIN_COLOUR, linewidth=1.4, zorder=1)
        panel.plot(
            pair.published, place, marker="D", color=DENSE_COLOUR, markerfacecolor="white", markersize=7, zorder=2
        )
        panel.errorbar(
            pair.ours.mean, place, xerr=bar_length(pair.ours) or None, color=COLOURS[0], marker="o", markersize=6,
            elinewidth=1, capsize=2.5, zorder=3,
        )  # fmt: skip
    names = [f"{pair.name} {SUSPECT}" if pair.is_suspect else pair.name for pair in pairs]
    panel.set_yticks(range(len(pairs)), names, fontsize=9)
    panel.set_ylim(len(pairs) - 0.4, -0.6)
    panel.margins(x=0.08)
    quiet_axes(panel)
    panel.grid(visible=False, axis="y")
    panel.set_title(model, fontsize=11)
    panel.set_xlabel("average accuracy [%]")
