"""What a sweep shows in plain sentences, and the files that report a run or a sweep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moeprune.report.csv_file import write_csv
from moeprune.report.files import written_whole
from moeprune.report.formats import byte_unit, perplexity_text, ratio_text
from moeprune.report.results import Metrics, Run, load_run, load_sweep
from moeprune.report.run_tables import run_table, stage_table
from moeprune.report.settings import run_labels
from moeprune.report.sweep_table import methods_table, sweep_table
from moeprune.report.tables import markdown, print_table
from moeprune.report.times import run_times_table, stage_times_table

MANY_RIVALS = 6


def write_run_report(run_dir: Path, console: Console) -> list[Path]:
    """Print the tables of a run and write them to ``table.md``; draw its ``diagnostics.json``, where there is one.

    Returns what was written. A run without metrics is told by its status and error, and nothing is written.
    """
    run = load_run(run_dir)
    if run.status != "success":
        error = f": {run.error.type}: {run.error.message}" if run.error else ""
        console.print(Text(f"Run {run.name}: {run.status}{error}"))
    if run.metrics is None:
        return []
    tables = [run_table(run.metrics), stage_table(run.metrics)]
    for table in tables:
        print_table(table, console)
    written = [run_dir / "table.md"]
    _write_text(written[0], "\n".join(markdown(table) for table in tables))
    if (run_dir / "diagnostics.json").exists():
        from moeprune.report.diagnostics_plots import write_diagnostics_plots  # see below: matplotlib is slow to load

        written += write_diagnostics_plots(run_dir / "diagnostics.json")
    _print_written(written, console)
    return written


def write_sweep_report(sweep_dir: Path, console: Console) -> list[Path]:
    """Print what a sweep found and where its time went; write ``sweep.md``, ``sweep.csv``, ``perplexity_vs_bytes.png``
    and, where many runs of one size are to be told apart, ``methods.png``.

    Returns what was written; without any finished run there is no plot.
    """
    # Imported here: matplotlib takes a second to load, which runs that plot nothing should not wait for.
    from moeprune.report.methods_plot import crowded_sizes, plot_methods
    from moeprune.report.plots import plot_perplexity_against_bytes

    runs = load_sweep(sweep_dir)
    sentences = takeaway(runs)
    results = [sweep_table(runs), *filter(None, [methods_table(runs)])]
    times = [stage_times_table(runs), run_times_table(runs)] if any(run.results for run in runs) else []
    for table in results:
        print_table(table, console)
    console.print(Text(sentences), end="\n\n")
    for table in times[:1]:  # the times of each run are in sweep.md
        print_table(table, console)
    written = [sweep_dir / "sweep.md", sweep_dir / "sweep.csv"]
    tables, more = ("\n".join(markdown(table) for table in part) for part in (results, times))
    _write_text(written[0], f"{tables}\n{sentences}\n" + (f"\n{more}" if more else ""))
    write_csv(runs, written[1])
    if times:
        written.append(sweep_dir / "perplexity_vs_bytes.png")
        plot_perplexity_against_bytes(runs, written[-1])
    if crowded_sizes(runs):
        written.append(sweep_dir / "methods.png")
        plot_methods(runs, written[-1])
    _print_written(written, console)
    return written


def takeaway(runs: Sequence[Run]) -> str:
    """Per model and setting (a ratio with a quantizer), the run of lowest mean perplexity beside its rivals.

    Every setting is told, so that a method which wins at one ratio and loses at another is not shown at its best only.
    """
    finished = [run for run in runs if run.results]
    entrants = [
        Entrant(label, run.name, run.results)
        for run, label in zip(finished, run_labels(finished), strict=True)
        if run.results
    ]
    rivals: dict[tuple[str, float, str], list[Entrant]] = {}
    for entrant in entrants:
        metrics = entrant.metrics
        if metrics.is_reference:
            continue
        rivals.setdefault((metrics.model, metrics.ratio, metrics.quantizer), []).append(entrant)
    sentences = [_setting_takeaway(group) for group in rivals.values()]
    references = [entrant.name for entrant in entrants if entrant.metrics.is_reference]
    if references:
        sentences.append(
            f"Not compared, for they remove no channels and are as large as dense: {', '.join(references)}."
        )
    unfinished = [f"run {run.name} ({run.status})" for run in runs if not run.results]
    if unfinished:
        sentences.append(f"Not compared, for want of results: {', '.join(unfinished)}.")
    return "\n".join(sentences)


@dataclass(frozen=True)
class Entrant:
    """A finished run in the comparison."""

    method: str
    run: str
    metrics: Metrics

    @property
    def name(self) -> str:
        return f"{self.method} (run {self.run})"

    @property
    def perplexity(self) -> float:
        """Mean perplexity; one that is not a number ranks last, as infinite."""
        perplexity = self.metrics.final.mean_perplexity
        return math.inf if math.isnan(perplexity) else perplexity


def _setting_takeaway(entrants: Sequence[Entrant]) -> str:
    rivals = sorted(entrants, key=lambda entrant: entrant.perplexity)
    best, metrics = rivals[0], rivals[0].metrics
    quantized = "without quantizer" if metrics.quantizer == "none" else f"with quantizer {metrics.quantizer}"
    where = f"{metrics.model} at ratio {metrics.ratio:g} {quantized}"
    if math.isinf(best.perplexity):
        return f"{where}: no run has a finite mean perplexity."
    to_dense = ratio_text(best.perplexity / metrics.dense.mean_perplexity)
    lowest = f"{perplexity_text(best.perplexity)} ({to_dense} times dense)"
    return f"{where}: {_standing(rivals, lowest)}. {_size(best)}."


def _standing(rivals: Sequence[Entrant], lowest: str) -> str:
    """Who has the lowest mean perplexity, who comes next (two of many) and who last; equal readings are level."""
    best = rivals[0]
    level = [rival for rival in rivals if perplexity_text(rival.perplexity) == perplexity_text(best.perplexity)]
    behind = rivals[len(level) :]
    if len(rivals) == 1:
        return f"{best.name} is the only run, with mean perplexity {lowest}"
    if not behind:
        return f"all {len(rivals)} runs have the same mean perplexity, {lowest}"
    if len(level) == 1:
        first = f"{best.name} has the lowest mean perplexity of {len(rivals)} runs, {lowest}"
    else:
        shared = " and ".join(rival.name for rival in level)
        first = f"{shared} share the lowest mean perplexity of {len(rivals)} runs, {lowest}"
    compared = f"{behind[0].name} follows with {_against(behind[0], best)}"
    if len(rivals) > MANY_RIVALS and len(behind) > 2:
        compared += f", then {behind[1].name} with {_against(behind[1], best)}"
    if len(behind) > 1:
        compared += f", and {behind[-1].name} is last with {_against(behind[-1], best)}"
    return f"{first}; {compared}"


def _against(rival: Entrant, best: Entrant) -> str:
    if math.isinf(rival.perplexity):
        return "one that is not finite"
    ratio = rival.perplexity / best.perplexity
    higher = f"{100 * (ratio - 1):.1f}% higher" if ratio < 2 else f"{ratio_text(ratio)} times as high"
    return f"{perplexity_text(rival.perplexity)} ({higher})"


def _size(entrant: Entrant) -> str:
    final, dense = entrant.metrics.final.bytes.with_overhead, entrant.metrics.dense.bytes.with_overhead
    unit_bytes, unit = byte_unit([dense])
    relation = f"{dense / final:.2f} times smaller" if final <= dense else f"{final / dense:.2f} times larger"
    return (
        f"{entrant.name} takes {final / unit_bytes:.2f} {unit} with overhead against {dense / unit_bytes:.2f} {unit} "
        f"dense ({relation})"
    )


def _print_written(paths: Sequence[Path], console: Console) -> None:
    console.print(Text("\n".join(f"Written: {path}" for path in paths)), soft_wrap=True)


def _write_text(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
