"""``moeprune-report``: one report over any runs, from what they left behind, however they were started."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from moeprune.app.manifest import MANIFEST
from moeprune.app.terminal import terminal
from moeprune.errors import InputError
from moeprune.report.runs.results import load_runs
from moeprune.report.summary import write_run_report
from moeprune.report.whole_report import write_whole_report

DRAWN = ("table.md", "kept_channels.png")


def run_report(arguments: Sequence[str]) -> int:
    """Write the report over all runs in or below the folders as Markdown, LaTeX, CSV and a page; print its tables.

    Runs that drew no plots of their own draw them first, into their folders. Of a single run its own tables are
    printed. Raises InputError where there is no run, or several folders and no place for the report.
    """
    parser = ArgumentParser(prog="moeprune-report", description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+", help="of runs or sweeps, such as runs/2025-01-31")
    parser.add_argument("--into", type=Path, help="folder for the report; by default the one that is reported")
    given = parser.parse_args(arguments)
    directories: list[Path] = given.directories
    if given.into is None and len(directories) > 1:
        raise InputError(
            f"The report of {len(directories)} folders needs a place of its own.", change="Add --into FOLDER."
        )
    is_run = len(directories) == 1 and (directories[0] / MANIFEST).exists()
    for run in load_runs(directories):
        is_complete = all((run.folder / name).exists() for name in DRAWN)
        if is_run or (run.metrics is not None and not is_complete):
            write_run_report(run.folder, terminal(quiet=not is_run), with_plots=not is_complete)
    write_whole_report(directories, given.into or directories[0], terminal(quiet=is_run))
    return 0
