"""Published tables beside ours: number by number on the same model, else each relative to its own dense model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from moeprune.report.published.join import ALIKE_RATIO, joined, printed_rows
from moeprune.report.published.results import AVERAGE, PublishedResult
from moeprune.report.published.storage import IDEAL_4, KINDS_TEXT, UNIT_BYTES, PublishedStorage, published_storage
from moeprune.report.runs.measures import (
    BYTES,
    GAINED_ACCURACY,
    TO_DENSE,
    accuracy,
    average_accuracy,
    tasks_of,
)
from moeprune.report.runs.seeds import Row
from moeprune.report.tables.formats import MISSING, ratio_text
from moeprune.report.tables.run_tables import names_in
from moeprune.report.tables.seed_table import NOT_MEASURED, percent_text, runs_of, spread_cell
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

DAGGER = "†"
NOT_RUN = "not among these runs"
NO_DENSE = "this table has no dense row"
DOUBT_MEANING = f"{DAGGER}: the printed row is doubtful, as the note says."
OURS_MEANING = (
    "Beside it ours on another model, where method, bits and settings are equal and the ratio within "
    f"{100 * ALIKE_RATIO:g} point: over our own tasks and texts, with our own recovery or none, and relative to our "
    "own dense model, so that directions and order can be compared, not sizes."
)
AVERAGES, TASKS, PUBLISHED = "averages", "tasks", "published"


def published_tables(names: Sequence[str], rows: Sequence[Row], into: Path) -> list[Table]:
    """Each of the printed tables beside our rows."""
    models = list(dict.fromkeys(row.model for row in rows if row.runs or row.unfinished))
    tables = []
    for name in names:
        printed = printed_rows(name)
        shared = [row for row in printed if row.model in models and row.tasks]
        tables.append(_absolute(name, shared, rows, into) if shared else _relative(name, printed, rows, models, into))
    return tables


def _absolute(name: str, printed: Sequence[PublishedResult], rows: Sequence[Row], into: Path) -> Table:
    """Ours, published and the difference in points, for the models that both have."""
    ours = [joined(row, rows, row.model) for row in printed]
    pairs = list(zip(printed, ours, strict=True))
    columns = [
        *_names(printed),
        Column("average\npublished", [_number(row.average) for row in printed], AVERAGES),
        Column("average\nours", [_our_average(row, own, into) for row, own in pairs], AVERAGES),
        Column("difference", [_difference(row, own) for row, own in pairs], AVERAGES),
        *(
            Column(f"{task}\nours / publ. / diff.", [_task(task, *pair, into) for pair in pairs], TASKS)
            for task in names_in(row.tasks for row in printed)
        ),
    ]
    if any(row.storage_gb for row in printed):
        columns += [
            Column("storage\npublished", [_storage(row) for row in printed], AVERAGES),
            Column("ours,\ncounted alike", [_stored(row, own, into) for row, own in pairs], AVERAGES),
        ]
    captions = {
        AVERAGES: (
            "Beside it ours, where model, method, ratio, bits and settings are equal. Accuracy in percent, difference "
            "in points, ours minus published; averages are over the tasks of the printed row, and their difference is "
            "to the mean of its printed tasks. Recovery, calibration text and version of the harness need not be ours; "
            "which of a task's metrics (acc, acc_norm) is printed, the tables do not say. "
            f"Storage in the unit that the numbers show, which is not always the one that the table says; {KINDS_TEXT} "
            "(docs/footprint.md)."
        )
    }
    return Table(f"{name}: ours beside the published numbers", columns, _source(name, printed), captions)


def _relative(
    name: str, printed: Sequence[PublishedResult], rows: Sequence[Row], models: Sequence[str], into: Path
) -> Table:
    """The printed table and ours, each row relative to the dense row of its own."""
    columns = [*_names(printed), *_published_columns(printed)]
    for model in models:
        own = [joined(row, rows, model, ALIKE_RATIO) for row in printed]
        if all(row is None or row.is_dense for row in own):
            continue
        tasks = tasks_of([row for row in rows if row.model == model])
        points = [("points", GAINED_ACCURACY, _signed)] if tasks else []
        for head, measure, text in (*points, ("perplexity / dense", TO_DENSE, ratio_text)):
            cells = [spread_cell(row, row.spread(measure.of), text, into) if row else _not_run() for row in own]
            columns.append(Column(f"{model}\n{head}", cells, model))
    scale = " Points: of average accuracy above the dense row of the same table." if _has_dense(printed) else ""
    ours = f" {OURS_MEANING}" if any(column.group in models for column in columns) else ""
    return Table(f"{name}: directions", columns, f"{_source(name, printed)}{scale}{ours}")


def _has_dense(printed: Sequence[PublishedResult]) -> bool:
    return any(row.is_dense for row in printed)


def _source(name: str, printed: Sequence[PublishedResult]) -> str:
    """Where the table is from, and what its method names and marks mean."""
    source = printed[0].source
    where = f"{name} of the {source}" if name.startswith("Tab.") else f"{source[0].upper()}{source[1:]}"
    renamed = {row.printed_method: row.method for row in printed if row.printed_method != row.method}
    named = ", ".join(f"{theirs}: {ours}" for theirs, ours in renamed.items())
    marked = f" {DOUBT_MEANING}" if any(row.doubts for row in printed) else ""
    return f"{where}.{f' Our names: {named}.' if named else ''}{marked}"


def _names(printed: Sequence[PublishedResult]) -> list[Column]:
    columns = [
        Column("model", [Cell(row.model) for row in printed], ROW_NAME),
        Column("method", [_method(row) for row in printed], ROW_NAME),
        Column("ratio", [_ratio(row) for row in printed], ROW_NAME),
        Column("bits", [Cell(str(row.bits), number=row.bits) for row in printed], ROW_NAME),
    ]
    if any(row.variant for row in printed):
        columns.append(Column("setting", [Cell(row.variant or MISSING) for row in printed], ROW_NAME))
    return columns


def _method(row: PublishedResult) -> Cell:
    doubts = "; ".join(row.doubts)
    return Cell(f"{row.printed_method} {DAGGER}", note=doubts) if doubts else Cell(row.printed_method)


def _ratio(row: PublishedResult) -> Cell:
    likely = row.likely_ratio if row.ratio is None else None
    cell = _number(row.likely_ratio, "g")
    return cell if likely is None else replace(cell, note="not printed; rows of this table stand in others that say it")


def _published_columns(printed: Sequence[PublishedResult]) -> Iterator[Column]:
    """Storage and averages relative to the table's dense row of the same model, anything else as printed."""
    if any(row.storage_gb and _dense_of(row, printed) for row in printed):
        yield Column("times\nsmaller", [_storage_ratio(row, printed) for row in printed], PUBLISHED)
    tasks = names_in(row.tasks for row in printed)
    for metric in names_in(row.values for row in printed):
        name = metric.replace("_", " ")
        if metric.endswith(AVERAGE) and _has_dense(printed):
            yield Column(f"{name}\npoints", [_points(metric, row, printed) for row in printed], PUBLISHED)
        elif metric not in tasks:
            yield Column(name, [_number(row.values.get(metric), "g") for row in printed], PUBLISHED)


