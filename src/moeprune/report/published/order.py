"""Do the published methods come in the same order here? Counted over pairs of rows at equal ratio and bits."""

from collections.abc import Sequence
from itertools import combinations

from moeprune.report.published.join import ALIKE_RATIO, joined, printed_rows
from moeprune.report.published.results import PublishedResult
from moeprune.report.runs.measures import MEAN_PERPLEXITY, Measure, average_accuracy, tasks_of
from moeprune.report.runs.seeds import Row


def order_sentences(tables: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """For each printed table and model of ours, in how many of its pairs of rows ours are in the same order."""
    models = list(dict.fromkeys(row.model for row in rows if row.runs))
    return [sentence for table in tables for model in models if (sentence := _sentence(table, model, rows))]


def _sentence(table: str, model: str, rows: Sequence[Row]) -> str | None:
    tasks = tasks_of([row for row in rows if row.model == model])
    measures = {"mean perplexity": (MEAN_PERPLEXITY, -1)}
    if tasks:
        measures["average accuracy"] = (average_accuracy(tasks), 1)
    counts = [
        f"by {name} in {same} of {count}"
        for name, (measure, sign) in measures.items()
        for same, count in [_agreement(table, model, rows, measure, sign)]
        if count
    ]
    if not counts:
        return None
    return (
        f"{table} against {model}: two printed rows at equal ratio and bits are in the printed order "
        f"{', '.join(counts)} pairs. Ties and doubtful rows are counted like all others."
    )


def _agreement(table: str, model: str, rows: Sequence[Row], measure: Measure, sign: int) -> tuple[int, int]:
    """How many pairs are in the same order, and how many there are; ``sign`` is -1 where lower is better."""
    known = []
    for printed in printed_rows(table):
        own = joined(printed, rows, model, ALIKE_RATIO)
        found = own.spread(measure.of) if own and not own.is_dense else None
        if found is not None and printed.mean_of_row is not None:
            known.append((printed, sign * found.mean))
    pairs = [(one, two) for one, two in combinations(known, 2) if _are_rivals(one[0], two[0])]
    same = sum(((one[0].mean_of_row or 0) > (two[0].mean_of_row or 0)) == (one[1] > two[1]) for one, two in pairs)
    return same, len(pairs)


def _are_rivals(one: PublishedResult, two: PublishedResult) -> bool:
    return (one.model, one.ratio, one.bits) == (two.model, two.ratio, two.bits)
