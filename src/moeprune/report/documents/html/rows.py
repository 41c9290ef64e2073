"""A table as the page's template reads it: rows instead of columns, notes and runs with addresses."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from urllib.parse import quote

from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table, footnotes, reads_left

LEADING_NUMBER = re.compile(r"[-+]?(\d[\d,]*)?\.?\d+(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """A file or folder beside the page."""

    name: str
    address: str


@dataclass(frozen=True)
class Note:
    """A note of a table, with the number that marks it on paper."""

    id: str
    mark: int
    text: str


@dataclass(frozen=True)
class PageCell:
    """A cell of a column's ``look``; ``order`` is the number to sort by, None where it has none."""

    text: str
    best: bool
    second: bool
    look: str
    order: str | None
    note: Note | None


@dataclass(frozen=True)
class RunList:
    """The runs behind the cells under one head; behind the whole row, where the head is empty."""

    head: str
    links: tuple[Link, ...]


@dataclass(frozen=True)
class Row:
    """Cells of one row, and the runs behind them."""

    id: str
    cells: tuple[PageCell, ...]
    runs: tuple[RunList, ...]

    @property
    def run_count(self) -> int:
        return len({link for part in self.runs for link in part.links})


@dataclass(frozen=True)
class Head:
    """A column's head, and the style classes of its cells."""

    text: str
    look: str


@dataclass(frozen=True)
class HeadGroup:
    """Neighbouring columns of one group; those that name the row have an empty name."""

    name: str
    span: int


@dataclass(frozen=True)
class PageTable:
    """A table under its title; ``groups`` is empty where all columns are of one group."""

    id: str
    title: str
    groups: tuple[HeadGroup, ...]
    heads: tuple[Head, ...]
    rows: tuple[Row, ...]
    captions: tuple[str, ...]
    notes: tuple[Note, ...]

    @property
    def has_runs(self) -> bool:
        return any(row.runs for row in self.rows)


def page_table(table: Table, table_id: str) -> PageTable:
    """The table with ids that begin with ``table_id``."""
    notes = {text: Note(f"{table_id}-note-{mark}", mark, text) for text, mark in footnotes(table).items()}
    lines = zip(*(column.cells for column in table.columns), strict=True)
    rows = tuple(_row(f"{table_id}-row-{number}", table.columns, cells, notes) for number, cells in enumerate(lines))
    groups = list(dict.fromkeys(column.group for column in table.columns if column.group != ROW_NAME))
    captions = (table.caption, *(table.group_captions.get(group, "") for group in groups))
    return PageTable(
        id=table_id,
        title=table.title,
        groups=_head_groups(table.columns, any(row.runs for row in rows)) if len(groups) > 1 else (),
        heads=tuple(Head(column.head, _look(column)) for column in table.columns),
        rows=rows,
        captions=tuple(filter(None, captions)),
        notes=tuple(notes.values()),
    )


def address(path: str) -> str:
    """Where a file or folder beside the page is found; it begins with a dot, so that no part of it can be a scheme."""
    return f"./{quote(PurePosixPath(path).as_posix())}"


def _row(row_id: str, columns: Sequence[Column], cells: Sequence[Cell], notes: Mapping[str, Note]) -> Row:
    shown = tuple(
        PageCell(cell.text, cell.best, cell.second, _look(column), _order(cell), notes.get(cell.note))
        for column, cell in zip(columns, cells, strict=True)
    )
    return Row(row_id, shown, tuple(_run_lists(columns, cells)))


def _run_lists(columns: Sequence[Column], cells: Sequence[Cell]) -> Iterator[RunList]:
    """One list for the row where all its cells come from the same runs, else one for each set of runs."""
    heads_of: dict[tuple[str, ...], list[str]] = {}
    for column, cell in zip(columns, cells, strict=True):
        if cell.runs:
            heads_of.setdefault(cell.runs, []).append(column.head.replace("\n", " "))
    for runs, heads in heads_of.items():
        yield RunList(", ".join(heads) if len(heads_of) > 1 else "", tuple(Link(run, address(run)) for run in runs))


def _head_groups(columns: Sequence[Column], with_runs: bool) -> tuple[HeadGroup, ...]:
    groups = [
        HeadGroup(name, len(list(members))) for name, members in groupby(columns, key=lambda column: column.group)
    ]
    return (*groups, HeadGroup(ROW_NAME, 1)) if with_runs else tuple(groups)


def _order(cell: Cell) -> str | None:
    """The cell's number, else the one that its text begins with."""
    number = cell.number
    if number is None and (found := LEADING_NUMBER.match(cell.text)):
        number = float(found.group().replace(",", ""))
    if number is None or math.isnan(number):
        return None
    return f"{number:.10g}" if math.isfinite(number) else f"{'-' if number < 0 else ''}Infinity"


def _look(column: Column) -> str:
    return " ".join(["left"] * reads_left(column) + ["prose"] * column.prose)
