"""Methods or recoveries at one size, told apart: perplexity beside dense, one line per run, best first."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moeprune.errors import InputError
from moeprune.report.figures import (
    COLOURS,
    DENSE_LINE_COLOUR,
    JOIN_COLOUR,
    TEXT_COLOUR,
    empty_figure,
    quiet_axes,
    set_round_ticks,
    write_figure,
)
from moeprune.report.formats import ratio_text
from moeprune.report.results import Metrics, Run
from moeprune.report.settings import run_labels

FEW_RUNS, FEW_RECOVERIES = 6, 2
PANELS_PER_ROW = 2
LINE_HEIGHT, HEAD_HEIGHT = 0.24, 1.1


@dataclass(frozen=True)
class Line:
    """One run: its name, its mean perplexity as a multiple of the dense model's, whether it is a reference only, and
    the seconds of its recovery, where it has one."""

    name: str
    to_dense: float
    is_reference: bool
    recovery_seconds: float | None

    @property
    def text(self) -> str:
        """What stands beside the dot."""
        number = ratio_text(self.to_dense) if self.is_drawn else "not finite"
        return number if self.recovery_seconds is None else f"{number}  ({self.recovery_seconds:,.0f} s)"

    @property
    def is_drawn(self) -> bool:
        return math.isfinite(self.to_dense)


def crowded_sizes(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """The models, ratios and quantizers with more than six finished runs, or with three and more of which some were
    recovered; and these runs, best first."""
    finished = [run for run in runs if run.results]
    sizes: dict[str, list[Line]] = {}
    for run, label in zip(finished, run_labels(finished), strict=True):
        if run.results:
            sizes.setdefault(_size(run.results), []).append(_line(label, run.results))
    return {size: sorted(lines, key=_rank) for size, lines in sizes.items() if _is_crowded(lines)}


def _is_crowded(lines: Sequence[Line]) -> bool:
    recovered = any(line.recovery_seconds is not None for line in lines)
    return len(lines) > (FEW_RECOVERIES if recovered else FEW_RUNS)


def plot_methods(runs: Sequence[Run], path: Path) -> None:
    """Write the figure as a PNG; ``path`` changes only once it is complete. Raises InputError as below."""
    write_figure(methods_figure(runs), path)


def methods_figure(runs: Sequence[Run]) -> Figure:
    """A panel for each crowded size. Raises InputError when there is none."""
    sizes = crowded_sizes(runs)
    if not sizes:
        raise InputError(f"There is nothing to plot: no size has more than {FEW_RUNS} finished runs.")
    across = min(len(sizes), PANELS_PER_ROW)
    down = math.ceil(len(sizes) / across)
    height = HEAD_HEIGHT + LINE_HEIGHT * max(map(len, sizes.values()))
    figure = empty_figure(7 * across, 0.4 + height * down)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, (size, lines) in zip(panels, sizes.items(), strict=False):
        _draw_panel(panel, size, lines)
    for panel in panels[len(sizes) :]:
        panel.set_axis_off()
    recovered = any(line.recovery_seconds is not None for lines in sizes.values() for line in lines)
    title = "Recoveries by perplexity (seconds of training)" if recovered else "Methods by perplexity"
    figure.suptitle(title, fontsize=13, fontweight="bold")
    return figure


def _draw_panel(panel: Axes, size: str, lines: Sequence[Line]) -> None:
    drawn = [line.to_dense for line in lines if line.is_drawn] or [1.0]
    low, high = min(1.0, *drawn), max(1.0, *drawn)
    room = max(high / low, 1.2) ** 0.08
    panel.set_xscale("log")
    panel.set_xlim(low / room, high * room**3)  # room for the number to the right of the last dot
    set_round_ticks(panel.xaxis, *panel.get_xlim())
    quiet_axes(panel)
    panel.grid(visible=False, axis="y")
    panel.axvline(1, color=DENSE_LINE_COLOUR, linestyle="--", linewidth=0.9)
    best = next((line for line in lines if line.is_drawn and not line.is_reference), None)
    for place, line in enumerate(lines):
        end = line.to_dense if line.is_drawn else 1.0
        if line.is_drawn:
            panel.plot([1, end], [place, place], color=JOIN_COLOUR, linewidth=1.2, zorder=2)
            colour = TEXT_COLOUR if line.is_reference else COLOURS[1 if line is best else 0]
            fill = "white" if line.is_reference else colour
            panel.plot(end, place, "o", color=colour, markerfacecolor=fill, markersize=6, zorder=3)
        panel.annotate(
            line.text, (max(1, end), place), (7, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=TEXT_COLOUR,
        )  # fmt: skip
    panel.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=9)
    panel.set_ylim(len(lines) - 0.4, -0.6)
    panel.set_title(size, fontsize=11)
    panel.set_xlabel("mean perplexity / dense (logarithmic; dashed: dense)")


def _size(metrics: Metrics) -> str:
    quantizer = "" if metrics.quantizer == "none" else f", {metrics.quantizer}"
    return f"{metrics.model}, {100 * metrics.ratio:g}% removed{quantizer}"


def _line(label: str, metrics: Metrics) -> Line:
    to_dense = metrics.final.mean_perplexity / metrics.dense.mean_perplexity
    name = f"{label} (removes no channels)" if metrics.is_reference else label
    details = metrics.recovery_details
    return Line(name, to_dense, metrics.is_reference, details.seconds if details else None)


def _rank(line: Line) -> float:
    return line.to_dense if line.is_drawn else math.inf