def _points(metric: str, row: PublishedResult, printed: Sequence[PublishedResult]) -> Cell:
    """Of the mean of the row where its tasks are printed, since a printed average can be wrong."""
    dense = _dense_of(row, printed)
    if dense is None:
        return Cell(MISSING, note=NO_DENSE)
    value, base = _mean(metric, row, row.tasks), _mean(metric, dense, row.tasks)
    if value is None or base is None:
        return Cell(MISSING, note="not printed")
    return Cell(_signed(value - base), number=value - base)


def _mean(metric: str, row: PublishedResult, tasks: Sequence[str] | dict[str, float]) -> float | None:
    if not tasks:
        return row.values.get(metric)
    values = [row.tasks[task] for task in tasks if task in row.tasks]
    return sum(values) / len(values) if len(values) == len(tasks) else None


def _dense_of(row: PublishedResult, printed: Sequence[PublishedResult]) -> PublishedResult | None:
    """The dense row of the same model and, where the table has several, of the same setting."""
    dense = [other for other in printed if other.is_dense and other.model == row.model]
    return next((other for other in dense if other.variant == row.variant), None)


def _storage_ratio(row: PublishedResult, printed: Sequence[PublishedResult]) -> Cell:
    dense = _dense_of(row, printed)
    if dense is None or not dense.storage_gb or not row.storage_gb:
        return Cell(MISSING, note="not printed")
    return Cell(f"{dense.storage_gb / row.storage_gb:.2f}", number=dense.storage_gb / row.storage_gb)


