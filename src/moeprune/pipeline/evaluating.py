"""The last stage of the road, model -> metrics: each text and each task is kept by itself, so that another task or text
computes that one only. Throughput belongs to a machine and a moment, and is measured anew in every run."""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moeprune.evaluation.evaluate import Part
from moeprune.evaluation.speed import measure
from moeprune.models.footprint.measured import count_bytes, count_parameters
from moeprune.models.footprint.precision import precision_table
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.shape import weight_files
from moeprune.models.source import free_bytes
from moeprune.pipeline.cache import Artifact, StageCache
from moeprune.pipeline.experiment import Experiment
from moeprune.pipeline.identity import describe

log = logging.getLogger(__name__)

SIZE = "size"
RESULT, METRICS = "result.json", "metrics.json"
# Models that are timed side by side may fill so much of the free memory; the rest is for keys and values.
LARGEST_SHARE_OF_MEMORY = 0.7


@dataclass(frozen=True)
class _Evaluated:
    """The model that an artifact holds, or without one the dense model."""

    experiment: Experiment
    artifact: Artifact | None

    @property
    def folder(self) -> Path:
        return self.artifact.folder if self.artifact else self.experiment.model.folder()

    @cached_property
    def identity(self) -> Any:
        """What results depend on, where no key of an earlier stage says it; reads all files of a small checkpoint."""
        return describe(self.experiment.model) if self.artifact is None else None

    @cached_property
    def model(self) -> Model:
        """Loaded when it is asked for, and then no more."""
        return self.load()

    def load(self) -> Model:
        source = self.experiment.model
        return source.load() if self.artifact is None else source.load_compressed(self.artifact.folder)

    def size(self) -> dict[str, Any]:
        """Parameters and bytes, and which parts are in how many bits."""
        return {
            "parameters": vars(count_parameters(skeleton(self.model))),
            "bytes": vars(count_bytes(self.folder, self.model)),
            "precision": [vars(row) for row in precision_table(self.folder, skeleton(self.model))],
        }


def evaluate(
    cache: StageCache, experiment: Experiment, parts: Sequence[Part], name: str, model: Artifact | None
) -> Artifact:
    """Model -> metrics; without a model, of the dense one, which is loaded only if a part is missing.

    Seconds and memory of the artifact are those of all parts together.
    """
    stage = f"evaluation/{name.replace('+', '-')}"
    evaluated = _Evaluated(experiment, model)
    found: dict[str, Artifact] = {}
    for part in parts:
        compute = _writing(lambda part=part: part.compute(lambda: evaluated.model))  # type: ignore[misc]
        found[part.name] = _part(cache, stage, evaluated, part.name, part.settings, compute)
    found[SIZE] = _part(cache, stage, evaluated, SIZE, {}, _writing(evaluated.size))

    def combine(folder: Path) -> None:
        results = {part: json.loads((made.folder / RESULT).read_text()) for part, made in found.items()}
        size = results.pop(SIZE)
        (folder / METRICS).write_text(json.dumps({**experiment.evaluation.metrics(results), **size}, indent=1))

    keys = [made.key for made in found.values()]
    whole = cache.get(stage, 4, {"tasks": experiment.evaluation.task_choices}, keys, combine)
    return replace(
        whole,
        cached=whole.cached and all(made.cached for made in found.values()),
        seconds=whole.seconds + sum(made.seconds for made in found.values()),
        peak_memory_gib=max(made.peak_memory_gib for made in (whole, *found.values())),
    )


def measure_speeds(experiment: Experiment, models: Mapping[str, Artifact | None]) -> dict[str, dict[str, Any]]:
    """The throughput of each variant of the model, by its name; nothing where none is asked for."""
    speed = experiment.evaluation.speed
    if speed is None:
        return {}
    evaluated = {name: _Evaluated(experiment, model) for name, model in models.items()}
    stored = sum(file.stat().st_size for each in evaluated.values() for file in weight_files(each.folder))
    source = experiment.model
    needed = stored * max(1, source.computation_dtype.itemsize / source.storage_dtype.itemsize)
    together = needed < LARGEST_SHARE_OF_MEMORY * free_bytes(source.placement)
    log.info("speed of %s: %s", ", ".join(models), "taking turns" if together else "one after the other, for memory")
    loaders: dict[str, Any] = {name: each.load for name, each in evaluated.items()}
    return measure(speed, loaders, together)


def _part(
    cache: StageCache,
    stage: str,
    evaluated: _Evaluated,
    name: str,
    settings: Mapping[str, object],
    compute: Callable[[Path], None],
) -> Artifact:
    model = evaluated.artifact
    inputs = [model.key] if model else []
    content = {**settings, "model": evaluated.identity}
    kind, slash, own = name.partition("/")
    own = re.sub(r"[^A-Za-z0-9_-]", "_", own)  # a text may be named by any words
    return cache.get(f"{stage}/{kind}{slash}{own}", 1, content, inputs, compute)


def _writing(compute: Callable[[], Mapping[str, Any]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / RESULT).write_text(json.dumps(compute(), indent=1))

    return write
