"""The figures of a report: which ones its rows can fill, with titles and captions."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure as Drawing

from moeprune.report.documents.document import Figure
from moeprune.report.figures.diagnostics_plots import write_diagnostics_plots
from moeprune.report.figures.front_plot import front_figure
from moeprune.report.figures.methods_plot import crowded_sizes, methods_figure
from moeprune.report.figures.pareto_plot import pareto_figure
from moeprune.report.figures.points import Compressed, compressed
from moeprune.report.figures.published_plot import published_figure, published_pairs
from moeprune.report.figures.ratio_curves_plot import ACCURACY, PERPLEXITY, has_curves, ratio_curves_figure
from moeprune.report.figures.speed_plot import has_speed, speed_figure
from moeprune.report.figures.style import write_figure
from moeprune.report.runs.grid import Grid
from moeprune.report.runs.results import Run
from moeprune.report.runs.seeds import Row

KINDS = ("svg", "png")
DIAGNOSTICS = {
    "kept_channels": ("Kept channels", "Channels that each expert keeps; grey: experts that are gone."),
    "kept_widths": (
        "Kept widths",
        "How many experts keep how many channels, and the share of the scores that each layer keeps.",
    ),
    "score_concentration": (
        "Concentration of channel scores",
        "How unequal the scores of an expert's channels are. The further a curve hangs below the diagonal, the fewer "
        "channels hold most of the score.",
    ),
    "router_entropy": ("Router entropy", "Mean entropy of the router's choice for a token; dashed: all experts alike."),
}


def comparison_figures(rows: Sequence[Row], folder: Path) -> tuple[Figure, ...]:
    """Draw what the rows can fill into ``folder``, as SVG and PNG: quality by ratio, by method and by size; speed."""
    points = compressed(rows)
    return (*_curves(points, folder), *_sizes(points, folder), *_speed(points, folder))


def published_figures(tables: Sequence[str], rows: Sequence[Row], folder: Path) -> tuple[Figure, ...]:
    """Draw ours beside the averages that the printed tables have of the same models, where there are any."""
    pairs = published_pairs(tables, rows)
    if not pairs:
        return ()
    caption = (
        "Mean accuracy over the printed row's tasks. Hollow: of the printed numbers; filled: measured here, with one "
        "standard deviation where there are several seeds."
    )
    return (_drawn(published_figure(pairs), folder / "published", "Published and measured here", caption),)


def grid_figures(grids: Sequence[Grid], folder: Path) -> tuple[Figure, ...]:
    """Draw pruning against quantisation, where runs fill a grid of both."""
    if not grids:
        return ()
    caption = (
        "Mean perplexity by bytes with scales and unquantised tensors, a line per quantizer; points on the grey band "
        "are beaten by none that is as small. One run for each point."
    )
    return (_drawn(pareto_figure(grids), folder / "pareto", "Pruning and quantisation", caption),)


def diagnostics_figures(run: Run, folder: Path) -> tuple[Figure, ...]:
    """Draw a run's plan, where it wrote one down, into a folder below ``folder``. Raises InputError where that is
    damaged."""
    told, metrics = run.folder / "diagnostics.json", run.results
    if metrics is None or not told.exists():
        return ()
    own = folder / re.sub(r"[^A-Za-z0-9_.-]", "_", metrics.model)
    own.mkdir(exist_ok=True)
    written = write_diagnostics_plots(told, own)
    about = f"Run {run.name}: {metrics.method or metrics.scorer} at ratio {metrics.ratio:g}."
    return tuple(
        Figure(f"{title}: {metrics.model}", f"{caption} {about}", tuple(own / f"{name}.{kind}" for kind in KINDS))
        for name, (title, caption) in DIAGNOSTICS.items()
        if own / f"{name}.svg" in written
    )


def _curves(points: Sequence[Compressed], folder: Path) -> Iterator[Figure]:
    if has_curves(points, PERPLEXITY):
        caption = (
            "Mean perplexity as a multiple of the dense model's, by the share of routed-expert channels removed; lower "
            "is better. Dashed lines with hollow marks remove whole experts."
        )
        drawing = ratio_curves_figure(points, PERPLEXITY)
        yield _drawn(drawing, folder / "perplexity_by_ratio", PERPLEXITY.title, caption)
    if has_curves(points, ACCURACY):
        caption = (
            "Average accuracy over the tasks, in points beside the dense model's, by the share of routed-expert "
            "channels removed; higher is better."
        )
        yield _drawn(ratio_curves_figure(points, ACCURACY), folder / "accuracy_by_ratio", ACCURACY.title, caption)


def _sizes(points: Sequence[Compressed], folder: Path) -> Iterator[Figure]:
    """Of many points at one size a line for each; perplexity by bytes, unless that size is all there is."""
    crowded = crowded_sizes(points)
    if crowded:
        caption = (
            "Mean perplexity as a multiple of the dense model's, best first, of all that was run at one size; means "
            "over seeds, bars of one standard deviation."
        )
        yield _drawn(methods_figure(points), folder / "perplexity_by_method", "Methods at one size", caption)
    several = len({point.size_name for point in points if not point.is_reference}) > 1
    if any(point.is_drawn for point in points) and (several or not crowded):
        caption = (
            "Mean perplexity as a multiple of the dense model's, by bytes with scales and unquantised tensors. Points "
            "on the grey band are beaten by none that is as small (sizes within 2% count as equal); means over seeds, "
            "bars of one standard deviation."
        )
        yield _drawn(front_figure(points), folder / "perplexity_by_size", "Perplexity against size", caption)


def _speed(points: Sequence[Compressed], folder: Path) -> Iterator[Figure]:
    if has_speed(points):
        caption = (
            "Tokens per second as a multiple of the dense model's in the same run; bars: one standard deviation over "
            "seeds."
        )
        yield _drawn(speed_figure(points), folder / "speed", "Speed beside dense", caption)


def _drawn(drawing: Drawing, path: Path, title: str, caption: str) -> Figure:
    files = tuple(path.with_suffix(f".{kind}") for kind in KINDS)
    write_figure(drawing, *files)
    return Figure(title, caption, files)
