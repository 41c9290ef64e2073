"""The numbers of a row that are aggregated over seeds, each with its name in the CSV."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeprune.report.runs.results import Metrics
from moeprune.report.runs.seeds import Row
from moeprune.report.runs.variants import Variant
from moeprune.report.tables.run_tables import names_in

AVERAGE = "average"


@dataclass(frozen=True)
class Measure:
    """One number of a run's variant; None where it was not measured."""

    name: str
    of: Callable[[Metrics, Variant], float | None]


MEAN_PERPLEXITY = Measure("mean_perplexity", lambda _, variant: variant.mean_perplexity)
TO_DENSE = Measure(
    "perplexity_to_dense", lambda metrics, variant: variant.mean_perplexity / metrics.dense.mean_perplexity
)
BYTES = Measure("bytes_with_overhead", lambda _, variant: variant.bytes.with_overhead)
TIMES_SMALLER = Measure(
    "times_smaller", lambda metrics, variant: metrics.dense.bytes.with_overhead / variant.bytes.with_overhead
)
TIMES_SMALLER_IDEAL = Measure(
    "times_smaller_ideal", lambda metrics, variant: metrics.dense.bytes.ideal / variant.bytes.ideal
)
PREFILL = Measure("prefill_to_dense", lambda metrics, variant: _speed_ratio(metrics, variant, "prefill"))
DECODE = Measure("decode_to_dense", lambda metrics, variant: _speed_ratio(metrics, variant, "decode"))
# By the head of its column.
RECOVERY_COSTS = {
    "training\ntokens": Measure("training_tokens", lambda run, own: _recovery_cost(run, own, "training_tokens")),
    "recovery\nseconds": Measure("recovery_seconds", lambda run, own: _recovery_cost(run, own, "seconds")),
    "trained\nparameters": Measure(
        "trained_parameters", lambda run, own: _recovery_cost(run, own, "trained_parameters")
    ),
}


# Over the tasks that the run measured: another model in the same table may have others.
AVERAGE_ACCURACY = Measure(f"accuracy.{AVERAGE}", lambda metrics, variant: _average(variant, list(metrics.dense.tasks)))
GAINED_ACCURACY = Measure("points_to_dense", lambda metrics, variant: _gained(metrics, variant))


def accuracy(task: str) -> Measure:
    """Percent of a task's examples that were answered rightly."""
    return Measure(f"accuracy.{task}", lambda _, variant: _percent(variant, task))


def average_accuracy(tasks: Sequence[str]) -> Measure:
    """Mean over the tasks in percent; None where one of them is missing."""
    return Measure(f"accuracy.{AVERAGE}", lambda _, variant: _average(variant, tasks))


def measures_of(rows: Sequence[Row]) -> list[Measure]:
    """Everything that the rows' runs measured, for the CSV."""
    variants = [row.variant(metrics) for row in rows for metrics in row.results]
    texts, tasks = names_in(variant.perplexity for variant in variants), tasks_of(rows)
    return [
        MEAN_PERPLEXITY,
        TO_DENSE,
        *(_perplexity(text) for text in texts),
        *(accuracy(task) for task in tasks),
        *([AVERAGE_ACCURACY, GAINED_ACCURACY] if tasks else []),
        BYTES,
        TIMES_SMALLER,
        TIMES_SMALLER_IDEAL,
        Measure("bytes_ideal", lambda _, variant: variant.bytes.ideal),
        Measure("parameters", lambda _, variant: variant.parameters.total),
        Measure("parameters_active", lambda _, variant: variant.parameters.active),
        *(_speeds() if any(variant.speed for variant in variants) else []),
        *(RECOVERY_COSTS.values() if any(row.results[0].recovery_details for row in rows if row.runs) else []),
    ]


def _speeds() -> list[Measure]:
    return [
        PREFILL,
        DECODE,
        Measure("prefill_tokens_per_second", lambda _, own: own.speed.prefill_tokens_per_second if own.speed else None),
        Measure("decode_tokens_per_second", lambda _, own: own.speed.decode_tokens_per_second if own.speed else None),
    ]


def tasks_of(rows: Sequence[Row]) -> list[str]:
    return names_in(row.variant(metrics).tasks for row in rows for metrics in row.results)


def _perplexity(text: str) -> Measure:
    return Measure(f"perplexity.{text}", lambda _, variant: variant.perplexity.get(text))


def _percent(variant: Variant, task: str) -> float | None:
    return 100 * variant.tasks[task].accuracy if task in variant.tasks else None


def _average(variant: Variant, tasks: Sequence[str]) -> float | None:
    found = [_percent(variant, task) for task in tasks]
    known = [percent for percent in found if percent is not None]
    return sum(known) / len(known) if found and len(known) == len(found) else None


def _gained(metrics: Metrics, variant: Variant) -> float | None:
    """Points of average accuracy above the same run's dense model."""
    tasks = list(metrics.dense.tasks)
    reached, dense = _average(variant, tasks), _average(metrics.dense, tasks)
    return None if reached is None or dense is None else reached - dense


def _speed_ratio(metrics: Metrics, variant: Variant, phase: str) -> float | None:
    own, dense = variant.speed, metrics.dense.speed
    if own is None or dense is None:
        return None
    name = f"{phase}_tokens_per_second"
    return float(getattr(own, name) / getattr(dense, name))


def _recovery_cost(metrics: Metrics, variant: Variant, name: str) -> float | None:
    """What the recovery took; None for the dense model and for a run without one."""
    details = metrics.recovery_details
    return None if details is None or variant is metrics.dense else float(getattr(details, name))
