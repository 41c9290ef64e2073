"""One table over all runs of a sweep: what varies, then the final variant's quality and size."""

from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.report.runs.ranking import with_ranks
from moeprune.report.runs.results import SETTINGS, Metrics, Run
from moeprune.report.runs.settings import BUNDLED, methods_bundle, setting_text, setting_values, varying_keys
from moeprune.report.runs.variants import Variant
from moeprune.report.tables.formats import (
    MISSING,
    accuracy_text,
    byte_unit,
    byte_unit_note,
    bytes_text,
    parameter_text,
    perplexity_text,
    ratio_text,
)
from moeprune.report.tables.run_tables import (
    RATIO_MEANING,
    RECOVERY,
    column_of,
    names_in,
    perplexity_meaning,
    task_meaning,
)
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

PERPLEXITY_AND_SIZE, TASKS = "perplexity and size", "tasks"
SHOWN_VARIANT = (
    "Shown is each run's last variant: pruned, and recovered or quantised where a recovery or quantizer is named."
)
RANKS_MEANING = (
    "Bold: best of the runs of one model, ratio and quantizer; underlined: second best of three and more; standard "
    "errors are ignored in this."
)
ALWAYS_STATED = ("model", "seed", "calibration")

Rivals = tuple[str, float, str]  # model, ratio, quantizer


@dataclass(frozen=True)
class Row:
    """One line: a run's final variant, a model's dense variant, or (``metrics`` None) an unfinished run."""

    run: Run
    metrics: Metrics | None
    is_dense: bool = False

    @property
    def variant(self) -> Variant | None:
        if self.metrics is None:
            return None
        return self.metrics.dense if self.is_dense else self.metrics.final

    @property
    def rivals(self) -> Rivals | None:
        """Rows of one size are compared with each other; dense, reference and unfinished rows with none."""
        if self.metrics is None or self.is_dense or self.metrics.is_reference:
            return None
        return self.metrics.model, self.metrics.ratio, self.metrics.quantizer


def sweep_table(runs: Sequence[Run]) -> Table:
    """Per model its dense row and the runs' final variants in order, then unfinished runs with their error.

    The best value among the runs of one model, ratio and quantizer is bold, the second best underlined; values that
    read the same share it.
    """
    rows = _rows(runs)
    measured = [run.results for run in runs if run.results]
    unit_bytes, unit = byte_unit(metrics.dense.bytes.with_overhead for metrics in measured)
    columns = [column_of("run", ("dense" if row.is_dense else row.run.name for row in rows), ROW_NAME)]
    columns += [column_of(key, (_setting(row, key) for row in rows), ROW_NAME) for key in _shown_keys(runs)]
    columns += _perplexity_columns(rows)
    columns += [_task_column(rows, task) for task in names_in(metrics.final.tasks for metrics in measured)]
    columns.append(_size_column(rows, unit_bytes, unit))
    columns += _recovery_columns(rows)
    if len(measured) < len(runs):
        status = [Cell(row.run.state) for row in rows]
        columns.append(Column("status", status, PERPLEXITY_AND_SIZE, prose=True))
    any_best = any(cell.best for column in columns for cell in column.cells)
    size_meaning = f"{byte_unit_note(unit)}, with scales and unquantised tensors; (2x): dense is twice as large."
    captions = {
        PERPLEXITY_AND_SIZE: f"{perplexity_meaning(measured)} {size_meaning}" if measured else "No run has results.",
        TASKS: task_meaning(measured),
        RECOVERY: "Training tokens: those that count in the loss.",
    }
    return Table(
        f"Sweep of {len(runs)} {'run' if len(runs) == 1 else 'runs'}",
        columns,
        _caption(runs, measured, any_best),
        captions,
    )


def methods_table(runs: Sequence[Run]) -> Table | None:
    """What the methods of a sweep stand for, where their names replace it in the sweep's own table."""
    hidden = [key for key in varying_keys(runs) if key not in _shown_keys(runs)]
    if not hidden:
        return None
    first_run = {setting_text(run, "method"): run for run in reversed(runs) if run.results}
    of_method = [first_run[method] for method in setting_values(runs, "method") if method in first_run]
    columns = [
        column_of(key, (setting_text(run, key) or MISSING for run in of_method), group, prose=True)
        for key, group in [("method", ROW_NAME), *((key, "choices") for key in hidden)]
    ]
    return Table("Methods", columns, "What each method of this sweep stands for.")


