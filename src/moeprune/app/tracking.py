"""Weights & Biases: the same numbers as in the run directory. A run never fails because of tracking."""

import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WandbTracker:
    """Logs one finished run. ``mode`` is auto, online or offline; auto is online when a key for W&B is set up."""

    project: str
    entity: str | None = None
    mode: str = "auto"
    group: str | None = None
    tags: Sequence[str] = ()

    def log_run(self, config: Mapping[str, Any], metrics: Mapping[str, Any], run_dir: Path) -> None:
        """Config under ``cfg``, summary metrics as ``<variant>/<metric>``, the tables, and the plan's file."""
        try:
            self._log_run(config, metrics, run_dir)
        except Exception as error:
            log.warning("W&B logging failed and is left out: %s", error)

    def _log_run(self, config: Mapping[str, Any], metrics: Mapping[str, Any], run_dir: Path) -> None:
        import wandb

        mode = self.mode if self.mode != "auto" else ("online" if _logged_in() else "offline")
        settings = wandb.Settings(silent=True, console="off", init_timeout=30)
        tags = [*self.tags, *(str(metrics[choice]) for choice in ("model", "scorer", "allocator", "quantizer"))]
        with wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]
            group=self.group,
            tags=tags,
            dir=run_dir,
            config={"cfg": dict(config)},
            settings=settings,
        ) as run:
            run.summary.update(summary_metrics(metrics))
            run.log({"stages": _table(wandb, metrics["stages"])})
            artifact = wandb.Artifact(f"plan-{run.id}", type="plan")
            artifact.add_file(str(run_dir / "plan.safetensors"))
            run.log_artifact(artifact)
            if mode == "offline":
                log.info("W&B run kept offline; send it with: wandb sync %s", Path(run.dir).parent)


def summary_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Flat names such as ``pruned+nf4/perplexity/prose``, ``dense/tasks/cloze/accuracy``, ``pruned/bytes/on_disk``."""
    flat: dict[str, float] = {"plan/removed_ratio": metrics["plan"]["removed_ratio"]}
    for variant in metrics["variants"]:
        _flatten(variant["name"], {key: value for key, value in variant.items() if key != "name"}, flat)
    return flat


def _flatten(prefix: str, values: Mapping[str, Any], flat: dict[str, float]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _flatten(f"{prefix}/{name}", value, flat)
        else:
            flat[f"{prefix}/{name}"] = value


def _table(wandb: Any, rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = list(rows[0])
    return wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
