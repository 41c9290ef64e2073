"""Is one method better than another, or were its seeds? Paired comparisons on the same seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy import stats

from moeprune.report.runs.seeds import Row, Spread, spread
from moeprune.report.runs.settings import setting_text
from moeprune.report.tables.formats import MISSING, experts_text
from moeprune.report.tables.run_tables import column_of
from moeprune.report.tables.seed_table import runs_of
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

OURS = "moe_slimming"
FEWEST_SEEDS = 3
SIGNIFICANT = 0.05
RESULT = "difference"


@dataclass(frozen=True)
class Comparison:
    """One method against another at the same model, ratio and quantizer, on the ``seeds`` that both have.

    ``difference``: of ln(mean perplexity), ours minus the other's, so that negative is better for ours; -0.01 is about
    1% lower. ``wins``: on how many seeds ours is lower. ``p``: two-sided, of the paired t-test on these differences;
    ``adjusted``: by Holm's method over all comparisons of the table. Both None where ``reason`` says why.
    """

    ours: Row
    other: Row
    seeds: tuple[int, ...]
    difference: Spread
    wins: int
    p: float | None
    adjusted: float | None = None
    reason: str = ""


def paired_comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """The paper's method against every other row of its model, ratio and quantizer; where it was not run, the first
    row against the others. Rows without a seed in common are left out."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        if row.rivals is not None:
            groups.setdefault(row.rivals, []).append(row)
    found = []
    for group in groups.values():
        ours = next((row for row in group if _is_ours(row)), group[0])
        found += [compared for row in group if row is not ours and (compared := _compared(ours, row))]
    return _with_holm(found)


def _is_ours(row: Row) -> bool:
    return any(setting_text(run, "method") == OURS for run in row.runs)


def _compared(ours: Row, other: Row) -> Comparison | None:
    of_ours, of_other = _log_perplexities(ours), _log_perplexities(other)
    seeds = tuple(seed for seed in of_ours if seed in of_other)
    if not seeds:
        return None
    mine, theirs = [of_ours[seed] for seed in seeds], [of_other[seed] for seed in seeds]
    if not all(map(math.isfinite, (*mine, *theirs))):
        nothing = Spread(math.nan, None, len(seeds))
        wins = sum(_worst_if_nan(one) < _worst_if_nan(two) for one, two in zip(mine, theirs, strict=True))
        return Comparison(ours, other, seeds, nothing, wins, None, reason="a perplexity is not finite")
    differences = [one - two for one, two in zip(mine, theirs, strict=True)]
    wins = sum(difference < 0 for difference in differences)
    found = Comparison(ours, other, seeds, spread(differences), wins, None)
    if len(seeds) < FEWEST_SEEDS:
        return replace(found, reason=f"{len(seeds)} of at least {FEWEST_SEEDS} seeds")
    if len(set(differences)) == 1:
        return replace(found, reason="the same difference on every seed: no spread to test against")
    return replace(found, p=float(stats.ttest_rel(mine, theirs).pvalue))


def _worst_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _log_perplexities(row: Row) -> dict[int, float]:
    values = ((metrics.seed, metrics.final.mean_perplexity) for metrics in row.results)
    return {seed: math.log(value) if value > 0 else math.nan for seed, value in values}


def _with_holm(found: Sequence[Comparison]) -> list[Comparison]:
    """Holm (1979): the k-th smallest of m p-values times m - k + 1, never below the one before it, at most 1."""
    tested = sorted((one for one in found if one.p is not None), key=lambda one: one.p or 0.0)
    adjusted: dict[int, float] = {}
    highest = 0.0
    for rank, one in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * (one.p or 0.0)))
        adjusted[id(one)] = highest
    return [replace(one, adjusted=adjusted.get(id(one))) for one in found]


