"""A document as GitHub Markdown."""

import os
from collections.abc import Iterator
from pathlib import Path

from moeprune.report.documents.document import Document, Figure, Section
from moeprune.report.tables.table import markdown


def markdown_document(document: Document, folder: Path) -> str:
    """The whole document, for a file in ``folder``: pictures are linked from there, as SVG where there is one."""
    blocks = [f"# {document.title}", *document.paragraphs]
    for section in document.sections:
        blocks += _section_blocks(section, folder)
    return "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"


def _section_blocks(section: Section, folder: Path) -> Iterator[str]:
    yield f"## {section.heading}"
    yield from section.paragraphs
    yield from (markdown(table) for table in section.tables)
    yield from (_figure(figure, folder) for figure in section.figures)


def _figure(figure: Figure, folder: Path) -> str:
    file = next((file for file in figure.files if file.suffix == ".svg"), figure.files[0])
    link = Path(os.path.relpath(file, folder)).as_posix().replace(" ", "%20")
    return f"![{figure.title}]({link})\n\n{figure.caption}"
