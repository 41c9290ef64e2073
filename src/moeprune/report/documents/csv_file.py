"""The numbers of a sweep, unrounded, one row per run and variant."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from moeprune.report.documents.files import written_whole
from moeprune.report.runs.results import SETTINGS, Run
from moeprune.report.runs.variants import Variant


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """Columns: run, status, error, overrides, settings, what the recovery took, variant, then each number by its dotted
    name in metrics.json, but for the table of precisions. A run without results has one row.
    """
    rows = [row for run in runs for row in _run_rows(run)]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _run_rows(run: Run) -> Iterator[dict[str, object]]:
    about: dict[str, object] = {
        "run": run.name,
        "status": run.status,
        "error": f"{run.error.type}: {run.error.message}" if run.error else "",
        "overrides": " ".join(run.overrides),
    }
    if run.results is None:
        yield about
        return
    settings = {key: getattr(run.results, key) for key in SETTINGS}
    details = run.results.recovery_details
    recovery = dict(_flat("recovery", asdict(details))) if details else {}
    for variant in run.results.variants:
        yield {**about, **settings, **recovery, **_numbers(variant)}


def _numbers(variant: Variant) -> dict[str, object]:
    numbers: dict[str, object] = {"variant": variant.name, "mean_perplexity": variant.mean_perplexity}
    for name, value in asdict(variant).items():
        if isinstance(value, dict):
            numbers |= dict(_flat(name, value))
    return numbers


def _flat(prefix: str, values: dict[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value
