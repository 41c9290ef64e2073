"""What a sweep shows, in plain sentences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeprune.report.formats import byte_unit, perplexity_text, ratio_text
from moeprune.report.grid import Grid, GridPoint
from moeprune.report.grid_tables import grid_takeaway
from moeprune.report.results import Metrics, Run
from moeprune.report.settings import run_labels

MANY_RIVALS = 6
# Sizes up to this many times apart count as one.
ABOUT = 1.02


def takeaway(runs: Sequence[Run], grids: Sequence[Grid] = ()) -> str:
    """Per model and setting (a ratio with a quantizer), the run of lowest mean perplexity beside its rivals.

    Every setting is told, so that a method which wins at one ratio and loses at another is not shown at its best only.
    Of settings with a single run that has its place in a grid, the grid is told instead. Single runs of one model that
    take about the same bytes, as different ratios and quantizers under one budget do, are compared with each other.
    """
    finished = [run for run in runs if run.results]
    entrants = [
        Entrant(label, run.name, run.results)
        for run, label in zip(finished, run_labels(finished), strict=True)
        if run.results
    ]
    rivals: dict[tuple[str, float, str], list[Entrant]] = {}
    for entrant in entrants:
        metrics = entrant.metrics
        if metrics.is_reference:
            continue
        rivals.setdefault((metrics.model, metrics.ratio, metrics.quantizer), []).append(entrant)
    in_grids = {point.run for grid in grids for point in grid.points}
    told = [group for group in rivals.values() if len(group) > 1 or group[0].run not in in_grids]
    told, of_equal_bytes = _of_equal_bytes(told)
    sentences = [
        *map(grid_takeaway, grids), *map(_equal_bytes_takeaway, of_equal_bytes), *map(_setting_takeaway, told)
    ]  # fmt: skip
    references = [entrant.name for entrant in entrants if entrant.metrics.is_reference]
    if references:
        sentences.append(
            f"Not compared, for they remove no channels and are as large as dense: {', '.join(references)}."
        )
    unfinished = [f"run {run.name} ({run.status})" for run in runs if not run.results]
    if unfinished:
        sentences.append(f"Not compared, for want of results: {', '.join(unfinished)}.")
    return "\n".join(sentences)


@dataclass(frozen=True)
class Entrant:
    """A finished run in the comparison."""

    method: str
    run: str
    metrics: Metrics

    @property
    def name(self) -> str:
        return f"{self.method} (run {self.run})"

    @property
    def perplexity(self) -> float:
        """Mean perplexity; one that is not a number ranks last, as infinite."""
        perplexity = self.metrics.final.mean_perplexity
        return math.inf if math.isnan(perplexity) else perplexity


def _of_equal_bytes(groups: Sequence[list[Entrant]]) -> tuple[list[list[Entrant]], list[list[Entrant]]]:
    """The groups that stay as they are, and the single runs of each model where their bytes are about equal."""
    alone: dict[str, list[Entrant]] = {}
    for group in groups:
        if len(group) == 1:
            alone.setdefault(group[0].metrics.model, []).append(group[0])
    equal = [found for found in alone.values() if len(found) > 1 and _span(found)[1] <= ABOUT * _span(found)[0]]
    runs = {entrant.run for found in equal for entrant in found}
    return [group for group in groups if group[0].run not in runs], equal


def _span(entrants: Sequence[Entrant]) -> tuple[int, int]:
    sizes = [entrant.metrics.final.bytes.with_overhead for entrant in entrants]
    return min(sizes), max(sizes)


def _equal_bytes_takeaway(entrants: Sequence[Entrant]) -> str:
    unit_bytes, unit = byte_unit([entrants[0].metrics.dense.bytes.with_overhead])
    least, most = (size / unit_bytes for size in _span(entrants))
    named = [replace(each, method=GridPoint(each.run, each.metrics).name) for each in entrants]
    return _compared(named, f"{entrants[0].metrics.model} in {least:.2f} to {most:.2f} {unit}")


def _setting_takeaway(entrants: Sequence[Entrant]) -> str:
    metrics = entrants[0].metrics
    quantized = "without quantizer" if metrics.quantizer == "none" else f"with quantizer {metrics.quantizer}"
    return _compared(entrants, f"{metrics.model} at ratio {metrics.ratio:g} {quantized}")


def _compared(entrants: Sequence[Entrant], where: str) -> str:
    rivals = sorted(entrants, key=lambda entrant: entrant.perplexity)
    best, metrics = rivals[0], rivals[0].metrics
    if math.isinf(best.perplexity):
        return f"{where}: no run has a finite mean perplexity."
    to_dense = ratio_text(best.perplexity / metrics.dense.mean_perplexity)
    lowest = f"{perplexity_text(best.perplexity)} ({to_dense} times dense)"
    return f"{where}: {_standing(rivals, lowest)}. {_size(best)}."


def _standing(rivals: Sequence[Entrant], lowest: str) -> str:
    """Who has the lowest mean perplexity, who comes next (two of many) and who last; equal readings are level."""
    best = rivals[0]
    level = [rival for rival in rivals if perplexity_text(rival.perplexity) == perplexity_text(best.perplexity)]
    behind = rivals[len(level) :]
    if len(rivals) == 1:
        return f"{best.name} is the only run, with mean perplexity {lowest}"
    if not behind:
        return f"all {len(rivals)} runs have the same mean perplexity, {lowest}"
    if len(level) == 1:
        first = f"{best.name} has the lowest mean perplexity of {len(rivals)} runs, {lowest}"
    else:
        shared = " and ".join(rival.name for rival in level)
        first = f"{shared} share the lowest mean perplexity of {len(rivals)} runs, {lowest}"
    compared = f"{behind[0].name} follows with {_against(behind[0], best)}"
    if len(rivals) > MANY_RIVALS and len(behind) > 2:
        compared += f", then {behind[1].name} with {_against(behind[1], best)}"
    if len(behind) > 1:
        compared += f", and {behind[-1].name} is last with {_against(behind[-1], best)}"
    return f"{first}; {compared}"


def _against(rival: Entrant, best: Entrant) -> str:
    if math.isinf(rival.perplexity):
        return "one that is not finite"
    ratio = rival.perplexity / best.perplexity
    higher = f"{100 * (ratio - 1):.1f}% higher" if ratio < 2 else f"{ratio_text(ratio)} times as high"
    return f"{perplexity_text(rival.perplexity)} ({higher})"


def _size(entrant: Entrant) -> str:
    final, dense = entrant.metrics.final.bytes.with_overhead, entrant.metrics.dense.bytes.with_overhead
    unit_bytes, unit = byte_unit([dense])
    relation = f"{dense / final:.2f} times smaller" if final <= dense else f"{final / dense:.2f} times larger"
    return (
        f"{entrant.name} takes {final / unit_bytes:.2f} {unit} with overhead against {dense / unit_bytes:.2f} {unit} "
        f"dense ({relation})"
    )
