"""What figures draw: one point for the runs that differ in their seed only."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.report.figures.labels import Point
from moeprune.report.runs.measures import BYTES, DECODE, GAINED_ACCURACY, PREFILL, TO_DENSE
from moeprune.report.runs.results import Metrics
from moeprune.report.runs.seeds import Row, Spread

# What these allocators remove or merge are whole experts; all others choose channels.
WHOLE_EXPERT_ALLOCATORS = (
    "whole_experts", "whole_experts_by_importance", "whole_experts_global", "merge_dominant", "merge_linkage",
)  # fmt: skip


@dataclass(frozen=True)
class Compressed:
    """A model compressed in one way, measured over seeds, beside the dense model of the same runs.

    ``bytes`` with overhead; ``perplexity``, ``prefill`` and ``decode`` are multiples of dense, ``accuracy`` is the
    average's distance from dense in points. ``is_reference``: nothing was removed although a ratio was asked for.
    ``recovery_seconds``: what its recoveries took on average; None without one.
    """

    model: str
    method: str
    ratio: float
    quantizer: str
    whole_experts: bool
    is_reference: bool
    bytes: float
    dense_bytes: int
    perplexity: Spread
    accuracy: Spread | None = None
    prefill: Spread | None = None
    decode: Spread | None = None
    recovery_seconds: float | None = None

    @property
    def size_name(self) -> str:
        """``50% nf4``: how much was removed, and how the rest is stored."""
        percent = "no channels removed" if self.is_reference else f"{100 * self.ratio:.3g}%"
        return percent if self.quantizer == "none" else f"{percent} {self.quantizer}"

    @property
    def is_drawn(self) -> bool:
        return math.isfinite(self.perplexity.mean)


def compressed(rows: Sequence[Row]) -> list[Compressed]:
    """A point for each row with results, but for the dense ones."""
    points = []
    for row in rows:
        perplexity, size = row.spread(TO_DENSE.of), row.spread(BYTES.of)
        if row.is_dense or row.ratio is None or row.quantizer is None or perplexity is None or size is None:
            continue
        metrics = row.results[0]
        experts = "" if row.experts_per_token is None else f", top-{row.experts_per_token}"
        points.append(
            Compressed(
                model=f"{row.model}{experts}",
                method=row.method,
                ratio=row.ratio,
                quantizer=row.quantizer,
                whole_experts=metrics.allocator in WHOLE_EXPERT_ALLOCATORS,
                is_reference=row.is_reference,
                bytes=size.mean,
                dense_bytes=metrics.dense.bytes.with_overhead,
                perplexity=perplexity,
                accuracy=row.spread(GAINED_ACCURACY.of),
                prefill=row.spread(PREFILL.of),
                decode=row.spread(DECODE.of),
                recovery_seconds=_recovery_seconds(row.results),
            )
        )
    return points


def _recovery_seconds(results: Sequence[Metrics]) -> float | None:
    seconds = [metrics.recovery_details.seconds for metrics in results if metrics.recovery_details]
    return statistics.fmean(seconds) if seconds else None


def bar_length(spread: Spread) -> float:
    """Half of an error bar: one standard deviation; none where it is not known."""
    return 0.0 if spread.std is None or not math.isfinite(spread.std) else spread.std


def front(points: Sequence[Point], about: float = 1.0) -> list[Point]:
    """The points that no other one is below while it is as small, from left to right.

    As small: at most ``about`` times as far to the right.
    """
    found = {one for one in points if not any(_beats(other, one, about) for other in points)}
    return sorted(found)


def _beats(one: Point, other: Point, about: float) -> bool:
    return one[0] <= about * other[0] and (one[1] < other[1] or (one[1] == other[1] and one[0] < other[0]))
