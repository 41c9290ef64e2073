"""What all figures share: colours, quiet axes, and files that appear whole."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from moeprune.report.documents.files import written_whole

# Colours of Okabe and Ito, which colour-blind readers tell apart; without their yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DENSE_COLOUR, DENSE_LINE_COLOUR, JOIN_COLOUR, TEXT_COLOUR = "#222222", "#999999", "#C8C8C8", "#333333"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one more than colours: 42 looks before one comes again
FRONT_COLOUR = "#D9D9D9"
FRONT_LOOK: dict[str, Any] = {"linewidth": 7.0, "solid_capstyle": "round", "solid_joinstyle": "round", "zorder": 2}
DOTS_PER_INCH = 150
DECADE_STEPS = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 3), (1,))
MOST_TICKS = 8
LEGEND_LINE_HEIGHT, LEGEND_LETTERS_PER_INCH = 0.2, 15


def empty_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that arranges its panels by itself, without pyplot's global state."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class Look:
    """How one method, or quantizer, is drawn in all panels of a figure."""

    colour: str
    marker: str


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """A look for each different name, in their order."""
    looks = (Look(colour, marker) for colour, marker in zip(cycle(COLOURS), cycle(MARKERS), strict=False))
    return dict(zip(dict.fromkeys(names), looks, strict=False))


def panels_for(count: int, most_across: int, width: float, height: float, head: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels of this size in inches, and ``head`` inches above and below them together."""
    across = min(count, most_across)
    down = math.ceil(count / across)
    figure = empty_figure(width * across, head + height * down)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def draw_title(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=13, fontweight="bold")


def draw_legend(figure: Figure, handles: Sequence[Artist], columns: int, title: str = "", **settings: Any) -> None:
    """Below the panels, in at most ``columns`` columns and no more than fit, under a title that wraps.

    The figure grows by the legend's lines, and by those of the title but the first.
    """
    width = int(LEGEND_LETTERS_PER_INCH * figure.get_figwidth())
    lines = [part for line in title.splitlines() for part in wrap(line, width)]
    while True:
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5,
            title="\n".join(lines) or None, title_fontsize=9, labelcolor=TEXT_COLOUR, **settings,
        )  # fmt: skip
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
        columns -= 1
    added = math.ceil(len(handles) / columns) + max(0, len(lines) - 1)
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE_HEIGHT * added)


def quiet_axes(panel: Axes) -> None:
    """No frame above and to the right, and a pale grid behind what is drawn."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#EEEEEE", linewidth=0.8)
    panel.set_axisbelow(True)


def set_log_scales(panel: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Logarithmic axes with plain numbers, and room for labels around the points."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(_limits(xs, room=0.12))
    panel.set_ylim(_limits(ys, room=0.16))
    set_round_ticks(panel.xaxis, *panel.get_xlim())
    set_round_ticks(panel.yaxis, *panel.get_ylim())
    quiet_axes(panel)


def _limits(values: Sequence[float], room: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = max(high / low, 1.2) ** room
    return low / margin, high * margin


def set_round_ticks(axis: Axis, low: float, high: float) -> None:
    """A few round numbers on a logarithmic axis from ``low`` to ``high``, written plainly."""
    ticks = _round_numbers(low, high)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([f"{tick:,g}" for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def _round_numbers(low: float, high: float) -> list[float]:
    """A few round numbers from ``low`` to ``high``: evenly spaced over a short range, by decades over a long one."""
    if high / low < 4:
        return [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    grids = [[step * 10.0**decade for decade in decades for step in steps] for steps in DECADE_STEPS]
    choices = [[tick for tick in grid if low <= tick <= high] for grid in grids]
    return next((ticks for ticks in choices if len(ticks) <= MOST_TICKS), choices[-1])


def write_figure(figure: Figure, *paths: Path) -> None:
    """Write PNGs at 150 dpi and SVGs, by the endings of ``paths``; the same figure gives the same bytes."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # arranged once for all files: it costs as much as drawing
    for path in paths:
        kind = path.suffix.removeprefix(".")
        undated = {"Date": None} if kind == "svg" else {}
        with written_whole(path) as partial, matplotlib.rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(partial, format=kind, dpi=DOTS_PER_INCH, metadata=undated)
