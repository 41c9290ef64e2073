"""The one number that a search gets from a run."""

import pytest

from moeprune.app.objective import objective_of
from moeprune.errors import InputError

METRICS = {
    "ratio": 0.5,
    "plan": {"removed_ratio": 0.5},
    "variants": [
        {"name": "dense", "mean_perplexity": 10.0, "bytes": {"with_overhead": 200}},
        {"name": "pruned+nf4", "mean_perplexity": 12.0, "bytes": {"with_overhead": 50}},
    ],
}


def test_it_is_the_summary_metric_that_is_asked_for():
    assert objective_of(METRICS, "final/mean_perplexity") == 12.0
    assert objective_of(METRICS, "dense/mean_perplexity") == 10.0
    assert objective_of(METRICS, "pruned+nf4/bytes/with_overhead") == 50.0


def test_another_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"(?s)objective=pruned/mean_perplexity.*Did you mean: pruned\+nf4/mean_perp"):
        objective_of(METRICS, "pruned/mean_perplexity")
