"""The sweeper of ``hydra/sweeper=optuna``. Hydra imports this module at every start, so it imports little."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Launches trials that Optuna chooses, in batches of ``parallel``; see `moeprune.app.search`."""

    def __init__(
        self,
        trials: int,
        parallel: int,
        direction: str,
        sampler: str,
        seed: int,
        params: Mapping[str, Any],
        grids: object = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "trials": trials, "parallel": parallel, "direction": direction, "sampler": sampler, "seed": seed,
        }  # fmt: skip
        self.params = dict(params)
        self.has_grids = grids is not None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra calls before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Search, with the settings and the search space of the command line and of ``params``.

        Raises the error of the first trial that failed, after all others have run.
        """
        assert self.config is not None and self.launcher is not None
        from moeprune.app.search import Search, Space
        from moeprune.errors import InputError

        asked = [word for word in arguments if word.startswith("until=") and word != "until=null"]
        if asked:
            raise InputError(
                f"{asked[0]} leaves a search nothing to compare: only a whole run has an objective.",
                change="Leave until out.",
            )
        if self.has_grids:
            raise InputError(
                "This experiment has several grids (hydra.sweeper.grids); a search has one space.",
                change="Leave the experiment out and give its settings, or add hydra.sweeper.grids=null.",
            )
        sweep_dir = Path(self.config.hydra.sweep.dir)
        space = Space.of([*(f"{name}={value}" for name, value in self.params.items()), *arguments])
        search = Search(**self.settings, sweep_dir=sweep_dir, space=space)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, sweep_dir / "multirun.yaml")
        return search.run(self._launch)

    def _launch(self, batch: list[list[str]], first: int) -> Any:
        assert self.launcher is not None
        self.validate_batch_is_legal(batch)
        return self.launcher.launch(batch, initial_job_idx=first)
