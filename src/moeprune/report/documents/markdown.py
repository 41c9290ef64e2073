"""A document as GitHub Markdown."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from moeprune.report.documents.document import Document, Figure, Section
from moeprune.report.tables.table import markdown, markdown_text


def markdown_document(document: Document, folder: Path) -> str:
    """The whole document, for a file in ``folder``: pictures are linked from there, as SVG where there is one."""
    blocks = [f"# {markdown_text(document.title)}", *map(markdown_text, document.paragraphs)]
    for section in document.sections:
        blocks += _section_blocks(section, folder)
    return "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"


def _section_blocks(section: Section, folder: Path) -> Iterator[str]:
    yield f"## {markdown_text(section.heading)}"
    yield from map(markdown_text, section.paragraphs)
    yield from (markdown(table) for table in section.tables)
    yield from (_figure(figure, folder) for figure in section.figures)


def _figure(figure: Figure, folder: Path) -> str:
    file = next((file for file in figure.files if file.suffix == ".svg"), figure.files[0])
    link = quote(Path(os.path.relpath(file, folder)).as_posix())
    return f"![{markdown_text(figure.title)}]({link})\n\n{markdown_text(figure.caption)}"
