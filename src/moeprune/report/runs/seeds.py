"""Runs that differ in nothing but their seed, together: one row of a table, with mean and standard deviation."""

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from moeprune.report.runs.results import MeasuredOn, Metrics, Run
from moeprune.report.runs.settings import run_labels, setting_text
from moeprune.report.runs.variants import Variant

# What tells runs of one row apart, and what changes no result.
SEED = "seed"
WITHOUT_EFFECT = ("experiment", "tracking", "cache_dir", "save_model", "until", "objective", "model.experts_per_token")
DENSE = "dense"

# Model, experts per token, ratio, quantizer, what was measured on.
Rivals = tuple[str, int | None, float, str, MeasuredOn | None]


@dataclass(frozen=True)
class Spread:
    """Mean over ``n`` runs and their sample standard deviation (of n - 1), which one run does not have."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Row:
    """What was asked, by ``method`` beside the others; its runs with results, one per seed; and those without.

    A dense row has all runs of its model and evaluation, since each of them measured the dense model again. ``ratio``
    and ``quantizer`` are None where no run of the row has come so far that they are known.
    """

    model: str
    experts_per_token: int | None
    method: str
    ratio: float | None
    quantizer: str | None
    runs: tuple[Run, ...]
    unfinished: tuple[Run, ...] = ()

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE

    @property
    def results(self) -> list[Metrics]:
        return [run.results for run in self.runs if run.results]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(metrics.seed for metrics in self.results)

    @property
    def rivals(self) -> Rivals | None:
        """Rows of one size and evaluation are compared with each other; dense, reference and unfinished rows with
        none."""
        if self.is_dense or self.ratio is None or self.quantizer is None or not self.runs or self.is_reference:
            return None
        return self.model, self.experts_per_token, self.ratio, self.quantizer, self.measured_on

    @property
    def measured_on(self) -> MeasuredOn | None:
        """That of all its runs; None where none has results."""
        return next((metrics.measured_on for metrics in self.results), None)

    @property
    def is_reference(self) -> bool:
        """Whether nothing was removed although it was asked for."""
        return not self.is_dense and any(metrics.is_reference for metrics in self.results)

    @property
    def bits(self) -> float | None:
        """Nominal bits of a routed expert's weight in the measured variant; None where they are not known."""
        if self.is_dense or self.quantizer == "none":
            return 16.0
        return next((bits for metrics in self.results if (bits := metrics.final.expert_bits) is not None), None)

    def variant(self, metrics: Metrics) -> Variant:
        """The one that the row is about."""
        return metrics.dense if self.is_dense else metrics.final

    def spread(self, value: Callable[[Metrics, Variant], float | None]) -> Spread | None:
        """Over the runs that have the value; None where none has. Of a dense row, the values of one run, where all
        runs measured the same."""
        found = (value(metrics, self.variant(metrics)) for metrics in self.results)
        values = [number for number in found if number is not None]
        if self.is_dense and len(set(values)) == 1:
            values = values[:1]
        return spread(values) if values else None

    @property
    def why_missing(self) -> str:
        """What became of the runs without results."""
        states: dict[str, list[str]] = {}
        for run in self.unfinished:
            states.setdefault(run.state, []).append(run.name)
        told = ((f"run{'s' * (len(names) > 1)} {', '.join(names)}", state) for state, names in states.items())
        return "; ".join(f"{names}: {state}" for names, state in told)


