"""The sweeper of ``moeprune-rerun``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RerunSweeper(Sweeper):
    """Launches these jobs of the sweep in ``hydra.sweep.dir`` again, in their folders, with their own overrides.

    ``_of_the_sweep``: what the sweep's experiment says to the sweeper that it had; its jobs' overrides say it all.
    """

    def __init__(self, jobs: Sequence[int], also: Sequence[str] = (), **_of_the_sweep: object) -> None:
        super().__init__()
        self.jobs, self.also = list(jobs), list(also)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra calls before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the jobs; ``arguments``, the values of the sweep's command, are in the jobs' own overrides.

        Raises the error of the first job that failed, as Hydra's own sweeper does.
        """
        assert self.config is not None
        assert self.launcher is not None
        from moeprune.app.rerun import begin_again, launch_overrides

        sweep_dir = Path(self.config.hydra.sweep.dir)
        batch = launch_overrides(sweep_dir, self.jobs, self.also)
        self.validate_batch_is_legal(batch)
        begin_again(sweep_dir, self.jobs)
        results = self.launcher.launch(batch, initial_job_idx=0)
        for result in results:
            _ = result.return_value
        return [results]
