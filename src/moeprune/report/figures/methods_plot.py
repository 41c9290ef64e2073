"""Methods or recoveries at one size, told apart: perplexity beside dense, a line for each, best first."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moeprune.errors import InputError
from moeprune.report.figures.points import Compressed, bar_length
from moeprune.report.figures.style import (
    COLOURS,
    DENSE_LINE_COLOUR,
    JOIN_COLOUR,
    TEXT_COLOUR,
    draw_title,
    panels_for,
    quiet_axes,
    set_round_ticks,
)
from moeprune.report.tables.formats import ratio_text

FEW_METHODS, FEW_RECOVERIES = 6, 2
PANELS_PER_ROW = 2
LINE_HEIGHT, HEAD_HEIGHT = 0.24, 1.1


def crowded_sizes(points: Sequence[Compressed]) -> dict[str, list[Compressed]]:
    """The models, ratios and quantizers with more than six points, or with three and more of which some were
    recovered; and these points, best first."""
    sizes: dict[str, list[Compressed]] = {}
    for point in points:
        sizes.setdefault(_size(point), []).append(point)
    return {size: sorted(found, key=_rank) for size, found in sizes.items() if _is_crowded(found)}


def _is_crowded(points: Sequence[Compressed]) -> bool:
    recovered = any(point.recovery_seconds is not None for point in points)
    return len(points) > (FEW_RECOVERIES if recovered else FEW_METHODS)


def methods_figure(points: Sequence[Compressed]) -> Figure:
    """A panel for each crowded size. Raises InputError when there is none."""
    sizes = crowded_sizes(points)
    if not sizes:
        raise InputError(f"There is nothing to plot: no size has more than {FEW_METHODS} methods with results.")
    height = HEAD_HEIGHT + LINE_HEIGHT * max(map(len, sizes.values()))
    figure, panels = panels_for(len(sizes), PANELS_PER_ROW, 7, height, 0.4)
    for panel, (size, lines) in zip(panels, sizes.items(), strict=True):
        _draw_panel(panel, size, lines)
    drawn = [point for lines in sizes.values() for point in lines]
    marks = "; squares: whole experts" if any(point.whole_experts for point in drawn) else ""
    figure.supxlabel(f"mean perplexity / dense (logarithmic; dashed: dense{marks})", fontsize=10)
    recovered = any(point.recovery_seconds is not None for point in drawn)
    draw_title(figure, "Recoveries by perplexity (seconds of training)" if recovered else "Methods by perplexity")
    return figure


def _draw_panel(panel: Axes, size: str, points: Sequence[Compressed]) -> None:
    drawn = [point.perplexity for point in points if point.is_drawn]
    low = min([1.0, *(spread.mean for spread in drawn)])
    high = max([1.0, *(spread.mean + bar_length(spread) for spread in drawn)])
    room = max(high / low, 1.2) ** 0.08
    panel.set_xscale("log")
    panel.set_xlim(low / room, high * room**3)  # room for the number to the right of the last dot
    set_round_ticks(panel.xaxis, *panel.get_xlim())
    quiet_axes(panel)
    panel.grid(visible=False, axis="y")
    panel.axvline(1, color=DENSE_LINE_COLOUR, linestyle="--", linewidth=0.9)
    best = next((point for point in points if point.is_drawn and not point.is_reference), None)
    for place, point in enumerate(points):
        _draw_line(panel, place, point, COLOURS[1 if point is best else 0])
    panel.set_yticks(range(len(points)), [_name(point) for point in points], fontsize=9)
    panel.set_ylim(len(points) - 0.4, -0.6)
    panel.set_title(size, fontsize=11)


def _draw_line(panel: Axes, place: int, point: Compressed, colour: str) -> None:
    """From dense to a dot, with the number beside it and a bar of one deviation over seeds."""
    end, bar = (point.perplexity.mean, bar_length(point.perplexity)) if point.is_drawn else (1.0, 0.0)
    if point.is_drawn:
        edge = TEXT_COLOUR if point.is_reference else colour
        panel.plot([1, end], [place, place], color=JOIN_COLOUR, linewidth=1.2, zorder=2)
        face = "white" if point.is_reference else edge
        marker = "s" if point.whole_experts else "o"
        panel.errorbar(
            end, place, xerr=bar or None, color=edge, marker=marker, markerfacecolor=face, markersize=6, capsize=2.5,
            elinewidth=1, zorder=3,
        )  # fmt: skip
    panel.annotate(
        _text(point), (max(1, end + bar), place), (7, 0),
        textcoords="offset points", va="center", fontsize=8.5, color=TEXT_COLOUR,
    )  # fmt: skip


def _size(point: Compressed) -> str:
    stored = "" if point.quantizer == "none" else f", {point.quantizer}"
    return f"{point.model}, {100 * point.ratio:.3g}% removed{stored}"


def _name(point: Compressed) -> str:
    return f"{point.method} (removes no channels)" if point.is_reference else point.method


def _text(point: Compressed) -> str:
    number = ratio_text(point.perplexity.mean) if point.is_drawn else "not finite"
    return number if point.recovery_seconds is None else f"{number}  ({point.recovery_seconds:,.0f} s)"


def _rank(point: Compressed) -> float:
    return point.perplexity.mean if point.is_drawn else math.inf
