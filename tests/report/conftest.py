"""Made-up runs: perplexity and bytes follow simple rules, so that every number in a test can be worked out by hand."""

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


def made_up_metrics(harm: float = 1.0, **settings: Any) -> dict[str, Any]:
    """Metrics as a run writes them; ``harm`` says how much pruning raised the perplexity."""
    metrics: dict[str, Any] = {
        "model": "tiny_qwen3_moe",
        "method": "moe_slimming",
        "scorer": "attribution",
        "allocator": "coverage",
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
    metrics["stages"] = [
        {"stage": "statistics", "key": "ab12cd34ef56ab12", "cached": True, "seconds": 0.04, "peak_memory_gib": None},
        {"stage": "prune", "key": "0123456789abcdef", "cached": False, "seconds": 3.25, "peak_memory_gib": 0.914},
    ]
    metrics["plan"] = {
        "removed_channels": int(6144 * ratio),
        "total_channels": 6144,
        "removed_ratio": ratio,
        "live_experts": [16, 15, 12, 16],
        "note": "",
    }
    return metrics


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
