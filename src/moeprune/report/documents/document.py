"""A report before it is written down: sections of sentences, tables and figures, for every format the same."""

from dataclasses import dataclass
from pathlib import Path

from moeprune.report.tables.table import Table


@dataclass(frozen=True)
class Figure:
    """One picture in several formats: ``files`` are an .svg and a .png of the same drawing."""

    title: str
    caption: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Section:
    """A heading, then its paragraphs, its tables and its figures, in this order."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Document:
    """A title, paragraphs that say what was reported, and the sections; paragraphs are plain text without markup."""

    title: str
    paragraphs: tuple[str, ...]
    sections: tuple[Section, ...]
