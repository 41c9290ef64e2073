"""``moeprune-rerun``: run the jobs of a sweep again that did not succeed, in place.

It gives the sweep's own command once more, with the sweeper `hydra_plugins.moeprune.rerun_sweeper` in the place of the
one that it had: so the launcher and its settings are the sweep's.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from moeprune.app.manifest import queue_again
from moeprune.app.sweep_record import SweepRecord
from moeprune.app.sweep_state import FAILURES, JobState, State, SweepState, read_sweep
from moeprune.app.sweep_text import ranges
from moeprune.errors import InputError

# What the sweep's command says to its own sweeper, and of the folders that the jobs have already.
_OF_THE_SWEEPER = re.compile(r"[+~]*hydra(/sweeper\b|\.sweeper\b|\.sweep\.|\.mode\b)")
_MULTIRUN = ("-m", "--multirun")


def moeprune_command(words: Sequence[str]) -> list[str] | None:
    """The words after ``moeprune`` that run the jobs again; None, and it is said, where there is nothing to run.

    Changes into the directory in which the sweep was started, so that paths mean what they meant. Raises InputError.
    """
    parser = argparse.ArgumentParser(
        prog="moeprune-rerun", description="Run the jobs of a sweep again that did not succeed, in their own folders."
    )
    parser.add_argument("sweep_dir", type=Path)
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="KEY=VALUE", help="settings to give these jobs or the launcher anew"
    )
    parser.add_argument(
        "--silent-too", action="store_true", help="also jobs that are silent and whose machine cannot be asked"
    )
    asked = parser.parse_args(words)
    also = _parsed(asked.also)
    sweep = read_sweep(asked.sweep_dir)
    record = SweepRecord.read(asked.sweep_dir)
    chosen = sweep.those(*FAILURES, *([State.SILENT] if asked.silent_too else []))
    _tell(sweep, chosen)
    if not chosen:
        return None
    sweep_dir = asked.sweep_dir.resolve()
    called_from = Path.cwd()
    _change_into(Path(record.directory))
    of_jobs = [str(override.input_line) for override in also if not override.is_hydra_override()]
    of_hydra = [override for override in also if override.is_hydra_override()]
    command = [word for word in record.command if word not in _MULTIRUN and not _OF_THE_SWEEPER.match(word)]
    return [
        "--multirun",
        *_with(command, of_hydra),
        "hydra/sweeper=rerun",
        f"hydra.sweep.dir={quoted(_short(sweep_dir, called_from))}",
        f"hydra.sweeper.jobs=[{','.join(str(job.job.number) for job in chosen)}]",
        f"hydra.sweeper.also=[{','.join(quoted(text) for text in of_jobs)}]",
    ]


def launch_overrides(sweep_dir: Path, numbers: Sequence[int], also: Sequence[str]) -> list[list[str]]:
    """What a launcher is given for each of these jobs: its overrides, some of them anew, and its own folder."""
    jobs = {state.job.number: state.job for state in read_sweep(sweep_dir).jobs}
    anew = _parsed(also)
    return [[*_with(jobs[n].overrides, anew), f"hydra.sweep.subdir={jobs[n].folder}"] for n in numbers]


def begin_again(sweep_dir: Path, numbers: Sequence[int]) -> None:
    """Say, before jobs are launched again, that they are queued and that this process drives the sweep.

    Raises InputError where another rerun has begun with one of them since they were chosen.
    """
    for state in read_sweep(sweep_dir).jobs:
        if state.job.number in numbers and state.state not in (*FAILURES, State.SILENT):
            raise InputError(
                f"In {sweep_dir} job {state.job.number} is now {state.state}: something else runs it again.",
                change="Give the same command once more; it chooses anew.",
            )
    SweepRecord.read(sweep_dir).driven_by_this_process(numbers).write(sweep_dir)
    for state in read_sweep(sweep_dir).jobs:
        if state.job.number in numbers:
            queue_again(state.run_dir)


def quoted(text: str) -> str:
    r"""``text`` as a value in Hydra's grammar: in quotes, \ doubled before one, ${ not taken for an interpolation."""
    text = re.sub(r"(\\*)('|$|\$\{)", lambda match: match[1] * 2 + ("\\" if match[2] else "") + match[2], text)
    return f"'{text}'"


def _parsed(words: Sequence[str]) -> list[Override]:
    overrides = OverridesParser.create().parse_overrides(list(words))
    for override in overrides:
        if override.is_sweep_override():
            raise InputError(
                f"--also {override.input_line}: every job can have one value only.", change="Give one value."
            )
    return overrides


def _with(words: Sequence[str], anew: Sequence[Override]) -> list[str]:
    """``words`` without those whose key is given anew, then what is given anew."""
    keys = {(override.key_or_group, override.package) for override in anew}
    parser = OverridesParser.create()
    kept = []
    for word in words:
        is_override = "=" in word and not word.startswith("-")
        old = parser.parse_override(word) if anew and is_override else None
        if old is None or (old.key_or_group, old.package) not in keys:
            kept.append(word)
    return [*kept, *(str(override.input_line) for override in anew)]


def _tell(sweep: SweepState, chosen: Sequence[JobState]) -> None:
    left = [job for job in sweep.jobs if job not in chosen and job.state is not State.SUCCESS]
    for state in dict.fromkeys(job.state for job in left):
        print(f"Left alone: {state}: job {ranges(job.job.number for job in left if job.state is state)}.")
    if any(job.state is State.SILENT for job in left):
        print("Where you know that a silent one is dead, add --silent-too.")
    if chosen:
        print(f"Run again: job {ranges(job.job.number for job in chosen)}.")
    elif not left:
        print(f"Nothing to run again: all {len(sweep.jobs)} jobs succeeded.")
    else:
        print("Nothing to run again now.")


def _change_into(directory: Path) -> None:
    if directory.is_dir():
        os.chdir(directory)
    else:
        print(f"{directory}, where the sweep was started, is not there: relative paths are taken from here.")


def _short(path: Path, called_from: Path) -> str:
    """Relative, as in the sweep's own command, where that is right both here and where the command was called: the
    driver prints paths and commands to copy."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) and here == called_from else path)
