"""What a sweep shows, in plain sentences."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from moeprune.report.runs.grid import Grid, GridPoint
from moeprune.report.runs.measures import MEAN_PERPLEXITY
from moeprune.report.runs.results import Metrics, Run
from moeprune.report.runs.seeds import Rivals, Row, rows_of
from moeprune.report.tables.formats import byte_unit, experts_text, perplexity_text, ratio_text
from moeprune.report.tables.grid_tables import grid_takeaway

MANY_RIVALS = 6
# From so many ratios on, what holds at all of them is said once.
MANY_RATIOS = 3
# Sizes up to this many times apart count as one.
ABOUT = 1.02


def takeaway(runs: Sequence[Run], grids: Sequence[Grid] = ()) -> str:
    """Per model and setting (a ratio with a quantizer), what has the lowest mean perplexity beside its rivals.

    Runs that differ in their seed alone are told as one, by their mean. Every setting is told, so that a method which
    wins at one ratio and loses at another is not shown at its best only; three ratios and more with the same methods
    first, second and last share a sentence. Of settings with a single run that has its place in a grid, the grid is
    told instead. Single entrants of one model that take about the same bytes, as different ratios and quantizers under
    one budget do, are compared with each other.
    """
    entrants = [Entrant(row.method, row) for row in rows_of(runs) if row.runs and not row.is_dense]
    rivals: dict[Rivals, list[Entrant]] = {}
    for entrant in entrants:
        if entrant.row.rivals is not None:
            rivals.setdefault(entrant.row.rivals, []).append(entrant)
    in_grids = {point.run for grid in grids for point in grid.points}
    told = [group for group in rivals.values() if len(group) > 1 or not group[0].run_names & in_grids]
    told, of_equal_bytes = _of_equal_bytes(told)
    sentences = [
        *map(grid_takeaway, grids), *map(_equal_bytes_takeaway, of_equal_bytes), *map(_settings_takeaway, _alike(told))
    ]  # fmt: skip
    references = dict.fromkeys(entrant.name for entrant in entrants if entrant.row.is_reference)
    if references:
        sentences.append(f"Not compared, for they remove no channels: {', '.join(references)}.")
    if unfinished := _told_together((run.status, run.name) for run in runs if not run.results):
        sentences.append(f"Not compared, for want of results: {unfinished}.")
    return "\n".join(sentences)


def _told_together(pairs: Iterable[tuple[str, str]]) -> str:
    """``run 2 (failed), runs 5, 6 (not started)`` from pairs of status and name."""
    names_of: dict[str, list[str]] = {}
    for status, name in pairs:
        names_of.setdefault(status, []).append(name)
    return ", ".join(f"run{'s' * (len(names) > 1)} {', '.join(names)} ({status})" for status, names in names_of.items())


@dataclass(frozen=True)
class Entrant:
    """Finished runs in the comparison that differ in their seed alone."""

    method: str
    row: Row
    name_alone: bool = False

    @property
    def run_names(self) -> set[str]:
        return {run.name for run in self.row.runs}

    @property
    def name(self) -> str:
        if self.name_alone:
            return self.method
        count = len(self.row.runs)
        return f"{self.method} ({f'mean of {count} runs' if count > 1 else f'run {self.row.runs[0].name}'})"

    @property
    def metrics(self) -> Metrics:
        """Of its first run, for what all of them have in common."""
        return self.row.results[0]

    @property
    def perplexity(self) -> float:
        """Mean perplexity; one that is not a number ranks last, as infinite."""
        found = self.row.spread(MEAN_PERPLEXITY.of)
        return math.inf if found is None or math.isnan(found.mean) else found.mean


def _of_equal_bytes(groups: Sequence[list[Entrant]]) -> tuple[list[list[Entrant]], list[list[Entrant]]]:
    """The groups that stay as they are, and the single entrants of each model where their bytes are about equal."""
    alone: dict[object, list[Entrant]] = {}
    for group in groups:
        if len(group) == 1:
            row = group[0].row
            alone.setdefault((row.model, row.experts_per_token, row.measured_on), []).append(group[0])
    equal = [found for found in alone.values() if len(found) > 1 and _span(found)[1] <= ABOUT * _span(found)[0]]
    gone = {id(entrant) for found in equal for entrant in found}
    return [group for group in groups if id(group[0]) not in gone], equal


def _span(entrants: Sequence[Entrant]) -> tuple[int, int]:
    sizes = [entrant.metrics.final.bytes.with_overhead for entrant in entrants]
    return min(sizes), max(sizes)


def _equal_bytes_takeaway(entrants: Sequence[Entrant]) -> str:
    unit_bytes, unit = byte_unit([entrants[0].metrics.dense.bytes.with_overhead])
    least, most = (size / unit_bytes for size in _span(entrants))
    several = len({each.method for each in entrants}) > 1
    sizes = [GridPoint("", each.metrics).name for each in entrants]
    named = [
        replace(each, method=f"{each.method} {size}" if several else size)
        for each, size in zip(entrants, sizes, strict=True)
    ]
    return _compared(named, f"{entrants[0].metrics.model} in {least:.2f} to {most:.2f} {unit}")


def _alike(groups: Sequence[list[Entrant]]) -> list[list[list[Entrant]]]:
    """The groups, best entrants first; those that differ in their ratio and numbers alone together, where many do."""
    found: dict[object, list[list[Entrant]]] = {}
    for number, group in enumerate(groups):
        rivals = sorted(group, key=lambda entrant: entrant.perplexity)
        metrics, first = rivals[0].metrics, [perplexity_text(entrant.perplexity) for entrant in rivals[:2]]
        runs = {len(entrant.row.runs) for entrant in rivals}
        clear = len(rivals) > 2 and first[0] != first[1] and math.isfinite(rivals[-1].perplexity) and len(runs) == 1
        places = tuple(rivals[place].method for place in (0, 1, -1)) if clear else number
        alike = metrics.model, metrics.experts_per_token, metrics.quantizer, metrics.measured_on
        of = (*alike, len(rivals), frozenset(runs), places)
        found.setdefault(of, []).append(rivals)
    return [
        part for alike in found.values() for part in ([alike] if len(alike) >= MANY_RATIOS else ([g] for g in alike))
    ]


def _settings_takeaway(groups: Sequence[list[Entrant]]) -> str:
    metrics = groups[0][0].metrics
    quantized = "without quantizer" if metrics.quantizer == "none" else f"with quantizer {metrics.quantizer}"
    experts = f" with {experts_text(metrics.experts_per_token)}" if metrics.experts_per_token else ""
    if len(groups) == 1:
        return _compared(groups[0], f"{metrics.model}{experts} at ratio {metrics.ratio:g} {quantized}")
    ratios = _listed(f"{rivals[0].metrics.ratio:g}" for rivals in groups)
    best, second, last = (groups[0][place].method for place in (0, 1, -1))
    to_dense = (rivals[0].perplexity / rivals[0].metrics.dense.mean_perplexity for rivals in groups)
    to_best = [[rivals[place].perplexity / rivals[0].perplexity for rivals in groups] for place in (1, -1)]
    behind, least = (_listed(map(ratio_text, ratios_to_best)) for ratios_to_best in to_best)
    return (
        f"{metrics.model}{experts} {quantized}, at ratios {ratios}: {best} has the lowest mean perplexity of "
        f"{_counted(groups[0])} at each, {_listed(map(ratio_text, to_dense))} times dense; {second} follows with "
        f"{behind} times as much, and {last} is last with {least} times as much."
    )


def _listed(texts: Iterable[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} and {last}"


def _compared(entrants: Sequence[Entrant], where: str) -> str:
    rivals = _named(sorted(entrants, key=lambda entrant: entrant.perplexity))
    best, metrics = rivals[0], rivals[0].metrics
    if math.isinf(best.perplexity):
        return f"{where}: no run has a finite mean perplexity."
    to_dense = ratio_text(best.perplexity / metrics.dense.mean_perplexity)
    lowest = f"{perplexity_text(best.perplexity)} ({to_dense} times dense)"
    return f"{where}: {_standing(rivals, lowest)}. {_size(best)}."


def _named(rivals: Sequence[Entrant]) -> list[Entrant]:
    """By the method alone where all of several are means of as many runs, which `_counted` says once for all."""
    counts = {len(rival.row.runs) for rival in rivals}
    shared = len(rivals) > 1 and len(counts) == 1 and counts != {1}
    return [replace(rival, name_alone=True) for rival in rivals] if shared else list(rivals)


def _standing(rivals: Sequence[Entrant], lowest: str) -> str:
    """Who has the lowest mean perplexity, who comes next (two of many) and who last; equal readings are level."""
    best, count = rivals[0], _counted(rivals)
    level = [rival for rival in rivals if perplexity_text(rival.perplexity) == perplexity_text(best.perplexity)]
    behind = rivals[len(level) :]
    if len(rivals) == 1:
        return f"{best.name} is the only {'run' if len(best.row.runs) == 1 else 'row'}, with mean perplexity {lowest}"
    if not behind:
        return f"all {count} have the same mean perplexity, {lowest}"
    if len(level) == 1:
        first = f"{best.name} has the lowest mean perplexity of {count}, {lowest}"
    else:
        shared = " and ".join(rival.name for rival in level)
        first = f"{shared} share the lowest mean perplexity of {count}, {lowest}"
    compared = f"{behind[0].name} follows with {_against(behind[0], best)}"
    if len(rivals) > MANY_RIVALS and len(behind) > 2:
        compared += f", then {behind[1].name} with {_against(behind[1], best)}"
    if len(behind) > 1:
        compared += f", and {behind[-1].name} is last with {_against(behind[-1], best)}"
    return f"{first}; {compared}"


def _counted(rivals: Sequence[Entrant]) -> str:
    """How many are compared: runs, or rows of several runs each."""
    counts = {len(rival.row.runs) for rival in rivals}
    if counts == {1}:
        return f"{len(rivals)} runs"
    return f"{len(rivals)} rows" + (f" (means of {counts.pop()} runs)" if len(counts) == 1 else "")


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
