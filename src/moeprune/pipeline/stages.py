"""The stages of the road. Each turns its inputs into files in a folder of the cache, under a key made of its settings
and its inputs' keys. Raise a stage's version when its result changes for the same settings."""

import json
from pathlib import Path

from transformers import PreTrainedModel

from moeprune.calibration.statistics import Statistics, collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.checkpoint import load_compressed, save_compressed
from moeprune.models.footprint import count_bytes, count_parameters
from moeprune.pipeline.cache import Artifact, StageCache
from moeprune.pipeline.experiment import Experiment, ModelTransform
from moeprune.surgery.prune import prune
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
        statistics = collect_statistics(experiment.model.load(), windows, experiment.calibration.batch_size)
        statistics.save(folder / "statistics.safetensors")

    return cache.get("statistics", 1, {"model": experiment.model}, [calibration.key], compute)


def score(cache: StageCache, experiment: Experiment, statistics: Artifact) -> Artifact:
    """Statistics -> scores."""

    def compute(folder: Path) -> None:
        scores = experiment.scorer(Statistics.load(statistics.folder / "statistics.safetensors"))
        scores.save(folder / "scores.safetensors")

    return cache.get("scores", 1, {"scorer": experiment.scorer}, [statistics.key], compute)


def allocate(cache: StageCache, experiment: Experiment, scores: Artifact) -> Artifact:
    """Scores and budget -> plan."""
    budget = experiment.budget()

    def compute(folder: Path) -> None:
        plan = experiment.allocator(Scores.load(scores.folder / "scores.safetensors"), budget)
        plan.save(folder / "plan.safetensors")

    return cache.get("plan", 1, {"allocator": experiment.allocator, "budget": budget}, [scores.key], compute)


def cut(cache: StageCache, experiment: Experiment, plan: Artifact) -> Artifact:
    """Plan -> pruned model."""

    def compute(folder: Path) -> None:
        model = prune(experiment.model.load(), Plan.load(plan.folder / "plan.safetensors"))
        _save_model(model, experiment, folder)

    return cache.get("pruned", 1, {"model": experiment.model, "dtype": experiment.model.dtype}, [plan.key], compute)


def transform(
    cache: StageCache, stage: str, experiment: Experiment, change: ModelTransform, model: Artifact
) -> Artifact:
    """Model -> recovered or quantised model."""

    def compute(folder: Path) -> None:
        _save_model(change(load_model(experiment, model)), experiment, folder)

    return cache.get(stage, 1, {stage: change, "dtype": experiment.model.dtype}, [model.key], compute)


def evaluate(cache: StageCache, experiment: Experiment, name: str, model: Artifact | None) -> Artifact:
    """Model -> metrics; without a model, of the dense one."""
    inputs = [model.key] if model else []
    settings = {"evaluation": experiment.evaluation, "model": None if model else experiment.model}

    def compute(folder: Path) -> None:
        loaded = load_model(experiment, model) if model else experiment.model.load()
        metrics = experiment.evaluation(loaded, experiment.model.tokenizer())
        metrics["parameters"] = vars(count_parameters(loaded))
        metrics["bytes"] = vars(count_bytes(model.folder if model else experiment.model.folder()))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))

    return cache.get(f"evaluation/{name}", 1, settings, inputs, compute)


def load_model(experiment: Experiment, model: Artifact) -> PreTrainedModel:
    """A compressed model of the cache on the experiment's device."""
    loaded = load_compressed(model.folder, experiment.model.computation_dtype)
    return loaded.to(experiment.model.placement)  # type: ignore[arg-type]


def _save_model(model: PreTrainedModel, experiment: Experiment, folder: Path) -> None:
    save_compressed(model, experiment.model.tokenizer(), folder, experiment.model.storage_dtype)
