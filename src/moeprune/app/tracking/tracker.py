"""Weights & Biases: what a run tells while it walks the road, and what it found. A run never fails because of it."""

import logging
import netrc
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moeprune.app.tracking.shown import shown
from moeprune.app.tracking.state import TrackedState
from moeprune.app.tracking.tracked import Tracked
from moeprune.errors import InputError, require_choice

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
ARTIFACTS = ("plan", "scores", "weights")
TAGGED = ("model", "method", "scorer", "allocator", "surgery", "recovery", "quantizer")
LONGEST_TAG = 64
# W&B looks around by itself; what it may tell of the machine is the load of processor, memory and GPU.
PRIVATE = {
    "silent": True, "console": "off", "host": "hidden", "disable_git": True, "disable_code": True, "save_code": False,
    "disable_job_creation": True, "x_disable_meta": True, "x_save_requirements": False, "x_stats_disk_paths": (),
}  # fmt: skip
INIT_TIMEOUT_S = 60.0
LEAVING_S = 20.0  # a job that is stopped has little time: SLURM gives 30 seconds by default
FLUSH_SECONDS = 2.0  # what a job that is killed outright may lose of its offline run


class NoTracker:
    """What ``tracking=none`` stands for."""

    @contextmanager
    def open(
        self, _config: Mapping[str, Any], _run_dir: Path, _choices: Mapping[str, str | None], _sweep: str | None = None
    ) -> Iterator[Tracked]:
        """Tells nobody."""
        yield Tracked()


@dataclass(frozen=True)
class WandbTracker:
    """Settings of the W&B run of each job.

    ``mode``: auto (online when a key for W&B is set up, else offline; WANDB_MODE goes before both), online, offline or
    disabled. ``group`` is the sweep's name by default, ``job_type`` is prune, or until-STAGE where the run stops early.
    ``log_artifacts``: any of plan, scores and weights. At the end an online run waits ``finish_timeout_s`` seconds for
    its upload; what is left then can be sent later. Raises InputError for a mode or artifact that does not exist.
    """

    project: str
    entity: str | None = None
    mode: str = "auto"
    group: str | None = None
    job_type: str | None = None
    tags: Sequence[str] = ()
    log_artifacts: Sequence[str] = ("plan",)
    finish_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        require_choice("tracking.mode", self.mode, MODES)
        for name in self.log_artifacts:
            require_choice("tracking.log_artifacts", name, ARTIFACTS)
        if self.finish_timeout_s <= 0:
            raise InputError(f"tracking.finish_timeout_s={self.finish_timeout_s} is not possible.", change="Use 300.")

    @contextmanager
    def open(
        self, config: Mapping[str, Any], run_dir: Path, choices: Mapping[str, str | None], sweep: str | None = None
    ) -> Iterator[Tracked]:
        """The W&B run of the job in ``run_dir``, which a requeued job or a rerun goes on with.

        ``choices`` are the names chosen of each group, ``sweep`` is the name of the sweep that the job is part of.
        """
        tracked = Tracked(self.log_artifacts)
        try:
            self._start(tracked, config, run_dir, choices, sweep)
        except Exception as error:
            log.warning("W&B logging failed and is left out: %s", error)
        try:
            yield tracked
        except BaseException:
            tracked.close(exit_code=1, timeout_s=LEAVING_S)
            raise
        tracked.close(exit_code=0, timeout_s=2 * INIT_TIMEOUT_S + self.finish_timeout_s)

    def _start(
        self,
        tracked: Tracked,
        config: Mapping[str, Any],
        run_dir: Path,
        choices: Mapping[str, str | None],
        sweep: str | None,
    ) -> None:
        mode = chosen_mode(self.mode)
        if mode == "disabled":
            return
        state = TrackedState.of(run_dir, os.environ, in_sweep=sweep is not None)
        init = self._arguments(config, choices, sweep, mode) | {"id": state.id, "dir": str(run_dir)}
        if os.environ.get("WANDB_SWEEP_ID"):  # W&B's agent has set where the run belongs, and W&B warns of other words
            init = {name: value for name, value in init.items() if name not in ("project", "entity", "id")}
        if mode == "offline":
            folder = shlex.quote(str(run_dir / "wandb"))
            log.info("the W&B run is kept offline; send it with: wandb sync %s/offline-run-*", folder)
        tracked.start(init, state, run_dir)

    def _arguments(
        self, config: Mapping[str, Any], choices: Mapping[str, str | None], sweep: str | None, mode: str
    ) -> dict[str, Any]:
        chosen = {group: choice for group, choice in choices.items() if choice not in (None, "none", "null")}
        until = config.get("until")
        shown_config = shown(dict(config)) | {"choices": {group: chosen.get(group, "none") for group in choices}}
        named = [*(chosen[group] for group in TAGGED if group in chosen), f"{config['ratio']:g}"]
        timeouts = {"init_timeout": INIT_TIMEOUT_S, "finish_timeout": self.finish_timeout_s}
        return {
            "project": self.project,
            "entity": self.entity,
            "name": " ".join(named),
            "group": self.group or os.environ.get("WANDB_RUN_GROUP") or sweep,
            "job_type": self.job_type or (f"until-{until}" if until else "prune"),
            "tags": [*self.tags, *(f"{group}={chosen[group]}"[:LONGEST_TAG] for group in TAGGED if group in chosen)],
            "config": {"cfg": shown_config},
            "mode": mode,
            "resume": "allow",
            "settings": PRIVATE | timeouts | {"x_transaction_log_flush_interval": FLUSH_SECONDS},
        }


def chosen_mode(mode: str) -> str:
    """What ``auto`` means here."""
    if mode != "auto":
        return mode
    asked = os.environ.get("WANDB_MODE", "")
    if asked in MODES and asked != "auto":
        return asked
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts  # W&B writes to the file that NETRC names
        return any("wandb" in host or host == server for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False
