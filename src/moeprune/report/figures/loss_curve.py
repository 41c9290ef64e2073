"""``loss_curve.jsonl`` of a recovery: read into arrays, and drawn."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moeprune.errors import InputError
from moeprune.report.figures.diagnostics import Numbers
from moeprune.report.figures.style import COLOURS, empty_figure, quiet_axes, write_figure

LOSS, VALIDATION = "loss", "validation_loss"
# What a line says beside the loss and its terms.
NO_TERMS = ("step", "learning_rate", "gradient_norm", "tokens", "seconds", LOSS, VALIDATION)
# A rate that ends at 0 leaves the logarithmic axis at this fraction of the smallest peak.
LEAST_RATE = 1e-2
FEW_POINTS = 40


@dataclass(frozen=True)
class LossCurve:
    """What was measured at each of P points: losses in nats per label, and each group's learning rate.

    ``terms`` are those of which the loss is made, where there are several; NaN: not measured at that point.
    """

    steps_P: Numbers
    loss_P: Numbers
    validation_P: Numbers
    terms: Mapping[str, Numbers]
    rates: Mapping[str, Numbers]
    tokens: int


def load_loss_curve(path: Path) -> LossCurve:
    """Read the file. Raises InputError when it is empty or damaged, or a line lacks an entry."""
    try:
        points = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        terms = dict.fromkeys(name for point in points for name in point if name not in NO_TERMS)
        groups = dict.fromkeys(name for point in points for name in point["learning_rate"])
        return LossCurve(
            steps_P=_numbers(point["step"] for point in points),
            loss_P=_numbers(point[LOSS] for point in points),
            validation_P=_numbers(point.get(VALIDATION) for point in points),
            terms={name: _numbers(point.get(name) for point in points) for name in terms},
            rates={name: _numbers(point["learning_rate"].get(name) for point in points) for name in groups},
            tokens=points[-1]["tokens"],
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is damaged or lacks an entry: {error}.", change="Run again.") from error


def write_loss_curve_plot(path: Path, title: str) -> list[Path]:
    """Draw a ``loss_curve.jsonl`` as PNG and SVG beside it; returns what was written. Raises as `load_loss_curve`."""
    files = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
    write_figure(loss_curve_figure(load_loss_curve(path), title), *files)
    return files


def loss_curve_figure(curve: LossCurve, title: str) -> Figure:
    """Left the losses, right the learning rates, by optimizer step."""
    figure = empty_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _draw_losses(left, curve)
    _draw_rates(right, curve)
    for panel in (left, right):
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        panel.legend(frameon=False, fontsize=9, loc="best")
        quiet_axes(panel)
    left.set_xlabel(f"optimizer step ({curve.tokens:,} training tokens in all)")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def _draw_losses(panel: Axes, curve: LossCurve) -> None:
    marker = "o" if len(curve.steps_P) <= FEW_POINTS else ""
    panel.plot(
        curve.steps_P, curve.loss_P, color=COLOURS[0], marker=marker, markersize=3.5, linewidth=1.6,
        label="training loss",
    )  # fmt: skip
    for colour, (name, values_P) in zip(COLOURS[2:], curve.terms.items(), strict=False):
        panel.plot(curve.steps_P, values_P, color=colour, linewidth=1.1, label=name.replace("_", " "))
    known_P = np.isfinite(curve.validation_P)
    if known_P.any():
        panel.plot(
            curve.steps_P[known_P], curve.validation_P[known_P], "D--", color=COLOURS[1], markersize=5, linewidth=1.2,
            label="validation loss",
        )  # fmt: skip
    panel.set(ylabel="nats per label", title="Loss")


def _draw_rates(panel: Axes, curve: LossCurve) -> None:
    peaks = {name: float(np.nanmax(rate_P)) for name, rate_P in curve.rates.items()}
    for colour, (name, rate_P) in zip(COLOURS, curve.rates.items(), strict=False):
        panel.plot(curve.steps_P, np.where(rate_P > 0, rate_P, np.nan), color=colour, linewidth=1.6, label=name)
    panel.set_yscale("log")
    if any(peaks.values()):
        panel.set_ylim(LEAST_RATE * min(peak for peak in peaks.values() if peak), 3 * max(peaks.values()))
    panel.set_title("Learning rate (logarithmic)")


def _numbers(values: Iterable[float | None]) -> Numbers:
    return np.array(list(values), dtype=np.float64)  # None becomes NaN
