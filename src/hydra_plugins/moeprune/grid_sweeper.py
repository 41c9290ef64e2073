"""The sweeper of ``hydra/sweeper=basic``. Hydra imports this module at every start, so it imports little."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf


@dataclass
class GridSweeperConfig:
    """What ``conf/hydra/sweeper/basic.yaml`` may hold. Hydra checks that file by its own schema of the name ``basic``,
    which knows no grids."""

    _target_: str = "hydra_plugins.moeprune.grid_sweeper.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None
    grids: Any = None


ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=GridSweeperConfig, provider="moeprune")


class GridSweeper(BasicSweeper):
    """One grid, or the union of several: see `moeprune.app.grids`.

    Each job is composed once: our launchers compose all of them before they start any. Hydra's sweeper composes them to
    see that it can, throws that away, and composes them again: 0.2 seconds a job.
    """

    def __init__(self, max_batch_size: int | None, params: Any = None, grids: Any = None) -> None:
        super().__init__(max_batch_size, params)
        self.grids = grids

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Launch the jobs in batches of ``max_batch_size``. Raises the error of the first job that failed."""
        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        # Hydra loads each module of plug-ins anew when it scans them: one that is imported above has other classes.
        from hydra_plugins.moeprune.launchers import DryRunLauncher
        from moeprune.app.grids import jobs_of_grids

        jobs = jobs_of_grids(self.params, self.grids, arguments, self.hydra_context.config_loader)
        if not isinstance(self.launcher, DryRunLauncher):  # which leaves nothing behind
            sweep_dir = Path(str(self.config.hydra.sweep.dir))
            sweep_dir.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, sweep_dir / "multirun.yaml")
        launched, returns = 0, []
        for batch in self.split_overrides_to_chunks(jobs, self.max_batch_size):
            self.validate_batch_is_legal(batch)
            results = self.launcher.launch(batch, initial_job_idx=launched)
            for result in results:
                _ = result.return_value
            launched += len(batch)
            returns.append(results)
        return returns

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose the jobs to see that it can be done, where the launcher does not do so itself."""
        from hydra_plugins.moeprune.launchers import BasicLauncher, DryRunLauncher, LocalLauncher, SlurmLauncher

        if not isinstance(self.launcher, (BasicLauncher, DryRunLauncher, LocalLauncher, SlurmLauncher)):
            super().validate_batch_is_legal(batch)
