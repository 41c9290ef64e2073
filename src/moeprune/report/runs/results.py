"""What a run wrote (``manifest.json``, ``metrics.json``), read into frozen dataclasses."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moeprune.errors import InputError
from moeprune.report.runs.variants import (
    ByteCounts,
    ParameterCounts,
    PartPrecision,
    PlanSummary,
    RecoveryDetails,
    Speed,
    StageRecord,
    TaskScore,
    Variant,
)

SETTINGS = (
    "model", "method", "scorer", "allocator", "surgery", "ratio", "quantizer", "recovery", "training_data", "order",
    "calibration", "seed",
)  # fmt: skip
# What runs did that were made before there was a choice.
BEFORE_THE_CHOICE = {"surgery": "none", "training_data": None, "order": ("prune", "recover", "quantize")}
CHOSEN_BY_METHOD = ("scorer", "allocator", "surgery")
ORDER_SEPARATOR = " > "
Entry = TypeVar("Entry")
MeasuredOn = tuple[str | None, tuple[tuple[str, int], ...], tuple[tuple[str, int, str | None, int | None], ...]]


@dataclass(frozen=True)
class Metrics:
    """Everything a run measured, with the choices that made it; ``ratio`` = routed-expert channels removed.

    ``order`` names the stages as they were run, as in "prune > recover > quantize"; ``training_data`` is None for a run
    without recovery. ``experiment`` and ``evaluation`` are the choices of these names; ``experts_per_token`` is None
    where it is the checkpoint's.
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
    experiment: str | None = None
    experts_per_token: int | None = None
    evaluation: str | None = None

    @property
    def measured_on(self) -> MeasuredOn:
        """What numbers of two runs must have in common to be compared: the evaluation, its tokens, and its tasks'
        examples and metrics."""
        tokens, tasks = sorted(self.dense.perplexity_tokens.items()), sorted(self.dense.tasks.items())
        return self.evaluation, tuple(tokens), tuple((name, task.n, task.metric, task.fewshot) for name, task in tasks)

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
    """One run directory; ``metrics`` is None where the run wrote none.

    ``asked``: of a run without results, the choices that were composed for it, as far as it wrote them down.
    ``updated``: when its manifest was last written, in UTC.
    """

    name: str
    folder: Path
    status: str
    error: RunError | None
    overrides: tuple[str, ...]
    metrics: Metrics | None
    asked: Mapping[str, str] = field(default_factory=dict)
    updated: str = ""

    @property
    def results(self) -> Metrics | None:
        """The metrics of a run that ended well; None for any other, whose metrics may be partial or of an older try."""
        return self.metrics if self.status == "success" else None

    @property
    def state(self) -> str:
        """The status in words, with the first line of the error that ended the run."""
        if self.results is not None:
            return "success"
        if self.error is not None:
            first_line = self.error.message.partition("\n")[0]
            return f"{self.status}: {self.error.type}: {first_line}"
        return f"{self.status}, no metrics.json" if self.status == "success" else self.status


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
        run = Run(
            name=run_dir.resolve().name,
            folder=run_dir,
            status=status,
            error=_entry(RunError, failure) if failure else None,
            overrides=tuple(manifest.get("overrides", ())),
            metrics=metrics,
            updated=manifest.get("updated") or "",
        )
    return run if run.results is not None else replace(run, asked=_asked(run_dir))


@contextmanager
def _expected_entries(path: Path) -> Iterator[None]:
    """Say which file lacks an entry."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
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


def load_runs(directories: Sequence[Path]) -> tuple[Run, ...]:
    """Every run in or below the directories, each once, with the jobs of their sweeps that have not begun.

    A run is named by its folder below what the directories have in common. Raises InputError when there is none.
    """
    folders: dict[Path, Run] = {}
    for directory in directories:
        for folder in _walk(directory):
            if (folder / "manifest.json").exists():
                folders.setdefault(folder.resolve(), load_run(folder))
        for folder in _walk(directory):
            for run in _not_begun(folder):
                folders.setdefault(run.folder.resolve(), run)
    if not folders:
        raise InputError(
            f"{', '.join(map(str, directories))}: there is no run in it or below: no manifest.json.",
            change="Give the directory of a run or a sweep, such as runs/2025-01-31/12-00-00-sweep.",
        )
    above = Path(os.path.commonpath([directory.resolve() for directory in directories]))
    runs = sorted(folders, key=lambda folder: _numeric_order(str(folder)))
    return tuple(replace(folders[folder], name=_name(folder, above)) for folder in runs)


def _name(folder: Path, above: Path) -> str:
    return folder.relative_to(above).as_posix() if folder != above else folder.name


def _walk(directory: Path) -> Iterator[Path]:
    """The directory and the folders below it, but for hidden ones and what runs hold."""
    for folder, below, files in os.walk(directory):
        below[:] = [] if "manifest.json" in files else sorted(name for name in below if not name.startswith("."))
        yield Path(folder)


def _not_begun(sweep_dir: Path) -> Iterator[Run]:
    """The jobs of a sweep that have no manifest yet; what no job of the sweep sets is the same in all of them."""
    path = sweep_dir / "sweep.json"
    if not path.exists():
        return
    with _expected_entries(path):
        jobs = {sweep_dir / job["folder"]: tuple(job["overrides"]) for job in _read_json(path)["jobs"]}
    begun = [folder for folder in jobs if (folder / "manifest.json").exists()]
    shared = _asked(begun[0]) if begun else {}
    for name in {override.lstrip("+").partition("=")[0] for overrides in jobs.values() for override in overrides}:
        for key in (name, *(CHOSEN_BY_METHOD if name == "method" else ())):
            shared.pop(key, None)
    for folder, overrides in jobs.items():
        if folder not in begun:
            yield Run(folder.name, folder, "not started", None, overrides, None, shared)


def _asked(run_dir: Path) -> dict[str, str]:
    """The choices, ratio and seed that Hydra composed for a run, so that one without results is still known."""
    found: dict[str, str] = {}
    for name, path in (("hydra", ("hydra", "runtime", "choices")), ("config", ())):
        file = run_dir / ".hydra" / f"{name}.yaml"
        if not file.exists():
            continue
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            for key in path:
                content = content[key]
        except (yaml.YAMLError, KeyError, TypeError):  # killed while it was written
            continue
        wanted = ("ratio", "seed") if name == "config" else (*SETTINGS, "experiment")
        found |= {key: str(content[key]) for key in wanted if content.get(key) is not None}
    return found


def _numeric_order(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise InputError(f"{path} is damaged: it holds no object.", change="Run again, or remove the directory.")
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
        experiment=raw.get("experiment"),
        experts_per_token=raw.get("experts_per_token"),
        evaluation=raw.get("evaluation"),
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
        speed=_entry(Speed, raw["speed"]) if raw.get("speed") else None,
    )


def _entry(kind: type[Entry], raw: dict[str, Any]) -> Entry:
    """The entries that ``kind`` names; those that a later version added are not read, those with a default may lack."""
    wanted = [field.name for field in fields(kind) if field.default is MISSING or field.name in raw]  # type: ignore[arg-type]
    return kind(**{name: raw[name] for name in wanted})
