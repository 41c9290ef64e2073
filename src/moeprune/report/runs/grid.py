"""Pruning against quantisation: the runs of a sweep that fill a grid of ratios and quantizers, and its Pareto front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from moeprune.report.runs.results import Metrics, Run
from moeprune.report.runs.settings import run_labels

# Of a grid that fewer runs than this fraction fill, too little is known to speak of the best.
LEAST_FILLED = 0.75
# Budgets, as how many times smaller than the dense model.
TIMES_SMALLER = (1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16)


@dataclass(frozen=True)
class GridPoint:
    """A finished run at its place in the grid."""

    run: str
    metrics: Metrics

    @property
    def ratio(self) -> float:
        return self.metrics.ratio

    @property
    def quantizer(self) -> str:
        return self.metrics.quantizer

    @property
    def name(self) -> str:
        percent = f"{100 * self.ratio:g}%"
        return percent if self.quantizer == "none" else f"{percent} {self.quantizer}"

    @property
    def perplexity(self) -> float:
        return self.metrics.final.mean_perplexity

    @property
    def to_dense(self) -> float:
        return self.perplexity / self.metrics.dense.mean_perplexity

    @property
    def bytes(self) -> int:
        """With scales and unquantised tensors."""
        return self.metrics.final.bytes.with_overhead

    @property
    def bits(self) -> float | None:
        """Nominal bits of a routed expert's weight; None where the run did not write them down."""
        return self.metrics.final.expert_bits


@dataclass(frozen=True)
class Grid:
    """The runs of one model and method by ratio and quantizer; a few places may be empty.

    ``quantizers`` come with the most bits first, ``ratios`` with the smallest.
    """

    model: str
    method: str
    ratios: tuple[float, ...]
    quantizers: tuple[str, ...]
    point_of: Mapping[tuple[float, str], GridPoint]

    @property
    def points(self) -> list[GridPoint]:
        return list(self.point_of.values())

    @property
    def dense_bytes(self) -> int:
        return self.points[0].metrics.dense.bytes.with_overhead

    @cached_property
    def front(self) -> tuple[GridPoint, ...]:
        """The points that no other one beats in bytes and perplexity at once, smallest first."""
        finite = [point for point in self.points if math.isfinite(point.perplexity)]
        return tuple(
            sorted(
                (point for point in finite if not any(_beats(other, point) for other in finite)),
                key=lambda point: point.bytes,
            )
        )

    def of_quantizer(self, quantizer: str) -> list[GridPoint]:
        """One line of the grid, smallest ratio first."""
        keys = ((ratio, quantizer) for ratio in self.ratios)
        return [self.point_of[key] for key in keys if key in self.point_of]

    def bits_of(self, quantizer: str) -> float | None:
        """Nominal bits of a routed expert's weight."""
        return self.of_quantizer(quantizer)[0].bits

    def budgets(self) -> dict[float, float]:
        """Times smaller than the dense model -> bytes, for every budget that some point meets."""
        smallest = min(point.bytes for point in self.points)
        found = {times: self.dense_bytes / times for times in TIMES_SMALLER}
        return {times: budget for times, budget in found.items() if smallest <= budget}


def best_within(points: Sequence[GridPoint], budget: float) -> GridPoint | None:
    """The lowest perplexity, of equal ones the fewest bytes, among points of at most ``budget`` bytes."""
    fitting = [point for point in points if point.bytes <= budget and math.isfinite(point.perplexity)]
    return min(fitting, key=lambda point: (point.perplexity, point.bytes), default=None)


def find_grids(runs: Sequence[Run]) -> list[Grid]:
    """A grid for every model and method whose finished runs fill one of at least 2 x 2 places, most of them.

    Runs that remove no channels although a ratio was asked for are as large as dense and have no place in it.
    """
    finished = [run for run in runs if run.results]
    found: dict[tuple[str, str], dict[tuple[float, str], GridPoint]] = {}
    for run, label in zip(finished, run_labels(finished), strict=True):
        if run.results and not run.results.is_reference:
            point = GridPoint(run.name, run.results)
            found.setdefault((run.results.model, label), {}).setdefault((point.ratio, point.quantizer), point)
    grids = [_grid(model, method, point_of) for (model, method), point_of in found.items()]
    return [grid for grid in grids if _is_filled(grid)]


def _grid(model: str, method: str, point_of: Mapping[tuple[float, str], GridPoint]) -> Grid:
    bits: dict[str, list[float]] = {}
    for point in point_of.values():
        bits.setdefault(point.quantizer, []).append(8 * point.bytes / point.metrics.final.parameters.total)
    quantizers = sorted(bits, key=lambda quantizer: -sum(bits[quantizer]) / len(bits[quantizer]))
    ratios = sorted({ratio for ratio, _ in point_of})
    return Grid(model, method, tuple(ratios), tuple(quantizers), point_of)


def _is_filled(grid: Grid) -> bool:
    places = len(grid.ratios) * len(grid.quantizers)
    return min(len(grid.ratios), len(grid.quantizers)) > 1 and len(grid.point_of) >= LEAST_FILLED * places


def _beats(one: GridPoint, other: GridPoint) -> bool:
    """Whether ``one`` is no worse in either and better in one."""
    no_worse = one.bytes <= other.bytes and one.perplexity <= other.perplexity
    return no_worse and (one.bytes, one.perplexity) != (other.bytes, other.perplexity)
