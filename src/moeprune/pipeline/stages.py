"""The stages of the road. Each turns its inputs into files in a folder of the cache, under a key made of its settings
and its inputs' keys. Raise a stage's version when its result changes for the same settings."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moeprune.allocation.optimal_coverage import OptimalCoverageAllocator
from moeprune.calibration.passes import CalibrationPass
from moeprune.calibration.report import calibration_report, shared_ngrams
from moeprune.calibration.statistics import Statistics, StoredStatistics, collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.compressed.reader import load_compressed
from moeprune.models.compressed.writer import CheckpointWriter, save_compressed
from moeprune.models.layers.streaming import Model, StreamedModel, skeleton
from moeprune.models.layers.workspace import Workspace
from moeprune.models.source import ModelSource
from moeprune.pipeline.cache import WALK, Artifact, StageCache
from moeprune.pipeline.diagnostics import DEFAULT_OBJECTIVE, diagnostics
from moeprune.pipeline.experiment import Experiment, Quantizer, Recovery
from moeprune.scoring.weights import with_expert_weights
from moeprune.surgery.prune import FinishedLayer
from moeprune.types import Plan, Scores


def sample_calibration(cache: StageCache, experiment: Experiment) -> Artifact:
    """Calibration text -> token windows."""
    settings = {"calibration": experiment.calibration, "model": experiment.model}

    def compute(folder: Path) -> None:
        experiment.calibration.sample(experiment.model.tokenizer()).save(folder / "windows.safetensors")

    return cache.get("calibration", 1, settings, [], compute)


def gather_statistics(cache: StageCache, experiment: Experiment, calibration: Artifact) -> Artifact:
    """Token windows -> statistics about routed tokens; one forward pass, whatever the scorer."""

    def compute(folder: Path) -> None:
        windows = TokenWindows.load(calibration.folder / "windows.safetensors")
        model = experiment.model.load()
        workspace = _workspace(experiment, model, folder)
        statistics = collect_statistics(model, windows, experiment.calibration.batch_size, workspace)
        statistics.save(folder / "statistics.safetensors")

    return cache.get("statistics", 3, {"model": experiment.model}, [calibration.key], compute, resumable=True)


def report_calibration(
    cache: StageCache, experiment: Experiment, calibration: Artifact, statistics: Artifact
) -> Artifact:
    """Statistics, calibration and evaluation text -> tokens per expert, and the overlap of the two texts."""
    evaluation = experiment.evaluation
    settings = {
        "fewest_tokens": experiment.fewest_tokens,
        "source": evaluation.source,
        "windows": [evaluation.windows, evaluation.sequence_length],
    }

    def compute(folder: Path) -> None:
        windows = TokenWindows.load(calibration.folder / "windows.safetensors")
        evaluated = evaluation.token_windows(experiment.model.tokenizer())
        report = calibration_report(_load_statistics(statistics), experiment.fewest_tokens)
        report["shared_ngrams"] = {name: shared_ngrams(windows, each) for name, each in evaluated.items()}
        (folder / "calibration.json").write_text(json.dumps(report, indent=1))

    return cache.get("calibration_report", 1, settings, [statistics.key], compute)


def run_pass(cache: StageCache, experiment: Experiment, calibration: Artifact, wanted: CalibrationPass) -> Artifact:
    """Token windows -> what a scorer needs beyond the statistics."""

    def compute(folder: Path) -> None:
        windows = TokenWindows.load(calibration.folder / "windows.safetensors")
        model = experiment.model.load()
        result = wanted(model, windows, experiment.calibration.batch_size, _workspace(experiment, model, folder))
        result.save(folder / "result.safetensors")

    settings = {"model": experiment.model, "pass": wanted}
    return cache.get(f"pass/{wanted.stage}", wanted.version, settings, [calibration.key], compute)


def score(cache: StageCache, experiment: Experiment, statistics: Artifact, passes: Sequence[Artifact]) -> Artifact:
    """Statistics and the results of the scorer's own passes -> scores."""

    def compute(folder: Path) -> None:
        gathered = _load_statistics(statistics)
        results = [
            wanted.load(made.folder / "result.safetensors")
            for wanted, made in zip(experiment.passes, passes, strict=True)
        ]
        scores = with_expert_weights(experiment.scorer(gathered, *results), gathered)
        scores.save(folder / "scores.safetensors")

    inputs = [statistics.key, *(made.key for made in passes)]
    return cache.get("scores", 2, {"scorer": experiment.scorer}, inputs, compute)


