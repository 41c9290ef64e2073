"""Tables of a grid of ratios and quantizers: perplexity, bytes, and what is best within a budget of bytes."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moeprune.report.documents.files import written_whole
from moeprune.report.runs.grid import Grid, GridPoint, best_within
from moeprune.report.tables.formats import MISSING, byte_unit, byte_unit_note, perplexity_text, ratio_text
from moeprune.report.tables.run_tables import BYTE_KINDS, RATIO_MEANING, column_of, perplexity_meaning, recovery_text
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

QUANTIZERS, BEST = "quantizers", "best"
FRONT_MEANING = (
    "Bold: on the Pareto front, which no other run of the table beats in bytes with overhead and perplexity at once"
)
USUAL_TIMES_SMALLER = 4


def grid_tables(grids: Sequence[Grid]) -> list[Table]:
    """Of each grid the perplexities and the sizes; then the best runs within budgets of bytes, for all grids."""
    return [table for grid in grids for table in (_perplexities(grid), _sizes(grid))] + [_budgets(grids)]


def write_grid_csv(grids: Sequence[Grid], path: Path) -> None:
    """Every number of the grids, unrounded, one row per run."""
    rows = [row for grid in grids for row in _csv_rows(grid)]
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def grid_takeaway(grid: Grid) -> str:
    """How many runs are on the front, and what wins at a usual budget, beside pruning and quantisation alone."""
    budgets = grid.budgets()
    times = max((times for times in budgets if times <= USUAL_TIMES_SMALLER), default=None)
    front = (
        f"{grid.model}, {grid.method}: {len(grid.front)} of {len(grid.points)} runs are on the Pareto front of bytes "
        "and perplexity"
    )
    best = best_within(grid.points, budgets[times]) if times else None
    if times is None or best is None:
        return f"{front}."
    unit_bytes, unit = byte_unit([grid.dense_bytes])
    return (
        f"{front}; within {budgets[times] / unit_bytes:.2f} {unit} ({times:g} times smaller than dense) {best.name} is "
        f"best, with mean perplexity {perplexity_text(best.perplexity)} ({ratio_text(best.to_dense)} times dense); "
        f"{_alone(grid, budgets[times])}."
    )


def _alone(grid: Grid, budget: float) -> str:
    texts = []
    for name, points in (("pruning", _pruned_only(grid)), ("quantisation", _quantized_only(grid))):
        best = best_within(points, budget)
        texts.append(f"{name} alone {f'reaches {_reached(best)}' if best else 'has no run that small'}")
    return ", ".join(texts)


def _pruned_only(grid: Grid) -> list[GridPoint]:
    return [point for point in grid.points if point.quantizer == "none"]


def _quantized_only(grid: Grid) -> list[GridPoint]:
    return [point for point in grid.points if point.ratio == 0]


def _reached(point: GridPoint) -> str:
    return f"{perplexity_text(point.perplexity)} ({point.name})"


def _perplexities(grid: Grid) -> Table:
    metrics = grid.points[0].metrics
    dense = perplexity_text(metrics.dense.mean_perplexity)
    columns = _columns(grid, lambda point: perplexity_text(point.perplexity))
    caption = f"{_about(grid)} {FRONT_MEANING}. Dense: {dense}. {perplexity_meaning([metrics])}"
    return Table(f"{grid.model}, {grid.method}: mean perplexity by ratio and quantizer", columns, caption)


def _sizes(grid: Grid) -> Table:
    unit_bytes, unit = byte_unit([grid.dense_bytes])
    columns = _columns(grid, lambda point: f"{point.bytes / unit_bytes:.2f}")
    caption = (
        f"{_about(grid)} {FRONT_MEANING}. Dense: {grid.dense_bytes / unit_bytes:.2f}. {byte_unit_note(unit)}, with "
        "scales and unquantised tensors."
    )
    return Table(f"{grid.model}, {grid.method}: {unit} with overhead by ratio and quantizer", columns, caption)


def _columns(grid: Grid, text: Callable[[GridPoint], str]) -> list[Column]:
    """A row per ratio, a column per quantizer."""
    columns = [column_of("ratio", (f"{ratio:g}" for ratio in grid.ratios), ROW_NAME)]
    for quantizer in grid.quantizers:
        points = [grid.point_of.get((ratio, quantizer)) for ratio in grid.ratios]
        cells = [Cell(text(point), best=point in grid.front) if point else Cell(MISSING) for point in points]
        columns.append(Column(quantizer_text(grid, quantizer), cells, QUANTIZERS))
    return columns


def quantizer_text(grid: Grid, quantizer: str, separator: str = "\n") -> str:
    """``nf4``, and on the next line its bits where they are known."""
    bits = grid.bits_of(quantizer)
    return quantizer if bits is None else f"{quantizer}{separator}{bits:g} bits"


def _about(grid: Grid) -> str:
    metrics = grid.points[0].metrics
    surgery = "" if metrics.surgery == "none" else f"; surgery {metrics.surgery}"
    return (
        f"Model {grid.model}; method {grid.method}{surgery}; recovery {recovery_text(metrics)}; calibration "
        f"{metrics.calibration}; seed {metrics.seed}. Rows: {RATIO_MEANING}. Bits: of a routed expert's weight, "
        "nominally."
    )


def _budgets(grids: Sequence[Grid]) -> Table:
    """One row per grid and budget."""
    unit_bytes, unit = byte_unit(grid.dense_bytes for grid in grids)
    rows = [(grid, times, budget) for grid in grids for times, budget in grid.budgets().items()]
    best = [best_within(grid.points, budget) for grid, _, budget in rows]
    pruned = (best_within(_pruned_only(grid), budget) for grid, _, budget in rows)
    quantized = (best_within(_quantized_only(grid), budget) for grid, _, budget in rows)
    columns = [
        column_of("model", (grid.model for grid, *_ in rows), ROW_NAME),
        *([column_of("method", (grid.method for grid, *_ in rows), ROW_NAME)] if _differ(grids) else []),
        column_of(
            f"within\n{unit}", (f"{budget / unit_bytes:.2f} ({times:g}x)" for _, times, budget in rows), ROW_NAME
        ),
        column_of("best", (_text(point, lambda point: point.name) for point in best), BEST),
        column_of(unit, (_text(point, lambda point: f"{point.bytes / unit_bytes:.2f}") for point in best), BEST),
        column_of("mean\nperplexity", (_text(p, lambda point: perplexity_text(point.perplexity)) for p in best), BEST),
        column_of("perplexity\n/ dense", (_text(p, lambda point: ratio_text(point.to_dense)) for p in best), BEST),
        column_of("pruning\nalone", (_text(point, _reached) for point in pruned), BEST),
        column_of("quantisation\nalone", (_text(point, _reached) for point in quantized), BEST),
    ]
    caption = (
        "Best: the lowest mean perplexity among the runs of the tables above that take no more bytes with overhead. "
        f"(2x): half of the dense model's; {byte_unit_note(unit)}. Percent: {RATIO_MEANING}; with it the quantizer. "
        "Alone: the best run of the same budget without a quantizer, or that removes no channels, with its mean "
        f"perplexity; {MISSING}: none is that small."
    )
    return Table("Best within a budget of bytes", columns, caption)


def _text(point: GridPoint | None, of: Callable[[GridPoint], str]) -> str:
    return MISSING if point is None else of(point)


def _differ(grids: Sequence[Grid]) -> bool:
    return len({grid.method for grid in grids}) > 1


def _csv_rows(grid: Grid) -> Iterator[dict[str, object]]:
    for point in grid.points:
        yield {
            "model": grid.model,
            "method": grid.method,
            "run": point.run,
            "ratio": point.ratio,
            "quantizer": point.quantizer,
            "bits": point.bits,
            "mean_perplexity": point.perplexity,
            "perplexity_to_dense": point.to_dense,
            **{f"bytes.{kind}": getattr(point.metrics.final.bytes, kind) for kind in BYTE_KINDS},
            "dense_bytes": grid.dense_bytes,
            "on_front": point in grid.front,
        }
