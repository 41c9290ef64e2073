"""The report of a run or of a sweep: what is printed, and the files that are written."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moeprune.report.documents.csv_file import write_csv
from moeprune.report.documents.files import written_whole
from moeprune.report.figures.points import compressed
from moeprune.report.runs.grid import Grid, find_grids
from moeprune.report.runs.results import Metrics, Run, load_run, load_sweep
from moeprune.report.runs.seeds import rows_of
from moeprune.report.tables.grid_tables import grid_tables, write_grid_csv
from moeprune.report.tables.run_tables import precision_table, recovery_table, recovery_text, run_table, stage_table
from moeprune.report.tables.sweep_table import methods_table, sweep_table
from moeprune.report.tables.table import markdown, print_table
from moeprune.report.tables.takeaway import takeaway
from moeprune.report.tables.times import run_times_table, stage_times_table


def write_run_report(run_dir: Path, console: Console, with_plots: bool = True) -> list[Path]:
    """Print the tables of a run and write them to ``table.md``; draw its diagnostics and loss curve, where it has them.

    The plots take three seconds, which ``with_plots=False`` saves. Returns what was written. A run without metrics is
    told by its status and error, and nothing is written.
    """
    run = load_run(run_dir)
    if run.status != "success":
        error = f": {run.error.type}: {run.error.message}" if run.error else ""
        console.print(Text(f"Run {run.name}: {run.status}{error}"))
    if run.metrics is None:
        return []
    metrics = run.metrics
    details = filter(None, [precision_table(metrics), recovery_table(metrics)])
    tables = [run_table(metrics), *details, stage_table(metrics)]
    for table in tables:
        print_table(table, console)
    written = [run_dir / "table.md"]
    _write_text(written[0], "\n".join(markdown(table) for table in tables))
    if with_plots:
        written += write_run_plots(run_dir, metrics)
    _print_written(written, console)
    return written


def write_run_plots(run_dir: Path, metrics: Metrics) -> list[Path]:
    """Draw a run's diagnostics and its loss curve, where it has them; returns what was written."""
    written = []
    if (run_dir / "diagnostics.json").exists():
        from moeprune.report.figures.diagnostics_plots import (
            write_diagnostics_plots,  # see below: matplotlib is slow to load
        )

        written += write_diagnostics_plots(run_dir / "diagnostics.json", run_dir)
    if (run_dir / "loss_curve.jsonl").exists():
        from moeprune.report.figures.loss_curve import write_loss_curve_plot

        title = f"Recovery {recovery_text(metrics)}: {metrics.model} at ratio {metrics.ratio:g}, seed {metrics.seed}"
        written += write_loss_curve_plot(run_dir / "loss_curve.jsonl", title)
    return written


def write_sweep_report(sweep_dir: Path, console: Console) -> list[Path]:
    """Print what a sweep found and where its time went; write ``sweep.md``, ``sweep.csv`` and plots.

    Where runs fill a grid of ratios and quantizers, ``grid.md`` and ``grid.csv`` too. Returns what was written.
    """
    runs = load_sweep(sweep_dir)
    grids = find_grids(runs)
    sentences = takeaway(runs, grids)
    results = [sweep_table(runs), *filter(None, [methods_table(runs)])]
    times = [stage_times_table(runs), run_times_table(runs)] if any(run.results for run in runs) else []
    for table in results:
        print_table(table, console)
    of_grids = grid_tables(grids) if grids else []
    for table in of_grids:
        print_table(table, console)
    console.print(Text(sentences), end="\n\n")
    for table in times[:1]:  # the times of each run are in sweep.md
        print_table(table, console)
    written = [sweep_dir / "sweep.md", sweep_dir / "sweep.csv"]
    tables, more = ("\n".join(markdown(table) for table in part) for part in (results, times))
    _write_text(written[0], f"{tables}\n{sentences}\n" + (f"\n{more}" if more else ""))
    write_csv(runs, written[1])
    if grids:
        written += [sweep_dir / "grid.md", sweep_dir / "grid.csv"]
        _write_text(written[-2], "\n".join(markdown(table) for table in of_grids))
        write_grid_csv(grids, written[-1])
    written += _write_plots(runs, grids, sweep_dir)
    _print_written(written, console)
    return written


def _write_plots(runs: Sequence[Run], grids: Sequence[Grid], sweep_dir: Path) -> list[Path]:
    """``perplexity_vs_bytes.png``, where a perplexity is finite; ``methods.png``, where many runs of one size are to be
    told apart; ``pareto.png`` and ``.svg`` of the grids."""
    # Imported here: matplotlib takes a second to load, which runs that plot nothing should not wait for.
    from moeprune.report.figures.front_plot import front_figure
    from moeprune.report.figures.methods_plot import crowded_sizes, methods_figure
    from moeprune.report.figures.pareto_plot import plot_pareto
    from moeprune.report.figures.style import write_figure

    written = []
    points = compressed(rows_of(runs))
    if any(point.is_drawn for point in points):
        written.append(sweep_dir / "perplexity_vs_bytes.png")
        write_figure(front_figure(points), written[-1])
    if crowded_sizes(points):
        written.append(sweep_dir / "methods.png")
        write_figure(methods_figure(points), written[-1])
    if grids:
        pareto = [sweep_dir / f"pareto.{kind}" for kind in ("png", "svg")]
        plot_pareto(grids, *pareto)
        written += pareto
    return written


def _print_written(paths: Sequence[Path], console: Console) -> None:
    console.print(Text("\n".join(f"Written: {path}" for path in paths)), soft_wrap=True)


def _write_text(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
