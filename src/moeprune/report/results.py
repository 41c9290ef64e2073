"""What a run wrote (``manifest.json``, ``metrics.json``), read into frozen dataclasses."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from moeprune.errors import InputError

SETTINGS = (
    "model", "method", "scorer", "allocator", "surgery", "ratio", "quantizer", "recovery", "training_data", "order",
    "calibration", "seed",
)  # fmt: skip
# What runs did that were made before there was a choice.
BEFORE_THE_CHOICE = {"surgery": "none", "training_data": None, "order": ("prune", "recover", "quantize")}
ORDER_SEPARATOR = " > "
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on ``n`` examples with its standard error, both as fractions of 1."""

    accuracy: float
    stderr: float
    n: int


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters in all, in routed experts, and active for one token."""

    total: int
    routed: int
    active: int


@dataclass(frozen=True)
class ByteCounts:
    """Parameters times ideal bits; with scales and unquantised tensors; files as written (None where none were); the
    weights as they lie in memory while the model runs (None in metrics of before it was counted)."""

    ideal: int
    with_overhead: int
    on_disk: int | None
    in_memory: int | None = None


@dataclass(frozen=True)
class PartPrecision:
    """How one part of a model is stored: ``bits`` of a weight nominally, and with all scales and code books."""

    part: str
    format: str
    bits: float
    bits_with_overhead: float
    matrices: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class RecoveryDetails:
    """What a recovery cost and how it ended; each group of parameters that trained has its highest learning rate.

    ``merged``: whether nothing is left beside the weights. What storing the result moved the logits by:
    ``stored_difference``, the root mean square relative to their size, and ``stored_max_difference``, at most. A
    recovery of a user's own may leave these out.
    """

    training_tokens: int
    steps: int
    seconds: float
    trained_parameters: int
    learning_rates: Mapping[str, float]
    final_loss: float | None = None
    merged: bool | None = None
    stored_difference: float | None = None
    stored_max_difference: float | None = None


@dataclass(frozen=True)
class Variant:
    """One measured model of a run: dense, pruned, recovered, quantised; mappings go by text or task name.

    ``precision`` is empty in metrics of before it was written down.
    """

    name: str
    perplexity: Mapping[str, float]
    perplexity_tokens: Mapping[str, int]
    mean_perplexity: float
    tasks: Mapping[str, TaskScore]
    parameters: ParameterCounts
    bytes: ByteCounts
    precision: tuple[PartPrecision, ...]


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run: how long it took, what it used at most, and whether the cache had it."""

    stage: str
    key: str
    cached: bool
    seconds: float
    peak_memory_gib: float | None


@dataclass(frozen=True)
class PlanSummary:
    """How many channels the plan removed, and how many experts of each layer still have any."""

    removed_channels: int
    total_channels: int
    removed_ratio: float
    live_experts: tuple[int, ...]
    note: str


@dataclass(frozen=True)
class Metrics:
    """Everything a run measured, with the choices that made it; ``ratio`` = routed-expert channels removed.

    ``order`` names the stages as they were run, as in "prune > recover > quantize"; ``training_data`` is None for a run
    without recovery.
    """

    model: str
    method: str | None
    scorer: str
    allocator: str
    surgery: str
    ratio: float
    quantizer: str
    recovery: str
    training_data: str | None
    order: str
    calibration: str
    seed: int
    variants: tuple[Variant, ...]
    stages: tuple[StageRecord, ...]
    plan: PlanSummary
    recovery_details: RecoveryDetails | None

    @property
    def dense(self) -> Variant:
        return next(variant for variant in self.variants if variant.name == "dense")

    @property
    def pruned(self) -> Variant:
        """The model as it was cut: adapters that were added later are no part of what pruning removed."""
        return next((variant for variant in self.variants if variant.name == "pruned"), self.final)

    @property
    def final(self) -> Variant:
        return self.variants[-1]

    @property
    def order_matters(self) -> bool:
        """Whether the run had stages that could have been run in another order."""
        return self.recovery != "none" and self.quantizer != "none"

    @property
    def is_reference(self) -> bool:
        """Whether the run was asked to remove channels and removed none, as one that only zeroes single weights: its
        model is not smaller, so it is shown beside the others and competes with none."""
        return self.ratio > 0 and self.plan.removed_channels == 0


