"""The commands ``moeprune`` and ``moeprune-train``. Nothing heavy is imported before the config is sound."""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

import moeprune
from moeprune.app.explain import explained
from moeprune.errors import MoepruneError

USER_ERROR = 2
INTERRUPTED = 130


def main() -> None:
    """Run one experiment, or with ``--multirun`` a sweep."""
    _run_command(_experiment_job, "config")


def train() -> None:
    """Train an embedded model by its recipe."""
    _run_command(_training_job, "train")


def footprint() -> None:
    """Predict what pruned and quantised models take, without their weights."""
    from moeprune.app.footprint import run_footprint

    _guarded(lambda: run_footprint(sys.argv[1:], config_folder()), "footprint")


def export() -> None:
    """Write a pruned checkpoint in a format that stock engines run."""
    _run_command(_export_job, "export")


def status() -> None:
    """Show how a sweep stands."""
    from moeprune.app.status import run_status

    _guarded(lambda: sys.exit(run_status(sys.argv[1:])), "config")


def rerun() -> None:
    """Run the jobs of a sweep again that did not succeed."""
    from moeprune.app.rerun import moeprune_command

    def again() -> None:
        words = moeprune_command(sys.argv[1:])
        if words is not None:
            sys.argv = ["moeprune", *words]
            main()

    _guarded(again, "config")


def report() -> None:
    """Write the tables and plots of a run or a sweep again."""
    from moeprune.app.report_command import run_report

    _guarded(lambda: sys.exit(run_report(sys.argv[1:])), "config")


def cache() -> None:
    """List, check and prune the stage cache."""
    from moeprune.app.cache_command import run_cache_command

    _guarded(lambda: sys.exit(run_cache_command(sys.argv[1:])), "config")


def config_folder() -> Path:
    """``conf/``: inside an installed wheel, or at the top of the source tree."""
    package = Path(moeprune.__file__).parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parents[1] / "conf"


# submitit pickles this function by value: it stays trivial.
def _experiment_job(config: DictConfig) -> float | None:
    from moeprune.app.job import run_job

    return run_job(config)


def _training_job(config: DictConfig) -> None:
    from moeprune.app.training import run_training

    run_training(config)


def _export_job(config: DictConfig) -> None:
    from moeprune.app.export import run_export

    run_export(config)


def _run_command(job: Callable[[DictConfig], float | None], config_name: str) -> None:
    # Hydra would print its own errors and hide ours; with this it raises them, and they are explained below.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # Threads that spin while they wait slow each other down many times over on a CPU that is shared with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a log file gets a line per stage instead of progress bars
    decorate: Any = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
    _guarded(decorate(job), config_name)


def _guarded(command: Callable[[], None], config_name: str) -> None:
    """Run ``command``; what the user can mend ends it with one message and an exit code."""
    # A cluster or `timeout` ends a job with SIGTERM: the manifest is to say so, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Hydra has a launcher and a sweeper of this name too; ours take their places, in this program only.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/\w+/basic' is validated against ConfigStore schema")
    try:
        command()
    except KeyboardInterrupt as interrupt:
        usual = "Interrupted. Finished stages are kept; the same command goes on from them."
        _stop(str(interrupt) or usual, INTERRUPTED)
    except Exception as error:
        if not isinstance(error, MoepruneError):
            explanation = explained(error, config_folder(), config_name, sys.argv[1:])
            if explanation is None:
                raise
            error = explanation
        _stop(f"moeprune: {error}", USER_ERROR)


def _stop(message: str, exit_code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(exit_code)