def _shown_keys(runs: Sequence[Run]) -> list[str]:
    """What varies, without what the name of the method says already."""
    told = BUNDLED if methods_bundle(runs) else ()
    return [key for key in varying_keys(runs) if key not in told]


def _rows(runs: Sequence[Run]) -> list[Row]:
    rows = []
    for model in dict.fromkeys(run.results.model for run in runs if run.results):
        of_model = [Row(run, run.results) for run in runs if run.results and run.results.model == model]
        rows += [Row(of_model[0].run, of_model[0].metrics, is_dense=True), *of_model]
    return rows + [Row(run, None) for run in runs if run.results is None]


def _setting(row: Row, key: str) -> str:
    if row.is_dense and key != "model":
        return "0" if key == "ratio" else MISSING
    return setting_text(row.run, key) or MISSING


def _perplexity_columns(rows: Sequence[Row]) -> list[Column]:
    means, ratios = [], []
    for row in rows:
        perplexity = row.variant.mean_perplexity if row.variant else None
        means.append(MISSING if perplexity is None else perplexity_text(perplexity))
        dense = row.metrics.dense.mean_perplexity if row.metrics else None
        ratios.append(MISSING if perplexity is None or dense is None else ratio_text(perplexity / dense))
    return [
        Column("mean\nperplexity", _with_best(rows, means, lowest=True), PERPLEXITY_AND_SIZE),
        Column("perplexity\n/ dense", _with_best(rows, ratios, lowest=True), PERPLEXITY_AND_SIZE),
    ]


def _task_column(rows: Sequence[Row], task: str) -> Column:
    texts = [accuracy_text(row.variant.tasks.get(task) if row.variant else None) for row in rows]
    return Column(f"{task}\n%", _with_best(rows, texts, lowest=False), TASKS)


def _size_column(rows: Sequence[Row], unit_bytes: int, unit: str) -> Column:
    texts = []
    for row in rows:
        dense = row.metrics.dense.bytes.with_overhead if row.metrics else None
        texts.append(bytes_text(row.variant.bytes.with_overhead if row.variant else None, dense, unit_bytes))
    return column_of(f"{unit} with\noverhead", texts, PERPLEXITY_AND_SIZE)  # of one size, so it is no contest


def _recovery_columns(rows: Sequence[Row]) -> list[Column]:
    """What each recovery was given; none where no run has one."""
    details = [None if row.metrics is None or row.is_dense else row.metrics.recovery_details for row in rows]
    if not any(details):
        return []
    return [
        column_of(
            "training\ntokens", (f"{found.training_tokens:,}" if found else MISSING for found in details), RECOVERY
        ),
        column_of("recovery\nseconds", (f"{found.seconds:.1f}" if found else MISSING for found in details), RECOVERY),
        column_of(
            "trained\nparameters", (parameter_text(f.trained_parameters) if f else MISSING for f in details), RECOVERY
        ),
    ]


def _with_best(rows: Sequence[Row], texts: Sequence[str], lowest: bool) -> list[Cell]:
    return with_ranks([Cell(text) for text in texts], [row.rivals for row in rows], lowest)


def _caption(runs: Sequence[Run], measured: Sequence[Metrics], any_best: bool) -> str:
    values = {key: setting_values(runs, key) for key in SETTINGS}
    untold = () if any(metrics.order_matters for metrics in measured) else ("order",)
    stated = [key for key in SETTINGS if key not in untold and (key in ALWAYS_STATED or len(values[key]) == 1)]
    settings = "; ".join(f"{key} {', '.join(values[key]) or 'unknown'}" for key in stated)
    sentences = [
        f"{settings[0].upper()}{settings[1:]}.",
        f"Ratio: {RATIO_MEANING}.",
        SHOWN_VARIANT,
        *_unequal_dense(measured),
    ]
    if any_best:
        sentences.append(RANKS_MEANING)
    return " ".join(sentences)


def _unequal_dense(measured: Sequence[Metrics]) -> list[str]:
    sentences = []
    for model in dict.fromkeys(metrics.model for metrics in measured):
        dense = [metrics.dense.mean_perplexity for metrics in measured if metrics.model == model]
        low, high = perplexity_text(min(dense)), perplexity_text(max(dense))
        if low != high:
            sentences.append(
                f"Dense {model} measured {low} to {high} over the runs; the first is shown, and each run is compared "
                "with its own."
            )
    return sentences