def _our_average(row: PublishedResult, own: Row | None, into: Path) -> Cell:
    if own is None:
        return _not_run()
    return spread_cell(own, own.spread(average_accuracy(list(row.tasks)).of), percent_text, into)


def _difference(row: PublishedResult, own: Row | None) -> Cell:
    found = own.spread(average_accuracy(list(row.tasks)).of) if own else None
    if found is None or row.mean_of_row is None:
        return Cell(MISSING)
    difference = found.mean - row.mean_of_row
    return Cell(_signed(difference), number=difference)


def _task(task: str, row: PublishedResult, own: Row | None, into: Path) -> Cell:
    published = row.tasks.get(task)
    found = own.spread(accuracy(task).of) if own else None
    printed = MISSING if published is None else f"{published:.1f}"
    if found is None or published is None:
        ours = MISSING if found is None else f"{found.mean:.1f}"
        reason = NOT_RUN if own is None else (own.why_missing if not own.runs else NOT_MEASURED)
        note = reason if found is None else "not printed"
        return Cell(f"{ours} / {printed} / {MISSING}", note=note, runs=runs_of(own, into) if own else ())
    difference = found.mean - published
    text = f"{found.mean:.1f} / {printed} / {_signed(difference)}"
    return Cell(text, number=difference, runs=runs_of(own, into) if own else ())


def _counted(row: PublishedResult) -> PublishedStorage | None:
    """In which unit, and of what, the row's storage was counted; None where that is not known."""
    return next(
        (
            one
            for one in published_storage()
            if (one.model, one.bits, one.storage) == (row.model, row.bits, row.storage_gb) and row.table in one.table
        ),
        None,
    )


def _storage(row: PublishedResult) -> Cell:
    counted = _counted(row)
    return replace(_number(row.storage_gb), text=counted.text) if counted else _number(row.storage_gb)


def _stored(row: PublishedResult, own: Row | None, into: Path) -> Cell:
    """Ours in the same unit: with overhead, or where the printed number leaves it out, 4 bits for each parameter."""
    if own is None:
        return _not_run()
    counted = _counted(row)
    unit = counted.unit if counted else "GB"
    ideal = counted is not None and counted.kind == IDEAL_4
    found = own.spread((lambda _, variant: variant.parameters.total / 2) if ideal else BYTES.of)
    mean = replace(found, std=None) if found else None  # seeds hardly change it
    return spread_cell(own, mean, lambda size: f"{size / UNIT_BYTES[unit]:.2f} {unit}", into)


def _not_run() -> Cell:
    return Cell(MISSING, note=NOT_RUN)


def _number(value: float | None, form: str = ".2f") -> Cell:
    return Cell(MISSING, note="not printed") if value is None else Cell(f"{value:{form}}", number=value)


def _signed(points: float) -> str:
    return f"{points:+.1f}"
