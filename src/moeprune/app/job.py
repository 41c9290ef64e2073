"""One run: check the config, build plain objects, walk the road, leave the results in the run directory."""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moeprune.app.check import checked
from moeprune.app.manifest import manifest, write_atomically
from moeprune.errors import InputError

if TYPE_CHECKING:
    from moeprune.app.tracking.tracked import Tracked
    from moeprune.pipeline.progress import Progress

log = logging.getLogger(__name__)

REPORTED_CHOICES = (
    "experiment", "model", "method", "scorer", "allocator", "surgery", "quantizer", "recovery", "training_data",
    "calibration", "evaluation",
)  # fmt: skip


def run_job(config: DictConfig) -> float | None:
    """What Hydra calls for a run or for each job of a sweep; returns the objective of a search."""
    hydra = HydraConfig.get()
    run_dir, in_sweep = Path(hydra.runtime.output_dir), hydra.mode is RunMode.MULTIRUN
    if not in_sweep and (launcher := hydra.runtime.choices["hydra/launcher"]) != "basic":
        raise InputError(f"hydra/launcher={launcher} starts the jobs of a sweep.", change="Add --multirun.")
    if not in_sweep:
        _require_whole(hydra)
    choices = {name: hydra.runtime.choices.get(name) for name in REPORTED_CHOICES}
    sweep = "-".join(Path(hydra.sweep.dir).resolve().parts[-2:]) if in_sweep else None
    with ExitStack() as tracking:
        with manifest(run_dir, list(hydra.overrides.task)) as progress:
            settings = checked(config)
            progress.runs_until(settings.until)
            write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(settings, resolve=True))
            tracked = _tracked(tracking, settings, choices, run_dir, sweep)
            metrics = _run(settings, choices, run_dir, [progress, tracked])
            found = _objective(metrics, settings)
        if metrics is not None:
            # The jobs of a sweep leave the terminal to the sweep's own table, and the plots to who wants them.
            _write_report(run_dir, quiet=in_sweep, with_plots=tracked.is_open or not in_sweep)
            tracked.log_results(metrics)
    return found


def _require_whole(hydra: Any) -> None:
    """Raise InputError for a single run of an experiment that is a sweep: it would lack what the jobs set."""
    sweeper = hydra.sweeper
    swept = {str(key) for part in (sweeper.get("params"), *(sweeper.get("grids") or ())) for key in part or ()}
    given = {word.lstrip("+").partition("=")[0] for word in hydra.overrides.task}
    if unset := sorted(swept - given):
        experiment = hydra.runtime.choices.get("experiment")
        raise InputError(
            f"{f'experiment={experiment}' if experiment else 'This'} is a sweep over {', '.join(sorted(swept))}.",
            change=f"Add --multirun, or for a single run of it also give {', '.join(unset)}.",
        )


def _tracked(
    tracking: ExitStack, config: DictConfig, choices: Mapping[str, str | None], run_dir: Path, sweep: str | None
) -> "Tracked":
    """The tracker's view of this run, until ``tracking`` is closed."""
    from moeprune.app.build import build_optional
    from moeprune.app.tracking import NoTracker

    tracker = build_optional("tracking", config.tracking) or NoTracker()
    opened: Tracked = tracking.enter_context(tracker.open(_plain(config), run_dir, choices, sweep))
    return opened


def _run(
    config: DictConfig, choices: Mapping[str, str | None], run_dir: Path, listeners: "list[Progress]"
) -> dict[str, Any] | None:
    """Walk the road and leave what it found in ``run_dir``; returns the metrics, None where the run stops early."""
    # Everything heavy is imported here, after the config is known to be sound.
    from moeprune.app.build import build_experiment
    from moeprune.app.provenance import provenance
    from moeprune.app.saved_model import check_destination, save_model
    from moeprune.app.terminal import quiet_libraries
    from moeprune.pipeline.cache import StageCache
    from moeprune.pipeline.progress import Broadcast
    from moeprune.pipeline.run import run, run_until
    from moeprune.report.runs.results import load_metrics

    quiet_libraries()
    if config.save_model is not None:
        check_destination(Path(config.save_model))
    write_atomically(run_dir / "provenance.json", json.dumps(provenance(config.seed), indent=1))
    experiment = build_experiment(config)
    made_by = {"run": str(run_dir), "model": str(config.model.name)}
    cache = StageCache(Path(config.cache_dir), Broadcast(listeners), made_by)
    if config.until is not None:
        walked = run_until(experiment, cache, config.until)
        log.info("stopped after %s, as until=%s asks; it is in %s", walked[-1].stage, config.until, walked[-1].folder)
        return None
    result = run(experiment, cache)

    for name, file in result.files.items():
        shutil.copyfile(file, run_dir / name)
    settings = {
        "ratio": experiment.ratio,
        "seed": config.seed,
        "order": list(experiment.order),
        "experts_per_token": config.model.experts_per_token,
    }
    metrics = {**choices, **settings, **result.as_metrics()}
    write_atomically(run_dir / "metrics.json", json.dumps(metrics, indent=1))
    if config.save_model is not None:
        destination, dense = Path(config.save_model), experiment.model.folder()
        save_model(result.checkpoint, destination, load_metrics(run_dir), _plain(config), dense)
        log.info("model in %s", destination)
    log.info("results in %s", run_dir)
    return metrics


def _objective(metrics: Mapping[str, Any] | None, config: DictConfig) -> float | None:
    from moeprune.app.objective import objective_of

    return None if metrics is None else objective_of(metrics, config.objective)


def _write_report(run_dir: Path, quiet: bool, with_plots: bool) -> None:
    """Write the run's tables and plots into its directory and, unless ``quiet``, print them."""
    from moeprune.app.terminal import terminal
    from moeprune.report.summary import write_run_report

    write_run_report(run_dir, terminal(quiet), with_plots)


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
