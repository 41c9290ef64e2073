"""The names of summary metrics: they stay the same from version to version, and dashboards rely on them."""

from collections.abc import Mapping, Sequence
from typing import Any

FINAL = "final"
# A variant's rows of these are in a table of their own, not in the summary.
NO_NUMBERS = ("name", "precision")


def summary_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of ``metrics.json``, flat: ``dense/tasks/cloze/accuracy``, ``pruned+nf4/perplexity/prose``.

    The last variant is there a second time as ``final/...``, by which runs of different choices compare, with
    ``final/perplexity_increase`` (its mean perplexity over the dense model's, less 1) and ``final/compression`` (the
    dense model's bytes over its own, both with overhead).
    """
    flat: dict[str, float] = {"plan/removed_ratio": metrics["plan"]["removed_ratio"]}
    variants = metrics["variants"]
    for variant in variants:
        flat |= variant_metrics(variant["name"], variant)
    if variants:
        flat |= variant_metrics(FINAL, variants[-1]) | _against_dense(variants[0], variants[-1])
    for name in ("training_tokens", "steps", "seconds", "final_loss", "lowest_validation_loss"):
        if name in metrics.get("recovery_details", {}):
            flat[f"recovery/{name}"] = metrics["recovery_details"][name]
    return flat


def variant_metrics(name: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """What is known of one variant of the model, as ``<name>/<metric>``."""
    flat: dict[str, float] = {}
    _flatten(name, {key: value for key, value in metrics.items() if key not in NO_NUMBERS}, flat)
    return flat


def stage_metrics(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each stage, and in all: what was computed now, and what the cache saved."""
    flat = {f"stages/{stage['stage']}/seconds": float(stage["seconds"]) for stage in stages}
    for name, cached in (("computed", False), ("reused", True)):
        flat[f"stages/{name}_seconds"] = sum(float(stage["seconds"]) for stage in stages if stage["cached"] is cached)
    return flat


def _against_dense(dense: Mapping[str, Any], final: Mapping[str, Any]) -> dict[str, float]:
    compared = {}
    if "mean_perplexity" in final:
        compared[f"{FINAL}/perplexity_increase"] = final["mean_perplexity"] / dense["mean_perplexity"] - 1
    if "with_overhead" in final.get("bytes", {}):
        compared[f"{FINAL}/compression"] = dense["bytes"]["with_overhead"] / final["bytes"]["with_overhead"]
    return compared


def _flatten(prefix: str, values: Mapping[str, Any], flat: dict[str, float]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _flatten(f"{prefix}/{name}", value, flat)
        elif isinstance(value, (int, float)):
            flat[f"{prefix}/{name}"] = value
