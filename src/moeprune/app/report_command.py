"""``moeprune-report``: the tables and plots of a run or a sweep, from what its jobs left, whoever started them."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from moeprune.app.terminal import terminal
from moeprune.report.summary import write_run_report, write_sweep_report


def run_report(arguments: Sequence[str]) -> int:
    """Print the tables of a run, or of a sweep as far as it has come, and write them with all plots.

    Raises InputError for a folder that is neither.
    """
    parser = ArgumentParser(prog="moeprune-report", description=__doc__)
    parser.add_argument("directory", type=Path, help="of a run or a sweep, such as runs/2025-01-31/12-00-00-sweep")
    directory = parser.parse_args(arguments).directory
    if (directory / "manifest.json").exists():
        write_run_report(directory, terminal())
        return 0
    write_sweep_report(directory, terminal())
    for manifest in directory.glob("*/manifest.json"):
        write_run_report(manifest.parent, terminal(quiet=True))
    return 0
