"""A table as columns of cells, from which the terminal table, the Markdown, the LaTeX and the page all come."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

PAGE_WIDTH = 120
LEAST_TEXT_WIDTH = 16
ROW_NAME = ""
MARK_ROOM = "  "
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Cell:
    """The text of one cell; ``best`` cells are bold, ``second`` best ones underlined.

    ``number``: what a page sorts the column by. ``note``: why the cell is empty, or what its number is; a footnote, or
    a tooltip on a page. ``runs``: the folders of the runs behind the cell, relative to the report.
    """

    text: str
    best: bool = False
    second: bool = False
    number: float | None = None
    note: str = ""
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A head (which may hold a line break) over cells; columns of one ``group`` stay in one part of a split table.

    Columns of the group ROW_NAME name the row: they stand in every part. They and columns of ``prose`` are aligned
    left; prose is wrapped in a narrow terminal.
    """

    head: str
    cells: Sequence[Cell]
    group: str
    prose: bool = False

    @property
    def width(self) -> int:
        """The fewest characters it needs across, with the space to the next column."""
        lines = [*self.head.split("\n"), *(cell.text + MARK_ROOM * bool(cell.note) for cell in self.cells)]
        longest = max(len(line) for line in lines)
        return (min(longest, LEAST_TEXT_WIDTH) if self.prose else longest) + len(" | ")


@dataclass(frozen=True)
class Table:
    """Columns of equal length, with a caption for all of them and one more for some groups of columns."""

    title: str
    columns: Sequence[Column]
    caption: str
    group_captions: Mapping[str, str] = field(default_factory=dict)


def parts(table: Table, width: int) -> list[Table]:
    """The table itself where it fits ``width``; else a table per group, and more where a group is wider still.

    Of the parts of one group, the last has the caption.
    """
    names = [column for column in table.columns if column.group == ROW_NAME]
    groups = list(dict.fromkeys(column.group for column in table.columns if column.group != ROW_NAME))
    if sum(column.width for column in table.columns) <= width:
        return [_with_group_captions(table, groups)]
    found = []
    for group in groups:
        columns = [column for column in table.columns if column.group == group]
        room = width - sum(column.width for column in names)
        pieces = list(_pieces(columns, room))
        for number, piece in enumerate(pieces, start=1):
            counted = f" ({number} of {len(pieces)})" if len(pieces) > 1 else ""
            part = replace(table, title=f"{table.title}: {group}{counted}", columns=[*names, *piece])
            is_last = number == len(pieces)
            found.append(_with_group_captions(part, [group]) if is_last else replace(part, caption=""))
    return found


def _pieces(columns: Sequence[Column], room: int) -> Iterator[list[Column]]:
    piece: list[Column] = []
    for column in columns:
        if piece and sum(other.width for other in piece) + column.width > room:
            yield piece
            piece = []
        piece.append(column)
    yield piece


def _with_group_captions(table: Table, groups: Sequence[str]) -> Table:
    captions = [table.caption, *(table.group_captions[group] for group in groups if group in table.group_captions)]
    return replace(table, caption=" ".join(captions), group_captions={})


def footnotes(table: Table) -> dict[str, int]:
    """The different notes of a table's cells, row by row, each with its number."""
    rows = zip(*(column.cells for column in table.columns), strict=True)
    notes = dict.fromkeys(cell.note for row in rows for cell in row if cell.note)
    return {note: number for number, note in enumerate(notes, start=1)}


def superscript(number: int) -> str:
    return str(number).translate(SUPERSCRIPTS)


def print_table(table: Table, console: Console) -> None:
    """Print to the terminal, in parts where it is narrower than the table."""
    if console.quiet:
        return
    for part in parts(table, console.width):
        notes = footnotes(part)
        console.print(Text(part.title, style="bold"))
        shown = RichTable(box=box.SIMPLE_HEAD)
        shown.show_edge = shown.pad_edge = False
        fits = sum(column.width for column in part.columns) <= console.width
        for column in part.columns:
            shown.add_column(
                Text(column.head),
                justify="left" if reads_left(column) else "right",
                no_wrap=fits and not column.prose,
                overflow="fold",
            )
        for row in zip(*(column.cells for column in part.columns), strict=True):
            shown.add_row(*(_terminal_cell(cell, notes) for cell in row))
        console.print(shown)
        below = [*([part.caption] if part.caption else []), *(f"{superscript(notes[note])} {note}" for note in notes)]
        console.print(Text("".join(f"{line}\n" for line in below), style="dim"))


def _terminal_cell(cell: Cell, notes: Mapping[str, int]) -> Text:
    style = "bold" if cell.best else "underline" if cell.second else ""
    return Text(cell.text, style=style).append(_mark(cell, notes), style="not bold not underline")


def _mark(cell: Cell, notes: Mapping[str, int]) -> str:
    return f" {superscript(notes[cell.note])}" if cell.note else ""


def markdown(table: Table) -> str:
    """GitHub Markdown, in parts where the table is wider than a page of 120 characters."""
    return "\n".join(_markdown_part(part) for part in parts(table, PAGE_WIDTH))


def _markdown_part(part: Table) -> str:
    notes = footnotes(part)
    columns = [_markdown_column(column, notes) for column in part.columns]
    rows = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    caption = [part.caption, ""] if part.caption else []
    below = [line for note in notes for line in (f"{superscript(notes[note])} {markdown_text(note)}", "")]
    return "\n".join([f"### {part.title}", "", *rows, "", *caption, *below])


def _markdown_column(column: Column, notes: Mapping[str, int]) -> list[str]:
    texts = [markdown_text(column.head), *(_markdown_cell(cell, notes) for cell in column.cells)]
    width = max(3, *(len(text) for text in texts))
    if reads_left(column):
        texts = [text.ljust(width) for text in texts]
        return [texts[0], "-" * width, *texts[1:]]
    texts = [text.rjust(width) for text in texts]
    return [texts[0], "-" * (width - 1) + ":", *texts[1:]]


def _markdown_cell(cell: Cell, notes: Mapping[str, int]) -> str:
    text = markdown_text(cell.text)
    marked = f"**{text}**" if cell.best else f"<u>{text}</u>" if cell.second else text
    return marked + _mark(cell, notes)


def markdown_text(text: str) -> str:
    """One line in which nothing is taken for a table's border or for HTML."""
    return re.sub(r"<(?=\S)", "&lt;", text.replace("|", "\\|").replace("\n", " "))


def reads_left(column: Column) -> bool:
    """Whether the column is aligned left, as names and prose are."""
    return column.group == ROW_NAME or column.prose
