"""Figures of one run's diagnostics: score concentration, kept channels, coverage and router entropy."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moeprune.report.figures.diagnostics import Concentration, Coverage, Diagnostics, Numbers, load_diagnostics
from moeprune.report.figures.style import (
    COLOURS,
    DENSE_LINE_COLOUR,
    TEXT_COLOUR,
    empty_figure,
    quiet_axes,
    write_figure,
)

# From violet to green: the yellow end of viridis is too pale for lines on white.
LAYER_COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.85, 256)))
WIDTH_COLOURS = matplotlib.colormaps["cividis"]
REMOVED_COLOUR = "#E4E4E4"
MOST_LISTED_LAYERS = 8
MOST_NUMBERED_CELLS, MOST_NUMBERED_EXPERTS = 400, 32
MOST_WIDTHS = 32
SMALL = 8.5


def write_diagnostics_plots(path: Path, folder: Path) -> list[Path]:
    """Write the figures of a ``diagnostics.json``, each as PNG and SVG, into a folder; returns what was written.

    ``score_concentration`` only where channels have scores.
    """
    found = load_diagnostics(path)
    figures = {
        "kept_channels": kept_channels_figure(found),
        "kept_widths": kept_widths_figure(found),
        "router_entropy": router_entropy_figure(found),
    }
    if found.concentration is not None:
        figures["score_concentration"] = concentration_figure(found.concentration)
    written = []
    for name, figure in figures.items():
        files = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
        write_figure(figure, *files)
        written += files
    return written


def concentration_figure(found: Concentration) -> Figure:
    """Left the mean Lorenz curve of each layer's experts; right the Gini coefficients by layer."""
    figure = empty_figure(11, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    layers = len(found.lorenz_LX)
    shades = ScalarMappable(Normalize(0, max(1, layers - 1)), LAYER_COLOURS)
    colours = shades.to_rgba(np.arange(layers))
    listed = layers <= MOST_LISTED_LAYERS
    gini_L, top_L = _means(found.gini_LE), _means(found.top_tenth_LE)
    left.plot([0, 1], [0, 1], color=DENSE_LINE_COLOUR, linestyle="--", linewidth=0.9)
    left.text(0.5, 0.52, "all channels alike", rotation=45, ha="center", fontsize=SMALL, color=TEXT_COLOUR)
    for layer, curve_X in enumerate(found.lorenz_LX):
        label = f"layer {layer}: Gini {gini_L[layer]:.2f}, top 10% hold {100 * top_L[layer]:.0f}%" if listed else None
        left.plot(found.positions_X, curve_X, color=colours[layer], linewidth=1.6, label=label)
    if listed:
        left.legend(frameon=False, fontsize=SMALL, loc="upper left")
    else:
        figure.colorbar(shades, ax=left, label="MoE layer", shrink=0.8)
    left.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", title="Lorenz curves (mean over experts)")
    left.set(xlabel="share of channels, lowest score first", ylabel="share of the score they hold")
    quiet_axes(left)
    _draw_by_layer(right, found.gini_LE, found.layer_gini_L)
    right.set(ylabel="Gini coefficient", title="Concentration of channel scores", ylim=(0, 1))
    _title(figure, "How unequal are channels? 0: all alike; 1: one channel holds all")
    return figure


def kept_channels_figure(found: Diagnostics) -> Figure:
    """Heat map of kept channels: layers downwards, experts by index across; removed experts in grey."""
    layers, experts = found.kept_LE.shape
    figure = empty_figure(min(13, 2.6 + 0.42 * experts), min(10, 1.9 + 0.36 * layers))
    panel = figure.subplots()
    shades = WIDTH_COLOURS.with_extremes(bad=REMOVED_COLOUR)
    image = panel.imshow(
        np.where(found.kept_LE > 0, found.kept_LE, np.nan),
        cmap=shades, vmin=0, vmax=found.width, aspect="auto", interpolation="nearest",
    )  # fmt: skip
    if found.kept_LE.size <= MOST_NUMBERED_CELLS and experts <= MOST_NUMBERED_EXPERTS:
        for (layer, expert), kept in np.ndenumerate(found.kept_LE):
            dark = 0 < kept < 0.55 * found.width
            panel.text(
                expert, layer, f"{kept:.0f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    gone = "merged into another expert" if found.merged else "removed"
    panel.set(xlabel=f"expert (grey: {gone})", ylabel="MoE layer")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(16, integer=True))
    figure.colorbar(image, ax=panel, label=f"kept channels of {found.width}", pad=0.01, aspect=30)
    kept, total = found.kept_LE.sum(), found.kept_LE.size * found.width
    _title(figure, f"Kept channels: {kept:,.0f} of {total:,} ({100 * kept / total:.1f}%)")
    return figure


def kept_widths_figure(found: Diagnostics) -> Figure:
    """Left how many experts keep how many channels; right, where channels have scores, the coverage by layer."""
    figure = empty_figure(11 if found.coverage else 5.6, 4.2)
    panels = list(figure.subplots(1, 2 if found.coverage else 1, squeeze=False).flat)
    _draw_widths(panels[0], found)
    if found.coverage:
        _draw_coverage(panels[1], found.coverage)
    return figure


def router_entropy_figure(found: Diagnostics) -> Figure:
    """Mean router entropy of each layer beside its greatest possible value, ln E."""
    layers, experts = found.kept_LE.shape
    figure = empty_figure(min(12, 3.4 + 0.45 * layers), 3.8)
    panel = figure.subplots()
    panel.bar(range(layers), found.entropy_nats_L, color=COLOURS[0], width=0.7)
    most = math.log(experts)
    panel.axhline(most, color=TEXT_COLOUR, linestyle="--", linewidth=0.9)
    panel.annotate(
        f"ln {experts} = {most:.2f}: uniform routing", (1, most), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=SMALL, color=TEXT_COLOUR,
    )  # fmt: skip
    panel.set(ylabel="mean entropy per token (nats)", ylim=(0, 1.12 * most))
    _layers_across(panel, layers)
    quiet_axes(panel)
    panel.grid(visible=False, axis="x")
    _title(figure, "Router entropy")
    return figure


def _draw_by_layer(panel: Axes, expert_LE: Numbers, layer_L: Numbers) -> None:
    """A small dot per expert, a line for their mean, a diamond for the layer as a whole."""
    layers, experts = expert_LE.shape
    place_LE = np.repeat(np.arange(layers), experts).reshape(layers, experts)
    panel.plot(place_LE.flat, expert_LE.flat, ".", color=COLOURS[5], markersize=5, alpha=0.7, label="an expert")
    lefts = np.arange(layers) - 0.35
    panel.hlines(
        _means(expert_LE), lefts, lefts + 0.7, color=COLOURS[0], linewidth=2, zorder=3, label="mean of the experts"
    )
    panel.plot(range(layers), layer_L, "D", color=COLOURS[1], markersize=5, label="all channels of the layer")
    _layers_across(panel, layers)
    panel.legend(frameon=False, fontsize=SMALL, loc="best")
    quiet_axes(panel)


def _layers_across(panel: Axes, layers: int) -> None:
    panel.set(xlabel="MoE layer", xlim=(-0.6, layers - 0.4))
    panel.xaxis.set_major_locator(MaxNLocator(16, integer=True))


def _draw_widths(panel: Axes, found: Diagnostics) -> None:
    """A bar for each width that occurs; removed and complete experts in colours of their own."""
    widths = found.kept_LE.astype(int).ravel()
    step = max(math.gcd(found.width, *widths.tolist()), math.ceil(found.width / MOST_WIDTHS))
    partial = widths[(widths > 0) & (widths < found.width)]
    places, counts = np.unique(step * np.round(partial / step), return_counts=True)
    gone = "merged" if found.merged else "removed"
    bars: tuple[tuple[str, Any, Any, str], ...] = (
        (gone, [0], [int((widths == 0).sum())], DENSE_LINE_COLOUR),
        ("kept in part", places, counts, COLOURS[0]),
        ("complete", [found.width], [int((widths == found.width).sum())], COLOURS[4]),
    )
    for name, at, heights, colour in bars:
        if sum(heights):
            panel.bar(at, heights, width=0.85 * step, color=colour, label=f"{name}: {sum(heights)}")
    panel.set(xlabel=f"kept channels of {found.width}", ylabel="experts", title="Kept width")
    panel.set_xticks(range(0, found.width + 1, step * math.ceil(found.width / step / 8)))
    panel.set_ylim(top=1.15 * panel.get_ylim()[1])
    panel.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.legend(frameon=False, fontsize=SMALL, loc="upper center", ncols=3)
    quiet_axes(panel)


def _draw_coverage(panel: Axes, coverage: Coverage) -> None:
    _draw_by_layer(panel, coverage.expert_LE, coverage.layer_L)
    panel.set(ylabel="share of the channel scores that stays", ylim=(-0.02, 1.02))
    panel.set_title(
        f"Coverage {coverage.objective:.4g} of at most {coverage.upper_bound:.4g} (gap {100 * coverage.gap:.2f}%)"
    )


def _means(values_LE: Numbers) -> Numbers:
    """Mean over the numbers of each row; NaN, without numpy's warning, where there is none."""
    known_LE = ~np.isnan(values_LE)
    sums_L = np.where(known_LE, values_LE, 0).sum(axis=1)
    return np.divide(sums_L, known_LE.sum(axis=1), out=np.full(len(values_LE), np.nan), where=known_LE.any(axis=1))


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=12, fontweight="bold")
