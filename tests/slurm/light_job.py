"""Jobs without a model, through the launchers, manifest and stage cache of real runs.

    python light_job.py --multirun +do=fail,share-1,share-2 +at=DIR
    python light_job.py rerun SWEEP_DIR

``do`` names a function below, and what comes after a hyphen tells jobs of one kind apart; ``at`` is a folder in which
jobs and the test leave each other notes.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

if TYPE_CHECKING:
    from moeprune.pipeline.cache import StageCache

Work = Callable[["StageCache", Path], None]
PATIENCE_SECONDS = 300.0


# submitit pickles this function by value: it stays trivial.
def _job(config: DictConfig) -> None:
    from light_job import run_light_job

    run_light_job(config)


def run_light_job(config: DictConfig) -> None:
    from moeprune.app.manifest import manifest
    from moeprune.pipeline.cache import StageCache

    hydra_config = HydraConfig.get()
    run_dir, notes = Path(hydra_config.runtime.output_dir), Path(config["at"])
    with manifest(run_dir, list(hydra_config.overrides.task)) as progress:
        work: Work = globals()[config["do"].partition("-")[0]]
        work(StageCache(Path(config["cache_dir"]), progress), notes)


def fail(_cache: object, notes: Path) -> None:
    if not (notes / "mended").exists():
        raise ValueError("as it was asked to")


def be_killed(_cache: object, notes: Path) -> None:
    if not (notes / "mended").exists():
        os.kill(os.getpid(), signal.SIGKILL)


def again(_cache: object, _notes: Path) -> None:
    """A first start waits for what ends it; a later one has nothing to do."""
    if not int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        time.sleep(PATIENCE_SECONDS)
        raise TimeoutError("nothing has ended this job")


def share(cache: "StageCache", notes: Path) -> None:
    """All who share a stage have it from one."""

    def compute(folder: Path) -> None:
        _note(notes, "computed-share")
        time.sleep(2)
        (folder / "result.txt").write_text("shared")

    assert (cache.get("share", 1, {}, [], compute).folder / "result.txt").read_text() == "shared"


def lead(cache: "StageCache", notes: Path) -> None:
    """Whoever computes first never ends by himself; who comes after him does."""

    def compute(folder: Path) -> None:
        if _note(notes, "computed-lead") == 1:
            time.sleep(PATIENCE_SECONDS)
        (folder / "result.txt").write_text("led")

    cache.get("lead", 1, {}, [], compute)


def fill_disk(_cache: object, notes: Path) -> None:
    """A stage larger than the file system that the cache is on."""
    from moeprune.pipeline.cache import StageCache

    StageCache(notes / "small").get("large", 1, {}, [], lambda folder: _write_megabytes(folder / "large.bin", 4))


def missing_from_read_only(_cache: object, notes: Path) -> None:
    _from_read_only(notes, "missing")


def stored_in_read_only(_cache: object, notes: Path) -> None:
    _from_read_only(notes, "stored")


def _from_read_only(notes: Path, stage: str) -> None:
    from moeprune.pipeline.cache import StageCache

    def compute(_folder: Path) -> None:
        _note(notes, f"computed-{stage}")

    StageCache(notes / "read_only").get(stage, 1, {}, [], compute)


def _write_megabytes(file: Path, count: int) -> None:
    with file.open("wb") as opened:
        for _ in range(count):
            opened.write(bytes(2**20))


def _note(notes: Path, name: str) -> int:
    """Append this process to a note; how many stand there now."""
    with (notes / name).open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len((notes / name).read_text().splitlines())


def main() -> None:
    from moeprune.app.main import config_folder
    from moeprune.app.rerun import moeprune_command

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if sys.argv[1] == "rerun":
        sys.argv[1:] = moeprune_command(sys.argv[2:]) or sys.exit("nothing to run again")
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="config")(_job)()


if __name__ == "__main__":
    main()
