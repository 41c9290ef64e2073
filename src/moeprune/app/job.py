"""One run: check the config, build plain objects, walk the road, leave the results in the run directory."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from moeprune.app.check import checked
from moeprune.app.manifest import manifest, write_atomically

log = logging.getLogger(__name__)

REPORTED_CHOICES = (
    "model", "method", "scorer", "allocator", "surgery", "quantizer", "recovery", "training_data", "calibration",
    "evaluation",
)  # fmt: skip


def run_job(config: DictConfig) -> None:
    """What Hydra calls for a run or for each job of a sweep."""
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    with manifest(run_dir, list(hydra.overrides.task)):
        settings = checked(config)
        write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(settings, resolve=True))
        choices = {name: hydra.runtime.choices.get(name) for name in REPORTED_CHOICES}
        _run(settings, choices, run_dir)
    # The jobs of a sweep leave the terminal to the sweep's own table.
    _write_report(run_dir, quiet=hydra.mode is RunMode.MULTIRUN)


def _run(config: DictConfig, choices: Mapping[str, str | None], run_dir: Path) -> None:
    # Everything heavy is imported here, after the config is known to be sound.
    from moeprune.app.build import build_experiment, build_optional
    from moeprune.app.provenance import provenance
    from moeprune.app.saved_model import check_destination, save_model
    from moeprune.app.terminal import quiet_libraries
    from moeprune.pipeline.cache import StageCache
    from moeprune.pipeline.run import run
    from moeprune.report.results import load_metrics

    quiet_libraries()
    if config.save_model is not None:
        check_destination(Path(config.save_model))
    write_atomically(run_dir / "provenance.json", json.dumps(provenance(config.seed), indent=1))
    tracker = build_optional("tracking", config.tracking)
    experiment = build_experiment(config)
    result = run(experiment, StageCache(Path(config.cache_dir)))

    for name, file in result.files.items():
        shutil.copyfile(file, run_dir / name)
    settings = {"ratio": experiment.ratio, "seed": config.seed, "order": list(experiment.order)}
    metrics = {**choices, **settings, **result.as_metrics()}
    write_atomically(run_dir / "metrics.json", json.dumps(metrics, indent=1))
    if config.save_model is not None:
        destination, dense = Path(config.save_model), experiment.model.folder()
        save_model(result.checkpoint, destination, load_metrics(run_dir), _plain(config), dense)
        log.info("model in %s", destination)
    if tracker is not None:
        tracker.log_run(_plain(config), metrics, run_dir)
    log.info("results in %s", run_dir)


def _write_report(run_dir: Path, quiet: bool) -> None:
    """Write the run's tables into its directory and, unless ``quiet``, print them."""
    from moeprune.app.terminal import terminal
    from moeprune.report.summary import write_run_report

    write_run_report(run_dir, terminal(quiet))


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
