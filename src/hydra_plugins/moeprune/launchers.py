"""The launchers of ``conf/hydra/launcher``. Hydra imports this module at every start, so it imports little."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import DictConfig

from moeprune.app.launching.site import register_site_resolver

register_site_resolver()


class BasicLauncher(Launcher):
    """Runs one job after the other in this process."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from moeprune.app.launching.compose import Sweep

        self._sweep = Sweep(config, hydra_context, task_function)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from moeprune.app.launching.basic import launch_here

        return launch_here(self._sweep, job_overrides, initial_job_idx)


class DryRunLauncher(Launcher):
    """Runs nothing: composes and checks every job, and shows what it would take."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from moeprune.app.launching.compose import Sweep
        from moeprune.app.launching.dry_run import require_grid

        self._sweep = Sweep(config, hydra_context, task_function)
        require_grid(self._sweep)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from moeprune.app.launching.dry_run import dry_run

        return dry_run(self._sweep, job_overrides, initial_job_idx)


class LocalLauncher(submitit_launcher.LocalLauncher):
    """Runs a few jobs at once on this machine."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from moeprune.app.launching.compose import Sweep
        from moeprune.app.launching.local import LocalSettings

        self._sweep = Sweep(config, hydra_context, task_function)
        self._settings = LocalSettings.of(self.params)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from moeprune.app.launching.local import launch_on_this_machine

        return launch_on_this_machine(self._sweep, self._settings, job_overrides, initial_job_idx)


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """Submits the jobs to SLURM as an array and waits for all of them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from moeprune.app.launching.compose import Sweep
        from moeprune.app.launching.slurm import SlurmSettings, require_slurm

        require_slurm()
        self._sweep = Sweep(config, hydra_context, task_function)
        self._settings = SlurmSettings.of(self.params, self._sweep.launcher)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from moeprune.app.launching.slurm import launch_on_slurm

        return launch_on_slurm(self._sweep, self._settings, job_overrides, initial_job_idx)
