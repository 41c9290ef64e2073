"""Every aggregated number of a report, one row each: experiment, row, measure, and the runs behind it."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from moeprune.report.documents.files import written_whole
from moeprune.report.published.join import joined, printed_rows
from moeprune.report.published.results import PublishedResult
from moeprune.report.runs.measures import AVERAGE, Measure, average_accuracy, measures_of
from moeprune.report.runs.seeds import Row
from moeprune.report.tables.seed_table import NOT_MEASURED, runs_of

HEADS = (
    "experiment", "model", "method", "experts_per_token", "ratio", "quantizer", "bits", "variant", "measure", "mean",
    "std", "n", "stderr", "published", "difference", "published_table", "published_doubts", "missing", "seeds", "runs",
)  # fmt: skip
ACCURACY = "accuracy."


def write_tidy_csv(path: Path, experiments: Sequence[tuple[str, Sequence[Row], Sequence[str]]], into: Path) -> None:
    """One row per measure of each row of each experiment (its name, its rows, the published tables beside it).

    ``std`` is over the ``n`` runs; ``stderr`` that of a single run's task over its examples; folders in ``runs`` are
    relative to ``into``. ``missing`` says why there is no mean.
    """
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADS, lineterminator="\n")
        writer.writeheader()
        for name, rows, tables in experiments:
            measures = measures_of(rows)
            for row in rows:
                published = _published(row, rows, tables)
                writer.writerows(_line(name, row, measure, published, into) for measure in measures)


def _published(row: Row, rows: Sequence[Row], tables: Sequence[str]) -> list[PublishedResult]:
    """The printed rows that this row is held against, in the order of the tables."""
    printed = (result for table in tables for result in printed_rows(table))
    return [result for result in printed if result.model == row.model and joined(result, rows, row.model) is row]


def _line(name: str, row: Row, measure: Measure, published: Sequence[PublishedResult], into: Path) -> dict[str, object]:
    found = row.spread(measure.of)
    return {
        "experiment": name,
        "model": row.model,
        "method": row.method,
        "experts_per_token": row.experts_per_token,
        "ratio": row.ratio,
        "quantizer": row.quantizer,
        "bits": row.bits,
        "variant": row.variant(row.results[0]).name if row.results else None,
        "measure": measure.name,
        "mean": found.mean if found else None,
        "std": found.std if found else None,
        "n": found.n if found else 0,
        "stderr": _standard_error(row, measure),
        **dict(_beside(row, measure, published)),
        "missing": None if found else (NOT_MEASURED if row.runs else row.why_missing),
        "seeds": None if row.is_dense else " ".join(map(str, row.seeds)),
        "runs": "; ".join(runs_of(row, into)),
    }


def _standard_error(row: Row, measure: Measure) -> float | None:
    """In percent, like the accuracy itself; None where the harness gives none."""
    if not row.results or (len(row.results) > 1 and not row.is_dense) or not measure.name.startswith(ACCURACY):
        return None
    score = row.variant(row.results[0]).tasks.get(measure.name.removeprefix(ACCURACY))
    return 100 * score.stderr if score and score.stderr is not None else None


def _beside(row: Row, measure: Measure, published: Sequence[PublishedResult]) -> Iterator[tuple[str, object]]:
    """The first printed number of this measure; an average is compared over the tasks of the printed row."""
    task = measure.name.removeprefix(ACCURACY)
    for result in published:
        value = result.values.get(task) if measure.name.startswith(ACCURACY) else None
        if value is None or not result.tasks:
            continue
        if task == AVERAGE:
            own, printed = row.spread(average_accuracy(list(result.tasks)).of), result.mean_of_row
        else:
            own, printed = row.spread(measure.of), value
        yield "published", value
        yield "difference", own.mean - printed if own and printed is not None else None
        yield "published_table", result.table
        yield "published_doubts", "; ".join(result.doubts) or None
        return
