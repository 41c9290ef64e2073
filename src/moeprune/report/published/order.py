"""Do the published methods come in the same order here? Counted over pairs of rows at equal ratio and bits."""

import math
from collections.abc import Sequence
from itertools import combinations

from moeprune.report.published.join import ALIKE_RATIO, joined, printed_rows
from moeprune.report.published.results import PublishedResult
from moeprune.report.runs.measures import AVERAGE_ACCURACY, MEAN_PERPLEXITY, Measure
from moeprune.report.runs.seeds import Row
from moeprune.report.tables.formats import MISSING
from moeprune.report.tables.run_tables import column_of
from moeprune.report.tables.table import ROW_NAME, Table

PERPLEXITY, TASKS = "mean perplexity", "average accuracy"


def order_table(names: Sequence[str], rows: Sequence[Row]) -> Table | None:
    """For each printed table and model of ours, in how many of its pairs of rows ours come in the same order; None
    where no pair has both."""
    models = list(dict.fromkeys(row.model for row in rows if row.runs))
    lines = [(name, model, _counts(name, model, rows)) for name in names for model in models]
    lines = [line for line in lines if any(count for _, count in line[2].values())]
    if not lines:
        return None
    columns = [
        column_of("printed table", (name for name, _, _ in lines), ROW_NAME),
        column_of("our model", (model for _, model, _ in lines), ROW_NAME),
        *(
            column_of(f"in its order\nby {by}", (_told(*counts[by]) for _, _, counts in lines), "pairs")
            for by in (PERPLEXITY, TASKS)
        ),
    ]
    caption = (
        "Pairs of printed rows of one model, at equal ratio and bits, of which ours come in the order of the printed "
        "average accuracy. Ties and doubtful rows are counted like all others."
    )
    return Table("Do the methods come in the printed order?", columns, caption)


def _counts(table: str, model: str, rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """By what is compared: pairs in the same order, and all pairs."""
    return {
        PERPLEXITY: _agreement(table, model, rows, MEAN_PERPLEXITY, -1),
        TASKS: _agreement(table, model, rows, AVERAGE_ACCURACY, 1),
    }


def _told(same: int, count: int) -> str:
    return f"{same} of {count}" if count else MISSING


def _agreement(table: str, model: str, rows: Sequence[Row], measure: Measure, sign: int) -> tuple[int, int]:
    """How many pairs are in the same order, and how many there are; ``sign`` is -1 where lower is better."""
    known = []
    for printed in printed_rows(table):
        own = joined(printed, rows, model, ALIKE_RATIO)
        found = own.spread(measure.of) if own and not own.is_dense else None
        if found is not None and printed.mean_of_row is not None:
            known.append((printed, -math.inf if math.isnan(found.mean) else sign * found.mean))
    pairs = [
        (one, two)
        for one, two in combinations(known, 2)
        if _are_rivals(one[0], two[0]) and (math.isfinite(one[1]) or math.isfinite(two[1]))
    ]
    same = sum(((one[0].mean_of_row or 0) > (two[0].mean_of_row or 0)) == (one[1] > two[1]) for one, two in pairs)
    return same, len(pairs)


def _are_rivals(one: PublishedResult, two: PublishedResult) -> bool:
    return (one.model, one.ratio, one.bits) == (two.model, two.ratio, two.bits)
