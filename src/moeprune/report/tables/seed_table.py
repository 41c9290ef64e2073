"""The table of an experiment: a row for each thing that was asked, with mean and standard deviation over seeds."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from moeprune.report.runs.measures import (
    AVERAGE_ACCURACY,
    BYTES,
    DECODE,
    MEAN_PERPLEXITY,
    PREFILL,
    RECOVERY_COSTS,
    TIMES_SMALLER,
    TO_DENSE,
    Measure,
    accuracy,
    tasks_of,
)
from moeprune.report.runs.ranking import with_ranks
from moeprune.report.runs.seeds import Row, Spread, seeds_vary
from moeprune.report.tables.formats import (
    MISSING,
    accuracy_text,
    byte_unit,
    byte_unit_note,
    perplexity_text,
    ratio_text,
)
from moeprune.report.tables.run_tables import RATIO_MEANING, RECOVERY, perplexity_meaning, task_meaning
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

QUALITY, TASKS, SPEED = "perplexity and size", "tasks", "speed"
NOT_MEASURED = "not measured in these runs"
SPREAD_MEANING = (
    "± over seeds: mean and sample standard deviation (of n - 1) over n runs, which differ in their seed alone."
)
OVER_SEEDS = "Over seeds: the arithmetic mean of that."
TASK_DEVIATION = "deviation over seeds (of dense, and of a single run, standard error over the examples)"
RANKS_MEANING = (
    "Bold: best of the rows of one model, ratio and quantizer; underlined: second best of three and more; deviations "
    "are ignored in this, and rows that remove nothing do not compete."
)


def seed_table(title: str, rows: Sequence[Row], into: Path) -> Table:
    """One table for all rows; folders of runs are told relative to ``into``."""
    measured = [metrics for row in rows for metrics in row.results]
    unit_bytes, unit = byte_unit(metrics.dense.bytes.with_overhead for metrics in measured)
    tasks = tasks_of(rows)
    columns = [*name_columns(rows, into)]
    columns += [
        _column("mean\nperplexity", QUALITY, rows, MEAN_PERPLEXITY, perplexity_text, into, lowest=True),
        _column("perplexity\n/ dense", QUALITY, rows, TO_DENSE, ratio_text, into, lowest=True),
        _size_column(f"{unit} with\noverhead", rows, BYTES, unit_bytes, into),
        _size_column("times\nsmaller", rows, TIMES_SMALLER, 1, into),
    ]
    if len(tasks) > 1:
        columns.append(_column("average\n%", TASKS, rows, AVERAGE_ACCURACY, percent_text, into, lowest=False))
    columns += [_task_column(task, rows, into) for task in tasks]
    if any(metrics.final.speed for metrics in measured):
        columns += [
            _column(f"{name}\n/ dense", SPEED, rows, measure, lambda ratio: f"{ratio:.2f}", into)
            for name, measure in (("prefill", PREFILL), ("decode", DECODE))
        ]
    if any(metrics.recovery_details for metrics in measured):
        columns += [_cost_column(head, rows, into) for head in RECOVERY_COSTS]
    size = f"{byte_unit_note(unit)}, with scales and unquantised tensors."
    over_seeds, deviation = (f" {OVER_SEEDS}", [TASK_DEVIATION]) if seeds_vary(rows) else ("", [])
    captions = {
        QUALITY: f"{perplexity_meaning(measured)}{over_seeds} {size}" if measured else "No run has results.",
        TASKS: f"{task_meaning(measured, *deviation)} Average: over all tasks of the model.",
        RECOVERY: "Training tokens: those that count in the loss; seconds: mean over seeds.",
        SPEED: "Speed: tokens a second, as a multiple of the dense model's in the same run.",
    }
    return Table(title, columns, _caption(rows, columns), captions)


def name_columns(rows: Sequence[Row], into: Path) -> list[Column]:
    """What names a row: of model, method, evaluation, experts per token, ratio, quantizer and the number of runs what
    varies."""
    texts: dict[str, Callable[[Row], str]] = {
        "model": lambda row: row.model,
        "method": lambda row: row.method,
        "evaluation": _evaluation,
        "experts\nper token": lambda row: str(row.experts_per_token or "default"),
        "ratio": lambda row: MISSING if row.ratio is None else f"{row.ratio:.4g}",
        "quantizer": lambda row: MISSING if row.quantizer is None else row.quantizer,
    }
    columns = []
    for head, text in texts.items():
        cells = [Cell(text(row), runs=runs_of(row, into)) for row in rows]
        if head == "method" or len({cell.text for cell in cells} - {MISSING}) > 1:
            columns.append(Column(head, cells, ROW_NAME))
    if seeds_vary(rows) or any(row.unfinished for row in rows):
        columns.append(Column("n", [_count(row, into) for row in rows], ROW_NAME))
    return columns


def _evaluation(row: Row) -> str:
    """Its name and how much it measures, for rows that must not be compared."""
    if row.measured_on is None:
        return MISSING
    name, tokens, tasks = row.measured_on
    items = f", {sum(count for _, count, *_ in tasks):,} items" if tasks else ""
    return f"{name or '?'}: {sum(count for _, count in tokens):,} tokens{items}"


def _count(row: Row, into: Path) -> Cell:
    """How many runs; with a note on those that have no results."""
    count, runs = len(row.runs), runs_of(row, into)
    if row.is_dense:  # measured once: seeds do not change it
        return Cell(MISSING, runs=runs)
    return Cell(str(count), number=count, note=row.why_missing, runs=runs)


def runs_of(row: Row, into: Path) -> tuple[str, ...]:
    """The folders of a row's runs, those without results too, relative to the report."""
    return tuple(Path(os.path.relpath(run.folder, into)).as_posix() for run in (*row.runs, *row.unfinished))


