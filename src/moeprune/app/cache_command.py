"""The command ``moeprune-cache``: what the stage cache holds, whether it is sound, and what of it may go."""

import argparse
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moeprune.app.terminal import terminal
from moeprune.errors import InputError
from moeprune.pipeline.disk import GIGABYTE, disk_errors
from moeprune.pipeline.inventory import STORED, Entry, inventory, remove, to_prune, why_damaged
from moeprune.pipeline.use import now

_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def run_cache_command(argv: Sequence[str]) -> int:
    """List, verify or prune. Returns 1 when something damaged was found, else 0."""
    words = _parser().parse_args(argv)
    root, console = Path(words.cache_dir), terminal()
    entries = _of_stage(inventory(root), words.stage)
    if words.action == "verify":
        return _verify(entries, console)
    if words.action == "prune":
        with disk_errors(root, root):
            _prune(root, entries, words, console)
        return 0
    console.print(_table(entries))
    console.print(f"{len(entries)} in {root}, {_total(entries)}; {_gigabytes(shutil.disk_usage(root).free)} GB free.")
    return 0


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    usual = os.environ.get("MOEPRUNE_CACHE", "cache")
    shared.add_argument("--cache-dir", default=usual, help="the cache's folder (default: %(default)s)")
    shared.add_argument("--stage", help="one stage only, such as statistics, pass or evaluation/dense")
    parser = argparse.ArgumentParser(prog="moeprune-cache", description="The cache of finished stages.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", parents=[shared], help="what is stored, by whom, and when it was last used")
    actions.add_parser("verify", parents=[shared], help="read every byte; damaged stages are set aside")
    prune = actions.add_parser("prune", parents=[shared], help="remove what was not used for long, or too much")
    prune.add_argument("--older-than", type=_duration, default=math.inf, help="last used longer ago: 30d, 12h, 2w")
    prune.add_argument("--max-size", type=_size, default=math.inf, help="remove least recently used beyond: 50GB")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


def _duration(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no time; use minutes, hours, days or weeks: 90m, 12h, 30d, 2w")
    return float(match[1]) * _SECONDS[match[2]]


def _size(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB)", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text} is no size; use 500MB, 50GB or 1.5TB (1 GB is 1e9 bytes)")
    return float(match[1]) * _BYTES[match[2].upper()]


def _of_stage(entries: list[Entry], stage: str | None) -> list[Entry]:
    if stage is None:
        return entries
    chosen = [entry for entry in entries if entry.stage == stage or entry.stage.startswith(f"{stage}/")]
    if not chosen:
        raise InputError(
            f"The cache holds nothing of a stage {stage}.",
            possible=sorted({entry.stage for entry in entries}),
            given=stage,
        )
    return chosen


def _table(entries: Sequence[Entry]) -> Table:
    table = Table(title="Stage cache")
    for column in ("stage", "key", "state", "model"):
        table.add_column(column, overflow="fold")
    for column in ("GB", "age", "unused for"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("made by", overflow="fold")
    today = time.time()
    for entry in entries:
        maker = ", ".join(entry.made_by[name] for name in ("run", "host", "moeprune") if entry.made_by.get(name))
        table.add_row(
            entry.stage,
            entry.key[:12],
            entry.state,
            entry.made_by.get("model", ""),
            _gigabytes(entry.bytes),
            _ago(today - entry.created),
            _ago(today - entry.used),
            maker,
        )
    return table


def _verify(entries: Sequence[Entry], console: Console) -> int:
    damaged = 0
    stored = [entry for entry in entries if entry.state == STORED]
    for entry in stored:
        with disk_errors(entry.folder.parent, entry.folder):
            reason = why_damaged(entry)
        if reason:
            damaged += 1
            console.print(f"damaged: {entry.stage} {entry.key}: {reason}", soft_wrap=True)
    again = "; what is damaged will be computed again" if damaged else ""
    console.print(f"{len(stored) - damaged} sound, {damaged} damaged{again}.")
    return 1 if damaged else 0


def _prune(root: Path, entries: Sequence[Entry], words: argparse.Namespace, console: Console) -> None:
    if words.older_than == words.max_size == math.inf:
        raise InputError("prune does not know what may go.", change="Use --older-than 30d, --max-size 50GB, or both.")
    gone = []
    for entry in to_prune(entries, now(root), words.older_than, words.max_size):
        name = f"{entry.stage} {entry.key[:12]}"
        if words.dry_run or remove(entry):
            gone.append(entry)
            console.print(f"{name} {entry.state}, {_gigabytes(entry.bytes)} GB", soft_wrap=True)
        else:
            console.print(f"{name} stays: it is used again, or some of its files may not be removed", soft_wrap=True)
    left = [entry for entry in entries if entry not in gone]
    console.print(f"{'Would remove' if words.dry_run else 'Removed'} {len(gone)}, {_total(gone)}; {_total(left)} left.")


def _total(entries: Sequence[Entry]) -> str:
    return f"{_gigabytes(sum(entry.bytes for entry in entries))} GB"


def _gigabytes(count: float) -> str:
    return f"{count / GIGABYTE:.3f}" if count < GIGABYTE else f"{count / GIGABYTE:.1f}"


def _ago(seconds: float) -> str:
    for unit in ("w", "d", "h", "m"):
        if seconds >= 2 * _SECONDS[unit]:
            return f"{seconds / _SECONDS[unit]:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
