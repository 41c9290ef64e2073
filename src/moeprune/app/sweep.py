"""After a sweep: one table of all its runs, whether they succeeded or not."""

import atexit
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Hydra callback: reports the sweep when the process ends.

    At exit and not at ``on_multirun_end``, because Hydra leaves that out when a job has failed.
    """

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        atexit.register(_report, Path(config.hydra.sweep.dir))


def _report(sweep_dir: Path) -> None:
    if not any(sweep_dir.glob("*/manifest.json")):
        return
    from moeprune.app.terminal import terminal
    from moeprune.report.summary import write_sweep_report

    write_sweep_report(sweep_dir, terminal())
