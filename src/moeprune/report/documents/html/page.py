"""A document as one HTML file that loads nothing: its styles, scripts and drawings are inside it."""

import base64
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup

from moeprune.report.documents.document import Document, Figure, Section
from moeprune.report.documents.html.drawing import drawing
from moeprune.report.documents.html.rows import Link, PageTable, address, page_table


@dataclass(frozen=True)
class PageFigure:
    """A figure with its drawing as markup, and links to its files."""

    id: str
    title: str
    caption: str
    drawing: Markup
    links: tuple[Link, ...]


@dataclass(frozen=True)
class PageSection:
    """A section with an id of its own for the contents list to point to."""

    id: str
    heading: str
    paragraphs: tuple[str, ...]
    tables: tuple[PageTable, ...]
    figures: tuple[PageFigure, ...]


def html_page(document: Document, folder: Path) -> str:
    """The page, for a file in ``folder``: from there it links to the figures' files and the runs' folders.

    Every text is escaped, and a Content-Security-Policy lets nothing run or load but what is named here by its hash.
    Raises InputError for a figure whose file is no SVG.
    """
    style, panzoom, script = (_resource(name) for name in ("page.css", "panzoom.min.js", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(panzoom)} {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    sections = tuple(
        _section(section, f"section-{number}", folder) for number, section in enumerate(document.sections, start=1)
    )
    return _template().render(
        document=document, sections=sections, policy=policy,
        style=Markup(style), panzoom=Markup(panzoom), script=Markup(script),
    )  # fmt: skip


def _section(section: Section, section_id: str, folder: Path) -> PageSection:
    return PageSection(
        id=section_id,
        heading=section.heading,
        paragraphs=section.paragraphs,
        tables=tuple(page_table(table, f"{section_id}-table-{n}") for n, table in enumerate(section.tables, start=1)),
        figures=tuple(
            _figure(figure, f"{section_id}-figure-{n}", folder) for n, figure in enumerate(section.figures, start=1)
        ),
    )


def _figure(figure: Figure, figure_id: str, folder: Path) -> PageFigure:
    svg = next(file for file in figure.files if file.suffix == ".svg")
    shown = Markup(drawing(svg, f"{figure_id}-", figure.title))
    links = tuple(Link(file.name, address(os.path.relpath(file, folder))) for file in figure.files)
    return PageFigure(figure_id, figure.title, figure.caption, shown, links)


@cache
def _template() -> Template:
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


@cache
def _resource(name: str) -> str:
    return (files("moeprune.resources") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
