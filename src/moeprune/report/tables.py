"""A table as columns of text, from which the terminal table and the Markdown both come."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

PAGE_WIDTH = 120
LEAST_TEXT_WIDTH = 16
ROW_NAME = ""


@dataclass(frozen=True)
class Cell:
    """The text of one cell; ``best`` cells are bold."""

    text: str
    best: bool = False


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
        lines = [*self.head.split("\n"), *(cell.text for cell in self.cells)]
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


def print_table(table: Table, console: Console) -> None:
    """Print to the terminal, in parts where it is narrower than the table."""
    for part in parts(table, console.width):
        console.print(Text(part.title, style="bold"))
        shown = RichTable(box=box.SIMPLE_HEAD)
        shown.show_edge = shown.pad_edge = False
        fits = sum(column.width for column in part.columns) <= console.width
        for column in part.columns:
            shown.add_column(
                Text(column.head),
                justify="left" if _reads_left(column) else "right",
                no_wrap=fits and not column.prose,
                overflow="fold",
            )
        for row in zip(*(column.cells for column in part.columns), strict=True):
            shown.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in row))
        console.print(shown)
        console.print(Text(f"{part.caption}\n" if part.caption else "", style="dim"))


def markdown(table: Table) -> str:
    """GitHub Markdown, in parts where the table is wider than a page of 120 characters."""
    return "\n".join(_markdown_part(part) for part in parts(table, PAGE_WIDTH))


def _markdown_part(part: Table) -> str:
    columns = [_markdown_column(column) for column in part.columns]
    rows = [f"| {' | '.join(row)} |" for row in zip(*columns, strict=True)]
    caption = [part.caption, ""] if part.caption else []
    return "\n".join([f"### {part.title}", "", *rows, "", *caption])


def _markdown_column(column: Column) -> list[str]:
    head = column.head.replace("\n", " ")
    cells = [f"**{cell.text}**" if cell.best else cell.text for cell in column.cells]
    texts = [text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for text in [head, *cells]]
    width = max(3, *(len(text) for text in texts))
    if _reads_left(column):
        texts = [text.ljust(width) for text in texts]
        return [texts[0], "-" * width, *texts[1:]]
    texts = [text.rjust(width) for text in texts]
    return [texts[0], "-" * (width - 1) + ":", *texts[1:]]


def _reads_left(column: Column) -> bool:
    return column.group == ROW_NAME or column.prose
