"""Every method prunes a model end to end, and targets are met, on a tiny checkpoint."""

import json

import pytest

from moeprune.app.main import config_folder

METHODS = sorted(file.stem for file in (config_folder() / "method").glob("*.yaml"))
KEEPS_ALL = "wanda_unstructured"


def metrics_of(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    (manifest,) = outcome.manifests
    return json.loads((manifest.parent / "metrics.json").read_text())


def test_every_method_removes_half_of_the_routed_channels(here, tiny, subtests):
    """As one sweep: jobs of a sweep share their statistics, and draw nothing."""
    outcome = here("--multirun", *tiny, f"method={','.join(METHODS)}", "ratio=0.5")
    assert outcome.code == 0, outcome.err
    runs = [json.loads((manifest.parent / "metrics.json").read_text()) for manifest in outcome.manifests]
    assert sorted(metrics["method"] for metrics in runs) == METHODS
    for metrics in runs:
        with subtests.test(method=metrics["method"]):
            assert_half_removed(metrics)


def assert_half_removed(metrics: dict) -> None:
    dense, pruned = metrics["variants"]
    if metrics["method"] == KEEPS_ALL:
        assert metrics["plan"]["removed_channels"] == 0
        assert pruned["parameters"] == dense["parameters"]
    else:
        assert metrics["plan"]["removed_ratio"] == 0.5
        kept = pruned["parameters"]["routed"] / dense["parameters"]["routed"]
        assert 0.5 <= kept < 0.6  # biases come on top
        assert pruned["bytes"]["with_overhead"] < dense["bytes"]["with_overhead"]
    assert pruned["mean_perplexity"] != dense["mean_perplexity"]


@pytest.mark.parametrize("method", ["moe_slimming", "frequency"])
def test_a_target_in_bytes_is_met(here, tiny, method):
    metrics = metrics_of(here(*tiny, f"method={method}", "target_bytes=100000"))
    dense, pruned = metrics["variants"]
    channels = metrics["plan"]["total_channels"]
    routed_bytes = 4 * dense["parameters"]["routed"]
    step = 4 if method == "moe_slimming" else 2 * 16  # a block, or an expert of each layer
    assert dense["bytes"]["with_overhead"] > 100000
    assert 100000 - (step + 1) * routed_bytes / channels - 2048 < pruned["bytes"]["with_overhead"] <= 100000
    assert metrics["ratio"] == pytest.approx(metrics["plan"]["removed_ratio"])


def test_a_target_in_active_parameters_is_met(here, tiny):
    metrics = metrics_of(here(*tiny, "method=moe_slimming", "surgery=keep_rows", "target_active_parameters=20500"))
    dense, pruned = metrics["variants"]
    assert pruned["parameters"]["active"] <= 20500 < dense["parameters"]["active"]
