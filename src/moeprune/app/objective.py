"""What a search minimises or maximises: one number of a run's summary."""

from collections.abc import Mapping
from typing import Any

from moeprune.app.tracking import summary_metrics
from moeprune.errors import InputError


def objective_of(metrics: Mapping[str, Any], name: str) -> float:
    """The summary metric ``name``, such as ``final/mean_perplexity``.

    Raises InputError for a metric that the run has not.
    """
    found = summary_metrics(metrics)
    if name not in found:
        raise InputError(f"objective={name} is not a metric of this run.", possible=sorted(found), given=name)
    return float(found[name])
