"""What a run tells, as rows and summary entries of its W&B run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.app.tracking.names import variant_metrics
from moeprune.app.tracking.results import log_artifact, log_results
from moeprune.app.tracking.state import TrackedState
from moeprune.app.tracking.wandb_run import WandbRun

if TYPE_CHECKING:
    from moeprune.pipeline.cache import Artifact

NOW = "stages/now"
STEP = "recovery/step"
RECOVERED = "recovered"
MODELS = ("pruned", RECOVERED, "quantized")
# Below a recovery's folder, while it runs and when it has ended; see moeprune.recovery.recover.
LOSS_CURVES = (Path("walk/training/loss_curve.jsonl"), Path("loss_curve.jsonl"))


class Tracked:
    """A `moeprune.pipeline.progress.Progress` that tells W&B; every call returns at once. Before `start`, nobody.

    Where the road stands is in the summary as it goes, a variant's metrics are a row as soon as they are known, and the
    loss of a recovery is followed while it trains.
    """

    def __init__(self, artifacts: Sequence[str] = ()) -> None:
        self._run: WandbRun | None = None
        self._artifacts = artifacts
        self._found: dict[str, Artifact] = {}
        self._recovering: Path | None = None

    def start(self, init: Mapping[str, Any], state: TrackedState, run_dir: Path) -> None:
        """Open the W&B run; see `WandbRun`."""
        self._run = WandbRun(init, state, run_dir, self._follow)
        self._run.do(_start)

    @property
    def is_open(self) -> bool:
        """Whether anybody is told."""
        return self._run is not None

    def waiting(self, stage: str, _key: str, owner: str) -> None:
        self._summarise({NOW: f"{stage}: waits for {owner}"})

    def computing(self, stage: str, _key: str, folder: Path) -> None:
        self._summarise({NOW: stage})
        if stage == RECOVERED:
            self._recovering = folder

    def finished(self, artifact: "Artifact") -> None:
        self._found[artifact.stage] = artifact
        self._summarise({f"stages/{artifact.stage}/seconds": artifact.seconds, "stages/done": len(self._found)})
        if artifact.stage == RECOVERED:
            # Also what another run has trained: a curve belongs to each run that uses it.
            self._do(lambda run: log_curve(run, artifact.folder))
            self._recovering = None

    def evaluated(self, variant: str, metrics: Mapping[str, Any]) -> None:
        row = variant_metrics(variant, metrics)
        self._do(lambda run: run.log(row))

    def log_results(self, metrics: Mapping[str, Any]) -> None:
        """What ``metrics.json`` holds; plots of the run directory; artifacts of the stages."""
        found = dict(self._found)
        self._do(lambda run: _log_results(run, metrics, found, self._artifacts))

    def close(self, exit_code: int, timeout_s: float) -> None:
        """End the W&B run, with what is left to log; see `WandbRun.close`."""
        if exit_code == 0:
            self._summarise({NOW: "done"})
        if self._run is not None:
            self._run.close(exit_code, timeout_s)

    def _do(self, task: Any) -> None:
        if self._run is not None:
            self._run.do(task)

    def _summarise(self, entries: Mapping[str, Any]) -> None:
        self._do(lambda run: run.run.summary.update(dict(entries)))

    def _follow(self, run: WandbRun) -> None:
        folder = self._recovering
        if folder is not None:
            log_curve(run, folder)


def log_curve(run: WandbRun, folder: Path) -> None:
    """A row for each line of the loss curve in a recovery's ``folder`` that was not logged yet.

    A line that is only half written is left for the next time; steps that a resumed recovery takes again are not
    repeated.
    """
    for place in LOSS_CURVES:
        try:
            lines = (folder / place).read_text().split("\n")[:-1]
        except OSError:  # not there yet, or moved to its final place
            continue
        for point in map(json.loads, lines):
            if point["step"] > run.state.recovery_step:
                run.log(_curve_row(point), recovery_step=point["step"])
        return


def _curve_row(point: Mapping[str, Any]) -> dict[str, float]:
    rates = {f"recovery/learning_rate/{group}": rate for group, rate in point.get("learning_rate", {}).items()}
    values = {name: value for name, value in point.items() if name != "learning_rate" and value is not None}
    return {f"recovery/{name}": value for name, value in values.items()} | rates


def _start(run: WandbRun) -> None:
    run.run.define_metric(STEP)
    run.run.define_metric("recovery/*", step_metric=STEP)
    run.run.summary.update({"attempts": run.state.attempts})


def _log_results(
    run: WandbRun, metrics: Mapping[str, Any], found: Mapping[str, "Artifact"], artifacts: Sequence[str]
) -> None:
    log_results(run, metrics)
    last_model = next(stage for stage in reversed(list(found)) if stage in MODELS)
    sources = {
        "plan": ("plan", "plan.safetensors"),
        "scores": ("scores", "scores.safetensors"),
        "weights": (last_model, ""),
    }
    for kind in artifacts:
        stage, file = sources[kind]
        log_artifact(run, kind, found[stage].folder / file, {"stage": stage, "key": found[stage].key})
