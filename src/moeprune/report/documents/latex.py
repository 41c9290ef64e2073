"""A document as LaTeX with booktabs: it compiles as it is, and each table can be copied into a paper."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moeprune.report.documents.document import Document, Figure, Section
from moeprune.report.tables.table import PAGE_WIDTH, Cell, Column, Table, footnotes, parts, reads_left

PREAMBLE = r"""\documentclass[a4paper,10pt]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{textcomp}
\usepackage{booktabs}
\usepackage{graphicx}
\usepackage[margin=2cm]{geometry}
% A table that is wider than the page is shrunk to it.
\newsavebox{\widetable}
\newcommand{\fitted}[1]{\sbox{\widetable}{#1}%
  \ifdim\wd\widetable>\linewidth\resizebox{\linewidth}{!}{\usebox{\widetable}}\else\usebox{\widetable}\fi}
\newcommand{\tablenote}[1]{\par\smallskip{\footnotesize\raggedright #1\par}}
"""
ROWS_PER_PAGE = 45
# What its usual fonts have beyond ASCII: Latin-1, and the further letters of the T1 encoding.
LETTERS = {chr(code) for code in (*range(0x20, 0x7F), *range(0xA1, 0x100))} | set(
    "ĂăĄąĆćČčĎďĐđĘęĚěĞğĹĺĽľŁłŃńŇňŊŋŐőŔŕŘřŚśŞşŠšŢţŤťŮůŰűŸŹźŻżŽžŒœİı"
)
ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}", "'": r"\textquotesingle{}",
        "[": "{[}", "]": "{]}", "\n": " ", "±": r"$\pm$", "·": r"$\cdot$",
        "≤": r"$\leq$", "≥": r"$\geq$", "†": r"$\dagger$", "²": r"$^2$", "Δ": r"$\Delta$", "→": r"$\rightarrow$",
    }
)  # fmt: skip


def latex_document(document: Document, folder: Path) -> str:
    """The whole document, for a file in ``folder``: pictures are included from there, as PNG."""
    blocks = [PREAMBLE + rf"\title{{{latex_text(document.title)}}}" + "\n\\date{}\n\\begin{document}\n\\maketitle"]
    blocks += [latex_text(paragraph) for paragraph in document.paragraphs]
    for number, section in enumerate(document.sections):
        blocks += [r"\clearpage"] if number else []  # so that its floats stay in a section, and never get too many
        blocks += _section_blocks(section, folder)
    return "\n\n".join([*blocks, "\\end{document}"]) + "\n"


def _section_blocks(section: Section, folder: Path) -> Iterator[str]:
    yield rf"\section{{{latex_text(section.heading)}}}"
    yield from (latex_text(paragraph) for paragraph in section.paragraphs)
    for table in section.tables:
        yield latex_table(table)
    yield from (_figure(figure, folder) for figure in section.figures)


def latex_table(table: Table) -> str:
    """Floats with booktabs rules, best cells bold and second best underlined; notes stand below.

    A table wider than a page of 120 characters comes in its parts, a long one in pieces of 45 rows.
    """
    pieces = (piece for part in parts(table, PAGE_WIDTH) for piece in _pages(part))
    return "\n\n".join(_float(piece) for piece in pieces)


def _pages(table: Table) -> Iterator[Table]:
    count = len(table.columns[0].cells)
    for start in range(0, max(count, 1), ROWS_PER_PAGE):
        rows = slice(start, start + ROWS_PER_PAGE)
        columns = [replace(column, cells=column.cells[rows]) for column in table.columns]
        title = f"{table.title} (continued)" if start else table.title
        is_last = start + ROWS_PER_PAGE >= count
        yield replace(table, title=title, columns=columns, caption=table.caption if is_last else "")


def _float(table: Table) -> str:
    notes = footnotes(table)
    alignment = "".join("l" if reads_left(column) else "r" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    below = [latex_text(table.caption)] if table.caption else []
    below += [f"$^{{{number}}}$ {latex_text(note)}" for note, number in notes.items()]
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{latex_text(table.title)}}}",
        rf"\fitted{{\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        *_head(table.columns),
        r"\midrule",
        *(_row(_cell(cell, notes) for cell in row) for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        *(rf"\tablenote{{{text}}}" for text in below),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _head(columns: Sequence[Column]) -> Iterator[str]:
    """A line for each line of the longest head; short heads stand at the bottom."""
    heads = [column.head.split("\n") for column in columns]
    height = max(map(len, heads))
    padded = [[""] * (height - len(head)) + head for head in heads]
    for line in zip(*padded, strict=True):
        yield _row(latex_text(text) for text in line)


def _row(texts: Iterator[str]) -> str:
    return " & ".join(texts) + r" \\"


def _cell(cell: Cell, notes: Mapping[str, int]) -> str:
    text = latex_text(cell.text)
    marked = rf"\textbf{{{text}}}" if cell.best else rf"\underline{{{text}}}" if cell.second else text
    return marked + (f"$^{{{notes[cell.note]}}}$" if cell.note else "")


def latex_text(text: str) -> str:
    """Plain text in which LaTeX takes no character for its own; letters that its fonts lack become question marks."""
    known = (char if char in LETTERS or ord(char) in ESCAPES else "?" for char in text)
    return "".join(known).translate(ESCAPES)


def _figure(figure: Figure, folder: Path) -> str:
    file = next((file for file in figure.files if file.suffix == ".png"), figure.files[0])
    path = Path(os.path.relpath(file, folder)).as_posix()
    caption = latex_text(f"{figure.title}. {figure.caption}" if figure.caption else figure.title)
    lines = [
        r"\begin{figure}[htbp]",
        r"\centering",
        rf"\includegraphics[width=\linewidth,height=0.8\textheight,keepaspectratio]{{{path}}}",
        rf"\caption{{{caption}}}",
        r"\end{figure}",
    ]
    return "\n".join(lines)
