"""What runs measured before they quantised their model, as runs of their own: a row in 16 bits beside the quantised."""

from collections.abc import Sequence
from dataclasses import replace

from moeprune.report.runs.results import Metrics, Run
from moeprune.report.runs.seeds import distinct


def with_unquantized(runs: Sequence[Run]) -> list[Run]:
    """Each run as far as its model was not quantised yet, unless a run without quantizer is among them that has the
    same settings and seed; then the runs.

    Runs that only quantise are left as they are: what they quantise is the dense model.
    """
    before = [_unquantized(run, run.results) for run in runs if run.results and _quantized_last(run.results)]
    kept = set(map(id, distinct([*before, *runs])[0]))
    return [*(run for run in before if id(run) in kept), *runs]


def _quantized_last(metrics: Metrics) -> bool:
    if metrics.quantizer == "none" or len(metrics.variants) < 3:
        return False
    if metrics.recovery == "none":
        return metrics.ratio > 0
    return metrics.order.endswith("quantize")


def _unquantized(run: Run, metrics: Metrics) -> Run:
    """Not ``updated``, so that a run of its own goes before it."""
    overrides = tuple(word for word in run.overrides if not word.lstrip("+").startswith(("quantizer=", "quantizer.")))
    measured = replace(metrics, quantizer="none", variants=metrics.variants[:-1])
    return replace(run, overrides=overrides, metrics=measured, updated="")
