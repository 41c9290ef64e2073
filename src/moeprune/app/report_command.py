"""``moeprune-report``: one report over any runs, from what they left behind, however they were started."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from moeprune.app.manifest import MANIFEST
from moeprune.app.terminal import terminal
from moeprune.errors import InputError
from moeprune.report.summary import write_run_report
from moeprune.report.whole_report import write_whole_report


def run_report(arguments: Sequence[str]) -> int:
    """Write the report over all runs in or below the folders as Markdown, LaTeX, CSV and a page; print its tables.

    Of a single run its own tables are printed, and its plots drawn. Raises InputError where there is no run, or several
    folders and no place for the report.
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
    if is_run:
        write_run_report(directories[0], terminal())
    write_whole_report(directories, given.into or directories[0], terminal(quiet=is_run))
    return 0
