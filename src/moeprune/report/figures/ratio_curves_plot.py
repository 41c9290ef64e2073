"""Quality against the share of channels removed: a line per method, error bars over seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from moeprune.errors import InputError
from moeprune.report.figures.points import Compressed, bar_length
from moeprune.report.figures.style import (
    DENSE_LINE_COLOUR,
    TEXT_COLOUR,
    Look,
    draw_legend,
    draw_title,
    looks_of,
    panels_for,
    quiet_axes,
    set_round_ticks,
)
from moeprune.report.runs.seeds import Spread

MOST_ACROSS = 3
ROOM = 0.06
CHANNELS, EXPERTS = "-", (0, (4, 2))

Lines = Mapping[str, Sequence[Compressed]]


@dataclass(frozen=True)
class Curves:
    """What a figure shows of each point: a multiple of dense on a logarithmic axis, or points away from dense."""

    title: str
    label: str
    dense: float
    of: Callable[[Compressed], Spread | None]


PERPLEXITY = Curves(
    "Perplexity against channels removed", "mean perplexity / dense", 1.0, lambda point: point.perplexity
)
ACCURACY = Curves(
    "Accuracy against channels removed", "average accuracy - dense [points]", 0.0, lambda point: point.accuracy
)


def has_curves(points: Sequence[Compressed], curves: Curves) -> bool:
    """Whether some method was measured at two ratios with the same model and quantizer."""
    ratios: dict[tuple[str, str, str], set[float]] = {}
    for point in _measured(points, curves):
        ratios.setdefault((point.model, point.quantizer, point.method), set()).add(point.ratio)
    return any(len(found) > 1 for found in ratios.values())


def ratio_curves_figure(points: Sequence[Compressed], curves: Curves) -> Figure:
    """A panel for each model and quantizer with a line per method; for each model and method with a line per quantizer
    where there are more quantizers than methods. Raises InputError when there is nothing to draw.
    """
    measured = _measured(points, curves)
    if not measured:
        raise InputError("There is nothing to plot: no run with results removed channels and measured this.")
    methods, quantizers = ({getattr(point, key) for point in measured} for key in ("method", "quantizer"))
    of_panel, of_line = map(
        attrgetter, ("quantizer", "method") if len(methods) >= len(quantizers) else ("method", "quantizer")
    )
    every_look = looks_of(map(of_line, points))  # a method looks the same in figures that show more of them
    lines = {name: [point for point in measured if of_line(point) == name] for name in every_look}
    lines = {name: found for name, found in lines.items() if found}
    panels_of = list(dict.fromkeys((point.model, of_panel(point)) for point in measured))
    models = [model for model, _ in panels_of]
    panels_of.sort(key=lambda panel: (models.index(panel[0]), panel[1] != "none"))
    in_a_row = len({name for _, name in panels_of})  # a row per model where that fits
    across = in_a_row if 1 < in_a_row <= MOST_ACROSS else MOST_ACROSS
    figure, panels = panels_for(len(panels_of), across, 4.8, 3.7, 0.8)
    for panel, (model, name) in zip(panels, panels_of, strict=True):
        here = {
            line: [point for point in found if (point.model, of_panel(point)) == (model, name)]
            for line, found in lines.items()
        }
        _draw_panel(panel, here, every_look, curves)
        _set_height(panel, [point for point in measured if point.model == model], curves)
        panel.set_title(model if name == "none" else f"{model}, {name}", fontsize=11)
    draw_title(figure, curves.title)
    _draw_legend(figure, lines, every_look, 3 * min(len(panels_of), across))
    return figure


def _measured(points: Sequence[Compressed], curves: Curves) -> list[Compressed]:
    return [point for point in points if point.is_drawn and not point.is_reference and curves.of(point) is not None]


def _draw_panel(panel: Axes, lines: Lines, looks: Mapping[str, Look], curves: Curves) -> None:
    panel.axhline(curves.dense, color=DENSE_LINE_COLOUR, linestyle="--", linewidth=0.9, zorder=1)
    for name, points in lines.items():
        if points:
            _draw_line(panel, sorted(points, key=lambda point: point.ratio), looks[name], curves)
    ratios = sorted({point.ratio for points in lines.values() for point in points})
    panel.set_xticks([100 * ratio for ratio in ratios], [f"{100 * ratio:.3g}" for ratio in ratios])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.margins(x=ROOM)
    panel.annotate(
        "dense", (1, curves.dense), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        fontsize=8, color=TEXT_COLOUR,
    )  # fmt: skip
    quiet_axes(panel)
    panel.set_xlabel("routed-expert channels removed [%]")
    panel.set_ylabel(curves.label)


def _draw_line(panel: Axes, points: Sequence[Compressed], look: Look, curves: Curves) -> None:
    spreads = [spread for point in points if (spread := curves.of(point))]
    panel.errorbar(
        [100 * point.ratio for point in points],
        [spread.mean for spread in spreads],
        yerr=[bar_length(spread) for spread in spreads] if any(spread.std is not None for spread in spreads) else None,
        capsize=2.5,
        elinewidth=0.9,
        zorder=3,
        **_line_style(look, points[0].whole_experts),
    )


def _line_style(look: Look, whole_experts: bool) -> dict[str, Any]:
    face = "white" if whole_experts else look.colour
    return {
        "color": look.colour, "marker": look.marker, "markersize": 5, "markerfacecolor": face,
        "linestyle": EXPERTS if whole_experts else CHANNELS, "linewidth": 1.5,
    }  # fmt: skip


def _set_height(panel: Axes, points: Sequence[Compressed], curves: Curves) -> None:
    """The same height for all panels of a model, so that its quantizers can be compared."""
    spreads = [spread for point in points if (spread := curves.of(point))]
    low = min(curves.dense, *(spread.mean - bar_length(spread) for spread in spreads))
    high = max(curves.dense, *(spread.mean + bar_length(spread) for spread in spreads))
    if curves.dense == 0:
        room = ROOM * max(high - low, 1.0)
        panel.set_ylim(low - room, high + room)
        return
    low = max(low, 0.5 * min(1.0, *(spread.mean for spread in spreads)))  # a bar may reach below nothing
    room = max(high / low, 1.1) ** ROOM
    panel.set_yscale("log")
    panel.set_ylim(low / room, high * room)
    set_round_ticks(panel.yaxis, *panel.get_ylim())


def _draw_legend(figure: Figure, lines: Lines, looks: Mapping[str, Look], columns: int) -> None:
    handles, counts, whole_experts = [], set(), False
    for name, points in lines.items():
        removes_experts = all(point.whole_experts for point in points)
        label = "not quantised" if name == "none" else name
        handles.append(Line2D([], [], label=label, **_line_style(looks[name], removes_experts)))
        counts |= {point.perplexity.n for point in points}
        whole_experts |= removes_experts
    kinds = ["Solid, filled: channels removed. Dashed, hollow: whole experts."] if whole_experts else []
    bars = [f"Bars: one standard deviation over {_range(counts)} seeds."] if max(counts) > 1 else []
    draw_legend(figure, handles, min(columns, len(handles)), title="\n".join(kinds + bars), handlelength=3)


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