def paired_table(comparisons: Sequence[Comparison], into: Path) -> Table | None:
    """None where no two rows share two seeds: one seed says nothing about chance."""
    if all(len(one.seeds) < 2 for one in comparisons):
        return None
    per_token = [str(one.ours.experts_per_token or "default") for one in comparisons]
    experts = [column_of("experts\nper token", per_token, ROW_NAME)] if len(set(per_token)) > 1 else []
    columns = [
        column_of("model", (one.ours.model for one in comparisons), ROW_NAME),
        *experts,
        column_of("ratio", (f"{one.ours.ratio:.4g}" for one in comparisons), ROW_NAME),
        column_of("quantizer", (str(one.ours.quantizer) for one in comparisons), ROW_NAME),
        column_of("method", (one.ours.method for one in comparisons), ROW_NAME),
        column_of("against", (one.other.method for one in comparisons), ROW_NAME),
        Column("difference of\nln perplexity", [_difference_cell(one, into) for one in comparisons], RESULT),
        column_of("wins", (f"{one.wins} of {len(one.seeds)}" for one in comparisons), RESULT),
        Column("p", [_p_cell(one.p, one.reason) for one in comparisons], RESULT),
        Column("p\n(Holm)", [_p_cell(one.adjusted, one.reason) for one in comparisons], RESULT),
    ]
    tested = sum(one.p is not None for one in comparisons)
    caption = (
        "Difference of ln(mean perplexity) on the same seed, method minus the one it is held against: mean ± sample "
        "standard deviation over seeds; negative: the method is better, -0.01 is about 1% lower. Wins: seeds on which "
        f"it is. p: two-sided paired t-test; Holm: corrected for the tests of this table, {tested}. "
        f"{MISSING}: not tested, with the reason. A seed chooses the calibration sample, and the training order and "
        "initial adapters of a recovery; the evaluation text is the same, so p says nothing about other texts."
    )
    return Table("On the same seeds", columns, caption)


def _difference_cell(one: Comparison, into: Path) -> Cell:
    runs = (*runs_of(one.ours, into), *runs_of(one.other, into))
    if math.isnan(one.difference.mean):
        return Cell(MISSING, note=one.reason, runs=runs)
    deviation = "" if one.difference.std is None else f" ± {one.difference.std:.4f}"
    return Cell(f"{one.difference.mean:+.4f}{deviation}", number=one.difference.mean, runs=runs)


def _p_cell(p: float | None, reason: str) -> Cell:
    if p is None:
        return Cell(MISSING, note=reason)
    return Cell(f"{p:.3f}" if p >= 0.001 else f"{p:.1e}", number=p)


def paired_sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """Per method that is held against others: how often it is better, and how often that is more than chance; once for
    all ratios of which the same is to be said."""
    groups: dict[tuple[object, str], list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault((one.ours.rivals, one.ours.method), []).append(one)
    ratios: dict[tuple[str, str, str], list[str]] = {}
    for found in groups.values():
        row = found[0].ours
        if any(one.adjusted is not None for one in found):
            quantized = "" if row.quantizer == "none" else f" with {row.quantizer}"
            experts = f", {experts_text(row.experts_per_token)}," if row.experts_per_token else ""
            ratios.setdefault((f"{row.model}{experts}", quantized, _verdict(found)), []).append(f"{row.ratio:g}")
    return [
        f"{model} at ratio{'s' * (len(at) > 1)} {', '.join(at)}{quantized}: {verdict}"
        for (model, quantized, verdict), at in ratios.items()
    ]


def _verdict(found: Sequence[Comparison]) -> str:
    method = found[0].ours.method
    better = [one for one in found if _is_better(one)]
    sure = [one for one in found if one.adjusted is not None and one.adjusted < SIGNIFICANT]
    untested = sum(one.adjusted is None for one in found)
    worse = [one.other.method for one in sure if one.difference.mean > 0]
    text = (
        f"{method} has the lower perplexity in {len(better)} of {len(found)} paired comparisons; "
        f"{sum(one in better for one in sure)} of these stay at p < {SIGNIFICANT} after Holm's correction."
    )
    text += f" {untested} could not be tested." if untested else ""
    return f"{text} By the same test better than {method}: {', '.join(worse)}." if worse else text


def _is_better(one: Comparison) -> bool:
    """On the mean; where that is infinite, on every seed."""
    return one.wins == len(one.seeds) if math.isnan(one.difference.mean) else one.difference.mean < 0