def allocate(cache: StageCache, experiment: Experiment, scores: Artifact) -> Artifact:
    """Scores and budget -> plan."""
    budget = experiment.budget()

    def compute(folder: Path) -> None:
        plan = experiment.allocator(Scores.load(scores.folder / "scores.safetensors"), budget)
        plan.save(folder / "plan.safetensors")

    return cache.get("plan", 2, {"allocator": experiment.allocator, "budget": budget}, [scores.key], compute)


def diagnose(
    cache: StageCache, experiment: Experiment, statistics: Artifact, scores: Artifact, plan: Artifact
) -> Artifact:
    """Statistics, scores and plan -> concentration, router entropy, widths, coverage against its optimum."""
    budget, allocator = experiment.budget(), experiment.allocator
    objective = allocator if isinstance(allocator, OptimalCoverageAllocator) else DEFAULT_OBJECTIVE

    def compute(folder: Path) -> None:
        loaded = Scores.load(scores.folder / "scores.safetensors"), Plan.load(plan.folder / "plan.safetensors")
        found = diagnostics(_load_statistics(statistics), *loaded, budget, objective)
        (folder / "diagnostics.json").write_text(json.dumps(found, indent=1))

    return cache.get("diagnostics", 2, {"budget": budget}, [plan.key], compute)


def cut(
    cache: StageCache, experiment: Experiment, calibration: Artifact, statistics: Artifact, plan: Artifact
) -> Artifact:
    """Plan -> pruned model; a surgery that compensates also reads the statistics or the calibration windows."""

    def compute(folder: Path) -> None:
        model = experiment.model.load()
        layers = experiment.surgery(
            model,
            Plan.load(plan.folder / "plan.safetensors"),
            _load_statistics(statistics),
            TokenWindows.load(calibration.folder / "windows.safetensors"),
            experiment.calibration.batch_size,
            _workspace(experiment, model, folder),
        )
        _write_layers(experiment, model, layers, folder)

    settings = {"model": experiment.model, "dtype": experiment.model.dtype, "surgery": experiment.surgery}
    return cache.get("pruned", 3, settings, [plan.key], compute, resumable=True)


def recover(cache: StageCache, experiment: Experiment, recovery: Recovery, model: Artifact) -> Artifact:
    """Model -> model with some of its accuracy back; the whole model is in memory. Goes on where it was interrupted."""

    def compute(folder: Path) -> None:
        tokenizer = experiment.model.tokenizer()
        load = partial(_in_memory, experiment.model, model.folder)
        recovered = recovery(load, experiment.model.load, tokenizer, folder)
        save_compressed(recovered, tokenizer, folder, experiment.model.storage_dtype)

    settings = {"recovered": recovery, "model": experiment.model, "dtype": experiment.model.dtype}
    return cache.get("recovered", 3, settings, [model.key], compute, resumable=True)


def quantize(
    cache: StageCache, experiment: Experiment, quantizer: Quantizer, calibration: Artifact, model: Artifact
) -> Artifact:
    """Model -> model of fewer bits; some quantizers look at the calibration windows."""
    calibrated = getattr(quantizer, "needs_calibration", False)
    inputs = [model.key, calibration.key] if calibrated else [model.key]

    def compute(folder: Path) -> None:
        windows = TokenWindows.load(calibration.folder / "windows.safetensors") if calibrated else None
        loaded = experiment.model.load_compressed(model.folder)
        workspace = _workspace(experiment, loaded, folder)
        layers = quantizer(loaded, windows, experiment.calibration.batch_size, workspace)
        _write_layers(experiment, loaded, layers, folder)

    settings = {"quantized": quantizer, "dtype": experiment.model.dtype}
    return cache.get("quantized", 3, settings, inputs, compute, resumable=True)


def _in_memory(source: ModelSource, folder: Path) -> PreTrainedModel:
    """A compressed model, whole, where it computes; a function of this module, so that other processes can call it."""
    model: Any = load_compressed(folder, source.computation_dtype)
    return model.to(source.placement)


def _load_statistics(statistics: Artifact) -> Statistics:
    return StoredStatistics(statistics.folder / "statistics.safetensors")


def _workspace(experiment: Experiment, model: Model, folder: Path) -> Workspace:
    """Where a walk over a streamed model keeps its state; one in memory is walked in memory."""
    if not isinstance(model, StreamedModel):
        return Workspace()
    return Workspace(folder / WALK, experiment.model.activations_gib)


def _write_layers(experiment: Experiment, model: Model, layers: Iterable[FinishedLayer], folder: Path) -> None:
    """Write each layer as soon as it is final, then the rest of the model."""
    writer = CheckpointWriter(folder, experiment.model.storage_dtype)
    for depth, name, layer in layers:
        writer.add_layer(depth, name, layer)
    writer.finish(skeleton(model), experiment.model.tokenizer())