def _column(
    head: str,
    group: str,
    rows: Sequence[Row],
    measure: Measure,
    text: Callable[[float], str],
    into: Path,
    lowest: bool | None = None,
) -> Column:
    """A measure over the rows; ``lowest`` says which is best, None that it is no contest."""
    cells = [spread_cell(row, row.spread(measure.of), text, into) for row in rows]
    if lowest is not None:
        cells = with_ranks(cells, [row.rivals for row in rows], lowest)
    return Column(head, cells, group)


def _size_column(head: str, rows: Sequence[Row], measure: Measure, unit: int, into: Path) -> Column:
    """A measure that seeds hardly change: its mean alone, and no contest."""
    found = [row.spread(measure.of) for row in rows]
    means = [replace(one, std=None) if one else None for one in found]
    cells = [
        spread_cell(row, mean, lambda size: f"{size / unit:.2f}", into) for row, mean in zip(rows, means, strict=True)
    ]
    return Column(head, cells, QUALITY)


def _cost_column(head: str, rows: Sequence[Row], into: Path) -> Column:
    """What a recovery took, on the mean over seeds."""
    found = [row.spread(RECOVERY_COSTS[head].of) for row in rows]
    cells = [
        Cell(f"{mean.mean:,.0f}", number=mean.mean, runs=runs_of(row, into)) if mean else Cell(MISSING)
        for row, mean in zip(rows, found, strict=True)
    ]
    return Column(head, cells, RECOVERY)


def _task_column(task: str, rows: Sequence[Row], into: Path) -> Column:
    """Percent over seeds; of a single run with the standard error over the task's examples."""
    cells = []
    for row in rows:
        cell, found = spread_cell(row, row.spread(accuracy(task).of), percent_text, into), row.results
        scores = {variant.tasks.get(task) for variant in map(row.variant, found)}
        score = next(iter(scores)) if len(scores) == 1 else None
        if score is not None and (len(found) == 1 or row.is_dense):
            cell = replace(cell, text=accuracy_text(score))
        cells.append(cell)
    return Column(f"{task}\n%", with_ranks(cells, [row.rivals for row in rows], lowest=False), TASKS)


def spread_cell(row: Row, found: Spread | None, text: Callable[[float], str], into: Path) -> Cell:
    """``27.62 ± 0.11``; where nothing was measured, the reason as a note."""
    runs = runs_of(row, into)
    if found is None:
        return Cell(MISSING, note=row.why_missing if not row.runs else NOT_MEASURED, runs=runs)
    deviation = "" if found.std is None else text(found.std).removeprefix("+")
    shown = f"{text(found.mean)} ± {deviation}" if deviation else text(found.mean)
    return Cell(shown, number=found.mean, runs=runs)


def percent_text(percent: float) -> str:
    return f"{percent:.1f}"


def _caption(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    about = []
    for name, values in (
        ("model", {row.model for row in rows}),
        ("ratio", {f"{row.ratio:.4g}" for row in rows if row.ratio is not None and not row.is_dense}),
        ("quantizer", {row.quantizer for row in rows if row.quantizer and not row.is_dense}),
        ("calibration", {metrics.calibration for row in rows for metrics in row.results}),
        ("seeds", {str(seed) for row in rows for seed in row.seeds}),
    ):
        about.append(f"{name} {', '.join(sorted(values)) or 'unknown'}")
    settings = "; ".join(about)
    sentences = [f"{settings[0].upper()}{settings[1:]}. Ratio: {RATIO_MEANING}."]
    sentences += [SPREAD_MEANING] if seeds_vary(rows) else []
    sentences += [RANKS_MEANING] if any(cell.best for column in columns for cell in column.cells) else []
    return " ".join(sentences)
