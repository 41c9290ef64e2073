"""The whole road, on one screen."""

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.calibration.report import log_warnings
from moeprune.pipeline import stages
from moeprune.pipeline.cache import Artifact, StageCache
from moeprune.pipeline.evaluating import METRICS, evaluate, measure_speeds
from moeprune.pipeline.experiment import Experiment
from moeprune.pipeline.order import RECOVER
from moeprune.pipeline.until import STAGE_OF
from moeprune.recovery.recover import DETAILS, LOSS_CURVE
from moeprune.types import Plan

# What a recovery says of itself: tokens, steps, seconds; and the losses, step by step.
RECOVERY_FILES = (DETAILS, LOSS_CURVE)


@dataclass(frozen=True)
class Result:
    """What a run found: the plan, the metrics of each variant of the model in order, and the stages it walked.

    ``files`` are worth keeping with the results, by the name they go by; ``checkpoint`` is the final model's folder.
    """

    plan: Plan
    files: dict[str, Path]
    checkpoint: Path
    variants: dict[str, dict[str, Any]]
    stages: list[Artifact]

    def as_metrics(self) -> dict[str, Any]:
        """Plain values for ``metrics.json``."""
        plan = self.plan
        return {
            "plan": {
                "removed_channels": plan.total_channels - plan.kept_channels,
                "total_channels": plan.total_channels,
                "removed_ratio": plan.removed_ratio,
                "live_experts": (plan.widths_LE > 0).sum(dim=1).tolist(),
                "widths": plan.widths_LE.tolist(),
                "note": plan.note,
            },
            "variants": [{"name": name, **metrics} for name, metrics in self.variants.items()],
            **({"recovery_details": json.loads(self.files[DETAILS].read_text())} if DETAILS in self.files else {}),
            "stages": [
                {
                    "stage": artifact.stage,
                    "key": artifact.key,
                    "cached": artifact.cached,
                    "seconds": artifact.seconds,
                    "peak_memory_gib": artifact.peak_memory_gib,
                }
                for artifact in self.stages
            ],
        }


def run(experiment: Experiment, cache: StageCache) -> Result:
    """Walk the road; every stage that any run finished before is reused."""
    road = _road(experiment, cache)
    try:
        while True:
            next(road)
    except StopIteration as end:
        result: Result = end.value
        return result


def run_until(experiment: Experiment, cache: StageCache, until: str) -> list[Artifact]:
    """Walk the road up to the stage that ``until`` asks for (see `until.STAGE_OF`), so that later runs find it."""
    walked = []
    for artifact in _road(experiment, cache):
        walked.append(artifact)
        if artifact.stage == STAGE_OF[until]:
            break
    return walked


def _road(experiment: Experiment, cache: StageCache) -> Generator[Artifact, None, Result]:
    """Stage after stage, each yielded when it has its result."""
    parts = experiment.check()
    yield (calibration := stages.sample_calibration(cache, experiment))
    yield (statistics := stages.gather_statistics(cache, experiment, calibration))
    report = stages.report_calibration(cache, experiment, calibration, statistics)
    log_warnings(json.loads((report.folder / "calibration.json").read_text()))
    passes = [stages.run_pass(cache, experiment, calibration, wanted) for wanted in experiment.passes]
    yield (scores := stages.score(cache, experiment, statistics, passes))
    yield (plan := stages.allocate(cache, experiment, scores))
    diagnostics = stages.diagnose(cache, experiment, statistics, scores, plan)
    yield (pruned := stages.cut(cache, experiment, calibration, statistics, plan))
    walked = [calibration, statistics, report, *passes, scores, plan, diagnostics, pruned]

    models: dict[str, Artifact | None] = {"dense": None, "pruned": pruned}
    name, latest, recovered = "pruned", pruned, None
    for stage, plug_in in experiment.after_pruning:
        if stage == RECOVER:
            latest = recovered = stages.recover(cache, experiment, plug_in, latest)
        else:
            latest = stages.quantize(cache, experiment, plug_in, calibration, latest)
        yield latest
        name = f"{name}+{getattr(plug_in, 'name', latest.stage)}"
        models[name] = latest
        walked.append(latest)

    speeds = measure_speeds(experiment, models)
    metrics = {}
    for name, model in models.items():
        evaluation = evaluate(cache, experiment, parts, name, model)
        metrics[name] = json.loads((evaluation.folder / METRICS).read_text()) | speeds.get(name, {})
        cache.progress.evaluated(name, metrics[name])
        walked.append(evaluation)
    kept = [(plan, "plan.safetensors"), (diagnostics, "diagnostics.json"), (report, "calibration.json")]
    if recovered is not None:
        kept += [(recovered, file) for file in RECOVERY_FILES if (recovered.folder / file).exists()]
    files = {name: artifact.folder / name for artifact, name in kept}
    return Result(Plan.load(files["plan.safetensors"]), files, latest.folder, metrics, walked)
