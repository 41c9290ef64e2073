"""Made-up runs: perplexity and bytes follow simple rules, so that every number in a test can be worked out by hand."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from moeprune.report.runs.results import Metrics, load_metrics

WriteRun = Callable[..., Path]
DENSE_BYTES = {
    "tiny_qwen3_moe": 8_600_000, "tiny_deepseek_v2": 9_800_000, "qwen1_5_moe_a2_7b": 28_631_568_384,
}  # fmt: skip
TASKS = ("word_order", "arithmetic")
# Bits of a weight, and how many times higher the perplexity is.
QUANTIZERS = {"rtn8": (8, 1.005), "nf4": (4, 1.04), "gptq3": (3, 1.25), "hqq2": (2, 20.0)}


def made_up_variant(
    name: str, perplexity: float, kept: float, bits: int, accuracy: float, model: str, tasks: Sequence[str]
) -> dict[str, Any]:
    """The first task is answered best, each later one half as well as the one before."""
    total = DENSE_BYTES[model] / 2
    size = kept * bits / 16
    return {
        "name": name,
        "perplexity": {"prose": perplexity, "code": perplexity / 4},
        "perplexity_tokens": {"prose": 8128, "code": 4064},
        "mean_perplexity": perplexity / 2,
        "tasks": {
            task: {"accuracy": accuracy / 2**number, "stderr": 0.02 / 2**number, "n": 200 * 2**number}
            for number, task in enumerate(tasks)
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
            "in_memory": int(DENSE_BYTES[model] * size * 2),
        },
        "precision": made_up_precision(int(total * kept), bits, name),
    }


def made_up_precision(parameters: int, bits: int, name: str) -> list[dict[str, Any]]:
    """Four fifths of the parameters in routed experts, at a tenth more bits than nominal; the rest in 16 bits."""
    routed, rest = int(0.8 * parameters), int(0.2 * parameters)
    quantized = {"format": name.rpartition("+")[2], "bits": bits, "bits_with_overhead": 1.1 * bits}
    kept = {"format": "bf16", "bits": 16, "bits_with_overhead": 16.0}
    return [
        {
            "part": "routed experts",
            **(kept if bits == 16 else quantized),
            "matrices": 192,
            "parameters": routed,
            "bytes": int(routed * (2 if bits == 16 else 1.1 * bits / 8)),
        },
        {"part": "embeddings", **kept, "matrices": 1, "parameters": rest, "bytes": 2 * rest},
    ]


def made_up_metrics(
    harm: float = 1.0, removes: bool = True, tasks: Sequence[str] = TASKS, **settings: Any
) -> dict[str, Any]:
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
        "training_data": "embedded",
        "order": ["prune", "recover", "quantize"],
        "calibration": "mixed",
        "ratio": 0.5,
        "seed": 0,
        **settings,
    }
    model, ratio = metrics["model"], metrics["ratio"]
    pruned, kept = 50 * (1 + harm * ratio**2), 1 - 0.8 * ratio
    metrics["variants"] = [
        made_up_variant("dense", 50, 1, 16, 0.9, model, tasks),
        made_up_variant("pruned", pruned, kept, 16, 0.9 - 0.1 * harm * ratio, model, tasks),
    ]
    if metrics["recovery"] != "none":
        metrics["recovery_details"] = made_up_recovery(metrics["variants"][-1]["parameters"]["total"])
    if metrics["quantizer"] != "none":
        name, (bits, higher) = f"pruned+{metrics['quantizer']}", QUANTIZERS[metrics["quantizer"]]
        accuracy = 0.88 - 0.1 * harm * ratio
        metrics["variants"].append(made_up_variant(name, higher * pruned, kept, bits, accuracy, model, tasks))
    metrics["stages"] = made_up_stages(metrics)
    metrics["plan"] = {
        "removed_channels": int(6144 * ratio) if removes else 0,
        "total_channels": 6144,
        "removed_ratio": ratio if removes else 0.0,
        "live_experts": [16, 15, 12, 16],
        "note": "",
    }
    return metrics


def made_up_recovery(parameters: int) -> dict[str, Any]:
    """A twentieth of the parameters trained on 500 tokens a second."""
    return {
        "training_tokens": 200_000,
        "steps": 50,
        "seconds": 400.0,
        "trained_parameters": parameters // 20,
        "learning_rates": {"experts": 1e-4, "routers": 1e-6},
        "final_loss": 2.5,
        "merged": True,
        "stored_difference": 0.0016,
        "stored_max_difference": 0.0125,
    }


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


@pytest.fixture(scope="session")
def made_up_results(tmp_path_factory) -> Metrics:
    """Made-up metrics as they are read."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "metrics.json").write_text(json.dumps(made_up_metrics()))
    return load_metrics(run_dir)


@pytest.fixture
def made_up_loss_curve() -> list[dict[str, Any]]:
    """Fifty steps: a warm-up of five, then a cosine; validated at every tenth."""
    points = []
    for step in range(1, 51):
        factor = step / 5 if step <= 5 else (1 + math.cos(math.pi * (step - 5) / 45)) / 2
        point: dict[str, Any] = {"step": step, "loss": 2.5 + 1.5 / step, "kl": 1 / step, "gradient_norm": 0.3}
        if step % 10 == 0:
            point["validation_loss"] = 2.6 + 1.5 / step
        rates = {"experts": 1e-4 * factor, "routers": 1e-6 * factor}
        points.append({**point, "learning_rate": rates, "tokens": 4000 * step, "seconds": 8.0 * step})
    return points


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