def spread(values: Sequence[float]) -> Spread:
    """Arithmetic mean and sample standard deviation; infinite where a value is."""
    if not all(map(math.isfinite, values)):
        return Spread(math.inf if math.inf in values else math.nan, None, len(values))
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def distinct(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs that count, in their order, and those that another run replaces.

    Of runs with the same settings and the same seed, the one that was written last counts, of those with results where
    there are any: what was started again is one run. Runs that measured something else are others.
    """
    chosen: dict[tuple[object, ...], Run] = {}
    finished: set[tuple[object, ...]] = set()
    for run, label in zip(runs, run_labels(runs, without=(SEED, *WITHOUT_EFFECT)), strict=True):
        model, seed = setting_text(run, "model"), setting_text(run, SEED)
        known = None not in (model, seed)
        asked: tuple[object, ...] = (*_place(run), label, seed) if known else (run.folder,)
        key = (*asked, run.results.measured_on if run.results else None)
        if run.results:
            finished.add(asked)
        if key not in chosen or run.updated >= chosen[key].updated:
            chosen[key] = run
    kept = {id(run) for key, run in chosen.items() if run.results or key[:-1] not in finished}
    return [run for run in runs if id(run) in kept], [run for run in runs if id(run) not in kept]


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Per model its dense row, then a row for each thing that was asked, rivals side by side: by ratio, by quantizer,
    then in the order of the runs. What is known of no model comes last."""
    rows: list[Row] = []
    labels = run_labels(runs, without=(SEED, *WITHOUT_EFFECT))
    for run, label in sorted(zip(runs, labels, strict=True), key=lambda pair: pair[0].results is None):
        asked = _asked_row(run, label)
        place = next((number for number, row in enumerate(rows) if _same(asked, row)), None)
        if place is None:
            rows.append(asked)
        else:
            row = rows[place]
            more = replace(row, runs=row.runs + asked.runs, unfinished=row.unfinished + asked.unfinished)
            rows[place] = more
    return [_by_seed(row) for row in _with_dense(rows)]


def _asked_row(run: Run, label: str) -> Row:
    model, experts, ratio, quantizer = _place(run)
    known = Row(model or "?", experts, label or "?", ratio, quantizer, ())
    return replace(known, runs=(run,)) if run.results else replace(known, unfinished=(run,))


def _place(run: Run) -> tuple[str | None, int | None, float | None, str | None]:
    """Model, experts per token, ratio, quantizer."""
    experts, ratio = setting_text(run, "model.experts_per_token"), setting_text(run, "ratio")
    if run.results:
        experts_per_token = run.results.experts_per_token
    else:
        experts_per_token = int(experts) if experts and experts.isdecimal() else None
    return (
        setting_text(run, "model"), experts_per_token, None if ratio is None else float(ratio),
        setting_text(run, "quantizer"),
    )  # fmt: skip


def _same(asked: Row, row: Row) -> bool:
    """Whether a run belongs to the row; what is not known of an unfinished run does not speak against it."""
    if asked.method != row.method or asked.experts_per_token != row.experts_per_token:
        return False
    if asked.runs and row.runs and asked.measured_on != row.measured_on:
        return False
    pairs = ((asked.model, row.model), (asked.ratio, row.ratio), (asked.quantizer, row.quantizer))
    return all(known == other or (not asked.runs and known in (None, "?")) for known, other in pairs)


def _with_dense(rows: Sequence[Row]) -> Iterator[Row]:
    known = {(row.model, row.experts_per_token): row.measured_on for row in reversed(rows) if row.runs}
    groups: dict[tuple[str, int | None, MeasuredOn | None], list[Row]] = {}
    for row in rows:
        measured_on = row.measured_on if row.runs else known.get((row.model, row.experts_per_token))
        groups.setdefault((row.model, row.experts_per_token, measured_on), []).append(row)
    for (model, experts, _), found in sorted(groups.items(), key=lambda item: item[0][0] == "?"):
        runs = tuple({run.folder: run for row in found for run in row.runs}.values())
        if runs:
            yield Row(model, experts, DENSE, 0.0, "none", runs)
        bits = {row.quantizer: row.bits for row in reversed(found) if row.bits is not None}
        order = sorted(dict.fromkeys(row.quantizer for row in found), key=lambda name: -(bits.get(name) or 0))
        yield from sorted(found, key=lambda row: (row.ratio or 0.0, order.index(row.quantizer)))


def _by_seed(row: Row) -> Row:
    runs = sorted(row.runs, key=lambda run: run.results.seed if run.results else 0)
    return replace(row, runs=tuple(runs)) if not row.is_dense else row


def seeds_vary(rows: Collection[Row]) -> bool:
    return any(len(row.runs) + len(row.unfinished) > 1 for row in rows if not row.is_dense)
