"""How fast compressed models read a prompt and write new tokens, relative to dense."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moeprune.errors import InputError
from moeprune.report.figures.points import Compressed, bar_length
from moeprune.report.figures.style import (
    COLOURS,
    DENSE_LINE_COLOUR,
    JOIN_COLOUR,
    draw_legend,
    draw_title,
    panels_for,
    quiet_axes,
)
from moeprune.report.runs.seeds import Spread

PANELS_PER_ROW = 2
LINE_HEIGHT, HEAD_HEIGHT, ROOM = 0.26, 1.0, 0.06
PREFILL: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "label": "prefill (reading the prompt)"}
DECODE: dict[str, Any] = {"color": COLOURS[1], "marker": "D", "label": "decode (writing new tokens)"}


def has_speed(points: Sequence[Compressed]) -> bool:
    """Whether any run measured its speed."""
    return any(point.prefill and point.decode for point in points)


def speed_figure(points: Sequence[Compressed]) -> Figure:
    """A panel per model, a line per method and size. Raises InputError when no speed was measured."""
    measured = [point for point in points if point.prefill and point.decode]
    if not measured:
        raise InputError("There is nothing to plot: no run measured its speed.", change="Set evaluation.speed.")
    models = list(dict.fromkeys(point.model for point in measured))
    panels_of = {model: [point for point in measured if point.model == model] for model in models}
    height = HEAD_HEIGHT + LINE_HEIGHT * max(map(len, panels_of.values()))
    figure, panels = panels_for(len(models), PANELS_PER_ROW, 7.0, height, 0.5)
    for panel, (model, of_model) in zip(panels, panels_of.items(), strict=True):
        _draw_panel(panel, model, of_model)
    draw_title(figure, "Speed beside dense")
    handles = [Line2D([], [], linestyle="", markersize=6, **look) for look in (PREFILL, DECODE)]
    draw_legend(figure, handles, 2)
    return figure


def _draw_panel(panel: Axes, model: str, points: Sequence[Compressed]) -> None:
    panel.axvline(1, color=DENSE_LINE_COLOUR, linestyle="--", linewidth=0.9, zorder=1)
    for place, point in enumerate(points):
        pairs = [(spread, look) for spread, look in ((point.prefill, PREFILL), (point.decode, DECODE)) if spread]
        ends = [spread.mean for spread, _ in pairs]
        panel.plot([min(ends), max(ends)], [place, place], color=JOIN_COLOUR, linewidth=1.2, zorder=2)
        for spread, look in pairs:
            _draw_dot(panel, place, spread, **look)
    panel.set_yticks(range(len(points)), [f"{point.method}, {point.size_name}" for point in points], fontsize=9)
    panel.set_ylim(len(points) - 0.4, -0.6)
    panel.margins(x=ROOM)
    panel.set_xlim(left=0)
    quiet_axes(panel)
    panel.grid(visible=False, axis="y")
    panel.set_title(model, fontsize=11)
    panel.set_xlabel("tokens per second / dense (dashed: dense)")


def _draw_dot(panel: Axes, place: int, spread: Spread, color: str, marker: str, label: str) -> None:
    panel.errorbar(
        spread.mean, place, xerr=bar_length(spread) or None, color=color, marker=marker, markersize=6,
        elinewidth=1, capsize=2.5, linestyle="", label=label, zorder=3,
    )  # fmt: skip