@dataclass(frozen=True)
class RunError:
    """The exception that ended a run."""

    type: str
    message: str


@dataclass(frozen=True)
class Run:
    """One run directory; ``metrics`` is None where the run wrote none."""

    name: str
    status: str
    error: RunError | None
    overrides: tuple[str, ...]
    metrics: Metrics | None

    @property
    def results(self) -> Metrics | None:
        """The metrics of a run that ended well; None for any other, whose metrics may be partial or of an older try."""
        return self.metrics if self.status == "success" else None


def load_metrics(run_dir: Path) -> Metrics:
    """The metrics that a run wrote. Raises KeyError or TypeError where they are of another version."""
    return _metrics(_read_json(run_dir / "metrics.json"))


def load_run(run_dir: Path) -> Run:
    """Read one run directory. Raises InputError when it has no manifest or a file in it cannot be read."""
    manifest_path, metrics_path = run_dir / "manifest.json", run_dir / "metrics.json"
    manifest = _read_json(manifest_path)
    with _expected_entries(metrics_path):
        metrics = _metrics(_read_json(metrics_path)) if metrics_path.exists() else None
    with _expected_entries(manifest_path):
        failure, status = manifest.get("error"), manifest["status"]
        if status == "success" and manifest.get("until"):
            # As it was asked to; metrics are then those of an earlier run in the same directory.
            status, metrics = f"stopped after {manifest['until']}", None
        return Run(
            name=run_dir.resolve().name,
            status=status,
            error=_entry(RunError, failure) if failure else None,
            overrides=tuple(manifest.get("overrides", ())),
            metrics=metrics,
        )


@contextmanager
def _expected_entries(path: Path) -> Iterator[None]:
    """Say which file lacks an entry."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} does not have the expected entries: {error}.") from error


def load_sweep(sweep_dir: Path) -> tuple[Run, ...]:
    """Read every sub-directory that has a manifest, in numeric order. Raises InputError when there is none."""
    run_dirs = [manifest.parent for manifest in sweep_dir.glob("*/manifest.json")]
    if not run_dirs:
        raise InputError(
            f"{sweep_dir} holds no runs: none of its sub-directories has a manifest.json.",
            change="Give the directory of a sweep, such as runs/2025-01-31/12-00-00-sweep.",
        )
    return tuple(load_run(run_dir) for run_dir in sorted(run_dirs, key=lambda run_dir: _numeric_order(run_dir.name)))


def _numeric_order(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is not a run directory: it has no {path.name}.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged: {error}.", change="Run again, or remove the directory.") from error
    return content


def _metrics(written: dict[str, Any]) -> Metrics:
    raw = {**BEFORE_THE_CHOICE, **written}
    raw["order"] = ORDER_SEPARATOR.join(raw["order"])
    if raw.get("recovery") == "none":
        raw["training_data"] = None
    variants = tuple(_variant(variant) for variant in raw["variants"])
    if not any(variant.name == "dense" for variant in variants):
        raise KeyError("a variant named dense")
    plan, details = raw["plan"], raw.get("recovery_details")
    return Metrics(
        **{setting: raw[setting] for setting in SETTINGS},
        variants=variants,
        stages=tuple(_entry(StageRecord, stage) for stage in raw["stages"]),
        plan=_entry(PlanSummary, {**plan, "live_experts": tuple(plan["live_experts"])}),
        recovery_details=_entry(RecoveryDetails, details) if details else None,
    )


def _variant(raw: dict[str, Any]) -> Variant:
    return Variant(
        name=raw["name"],
        perplexity=raw["perplexity"],
        perplexity_tokens=raw["perplexity_tokens"],
        mean_perplexity=raw["mean_perplexity"],
        tasks={task: _entry(TaskScore, score) for task, score in raw["tasks"].items()},
        parameters=_entry(ParameterCounts, raw["parameters"]),
        bytes=_entry(ByteCounts, raw["bytes"]),
        precision=tuple(_entry(PartPrecision, row) for row in raw.get("precision", ())),
    )


def _entry(kind: type[Entry], raw: dict[str, Any]) -> Entry:
    """The entries that ``kind`` names; those that a later version added are not read, those with a default may lack."""
    wanted = [field.name for field in fields(kind) if field.default is MISSING or field.name in raw]  # type: ignore[arg-type]
    return kind(**{name: raw[name] for name in wanted})
