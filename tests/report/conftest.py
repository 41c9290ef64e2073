"""Made-up runs: perplexity and bytes follow simple rules, so that every number in a test can be worked out by hand."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteRun = Callable[..., Path]
DENSE_BYTES = {"tiny_qwen3_moe": 8_600_000, "tiny_deepseek_v2": 9_800_000}


def made_up_variant(
    name: str, perplexity: float, kept: float, bits: int, accuracy: float, model: str
) -> dict[str, Any]:
    total = DENSE_BYTES[model] / 2
    size = kept * bits / 16
    return {
        "name": name,
        "perplexity": {"prose": perplexity, "code": perplexity / 4},
        "perplexity_tokens": {"prose": 8128, "code": 4064},
        "mean_perplexity": perplexity / 2,
        "tasks": {
            "word_order": {"accuracy": accuracy, "stderr": 0.02, "n": 200},
            "arithmetic": {"accuracy": accuracy / 2, "stderr": 0.01, "n": 400},
        },
        "parameters": {
            "total": int(total * kept),
            "routed": int(0.8 * total * kept),
            "active": int(0.4 * total * kept),
        },
        "bytes": {
            "ideal": int(DENSE_BYTES[model] * size),
            "with_overhead": int(DENSE_BYTES[model] * size * (1 if name == "dense" else 1.1)),
            "on_disk": int(DENSE_BYTES[model] * size * (1 if name == "dense" else 1.2)),
        },
    }


def made_up_metrics(harm: float = 1.0, removes: bool = True, **settings: Any) -> dict[str, Any]:
    """Metrics as a run writes them; ``harm`` says how much pruning raised the perplexity, ``removes`` whether it
    removed channels rather than single weights."""
    metrics: dict[str, Any] = {
        "model": "tiny_qwen3_moe",
        "method": "moe_slimming",
        "scorer": "attribution",
        "allocator": "coverage",
        "surgery": "none",
        "quantizer": "nf4",
        "recovery": "none",
        "calibration": "mixed",
        "ratio": 0.5,
        "seed": 0,
        **settings,
    }
    model, ratio = metrics["model"], metrics["ratio"]
    pruned, kept = 50 * (1 + harm * ratio**2), 1 - 0.8 * ratio
    metrics["variants"] = [
        made_up_variant("dense", 50, 1, 16, 0.9, model),
        made_up_variant("pruned", pruned, kept, 16, 0.9 - 0.1 * harm * ratio, model),
    ]
    if metrics["quantizer"] != "none":
        name = f"pruned+{metrics['quantizer']}"
        metrics["variants"].append(made_up_variant(name, 1.04 * pruned, kept, 4, 0.88 - 0.1 * harm * ratio, model))
    metrics["stages"] = made_up_stages(metrics)
    metrics["plan"] = {
        "removed_channels": int(6144 * ratio) if removes else 0,
        "total_channels": 6144,
        "removed_ratio": ratio if removes else 0.0,
        "live_experts": [16, 15, 12, 16],
        "note": "",
    }
    return metrics


def made_up_stages(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Stages whose keys follow from what they depend on; those of the dense model were in the cache."""
    dense = f"{metrics['model']}-{metrics['calibration']}"
    scored = f"{dense}-{metrics['method']}-{metrics['scorer']}"
    planned = f"{scored}-{metrics['allocator']}-{metrics['ratio']}"
    stages = (
        ("calibration", dense, True, 0.04, None),
        ("statistics", dense, True, 9.5, 0.75),
        ("calibration_report", dense, True, 0.5, None),
        ("scores", scored, False, 0.25, 0.5),
        ("plan", planned, False, 0.5, 0.5),
        ("diagnostics", planned, False, 0.125, None),
        ("pruned", planned, False, 3.25, 0.914),
        ("evaluation/dense", dense, True, 8.0, 0.75),
        ("evaluation/pruned", planned, False, 4.0, 0.75),
    )
    names = ("stage", "key", "cached", "seconds", "peak_memory_gib")
    made = [dict(zip(names, stage, strict=True)) for stage in stages]
    return [{**stage, "key": hashlib.sha256(stage["key"].encode()).hexdigest()[:16]} for stage in made]


@pytest.fixture
def write_run() -> WriteRun:
    """Write a run directory: ``write_run(run_dir, harm=1.0, ratio=0.5, ...)``; with ``error`` the run failed."""

    def write(run_dir: Path, *, error: tuple[str, str] | None = None, overrides: tuple[str, ...] = (), **made_up: Any):
        run_dir.mkdir(parents=True)
        failure = {"type": error[0], "message": error[1]} if error else None
        manifest = {"status": "failed" if error else "success", "error": failure, "overrides": list(overrides)}
        (run_dir / "manifest.json").write_text(json.dumps(manifest))
        if error is None:
            (run_dir / "metrics.json").write_text(json.dumps(made_up_metrics(**made_up)))
        return run_dir

    return write


@pytest.fixture
def made_up_diagnostics() -> dict[str, Any]:
    """Three layers of four experts of width 16: one is removed, one complete, and one never had a score."""
    return {
        "width": 16,
        "kept_channels": [[0, 16, 8, 8], [4, 4, 12, 12], [8, 8, 8, 8]],
        "merged_into": None,
        "router_entropy": {"nats": [0.7, 1.0, 1.3], "share_of_uniform": [0.5, 0.7, 0.9]},
        "channel_scores": {
            "lorenz_positions": [0.0, 0.5, 1.0],
            "lorenz": [[0.0, 0.2, 1.0], [0.0, 0.3, 1.0], [0.0, 0.4, 1.0]],
            "gini": [[None, 0.4, 0.3, 0.2], [0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]],
            "top_tenth": [[None, 0.4, 0.3, 0.2], [0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]],
            "layer_gini": [0.5, 0.4, 0.3],
            "layer_top_tenth": [0.4, 0.3, 0.2],
        },
        "coverage": {
            "expert": [[None, 1.0, 0.7, 0.7], [0.5, 0.5, 0.9, 0.9], [0.7, 0.7, 0.7, 0.7]],
            "layer": [0.8, 0.7, 0.7],
            "judged_by": {"layer_weight": "loss"},
            "objective": 2.1,
            "upper_bound": 2.2,
            "gap": 0.0455,
        },
        "without_channel_scores": None,
    }
