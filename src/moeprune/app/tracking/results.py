"""What a finished run has beside its numbers: tables, plots and files."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeprune.app.tracking.names import stage_metrics, summary_metrics, variant_metrics
from moeprune.app.tracking.wandb_run import WandbRun

PLOTS = ("kept_channels", "kept_widths", "score_concentration", "router_entropy", "loss_curve")


def log_results(tracked: WandbRun, metrics: Mapping[str, Any]) -> None:
    """The summary; ``tables/variants``, ``tables/stages``, ``tables/precision``; ``plots/...``."""
    import wandb

    # First, because a plot that cannot be read would end it all.
    tracked.run.summary.update(summary_metrics(metrics) | stage_metrics(metrics["stages"]))
    tables = {
        "variants": [{"variant": row["name"]} | variant_metrics("", row) for row in metrics["variants"]],
        "stages": metrics["stages"],
        "precision": [{"variant": of["name"]} | part for of in metrics["variants"] for part in of.get("precision", ())],
    }
    row: dict[str, Any] = {f"tables/{name}": _table(rows) for name, rows in tables.items() if rows}
    plots = {name: tracked.run_dir / f"{name}.png" for name in PLOTS}
    row |= {f"plots/{name}": wandb.Image(str(file)) for name, file in plots.items() if file.exists()}
    tracked.log(row)


def log_artifact(tracked: WandbRun, kind: str, path: Path, metadata: Mapping[str, Any]) -> None:
    """A file, or the files of a folder, as the artifact ``<kind>-<run id>`` of type ``kind``."""
    import wandb

    if tracked.run.offline and tracked.run_dir not in path.parents:
        path = _copied(path, tracked.run_dir / "wandb" / "artifacts" / kind)  # the cache may be gone when it is sent
    artifact = wandb.Artifact(f"{kind}-{tracked.run.id}", type=kind, metadata=dict(metadata))
    # Files are referred to where they are, not copied into the user's home.
    if path.is_dir():
        artifact.add_dir(str(path), policy="immutable")
    else:
        artifact.add_file(str(path), policy="immutable")
    tracked.run.log_artifact(artifact)


def _copied(path: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        return Path(shutil.copytree(path, folder / path.name, dirs_exist_ok=True))
    return Path(shutil.copyfile(path, folder / path.name))


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    columns = list(dict.fromkeys(name for row in rows for name in row))
    names: list[str | int] = [column.removeprefix("/") for column in columns]
    return wandb.Table(columns=names, data=[[row.get(column) for column in columns] for row in rows])
