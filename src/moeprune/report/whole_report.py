"""The report over any runs: found, sorted by experiment, aggregated over seeds, and written in every format."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from moeprune.report.documents.document import Document, Figure, Section
from moeprune.report.documents.files import written_whole
from moeprune.report.documents.latex import latex_document
from moeprune.report.documents.markdown import markdown_document
from moeprune.report.documents.tidy_csv import write_tidy_csv
from moeprune.report.published.order import order_table
from moeprune.report.published.results import PublishedExperiment, published_experiments
from moeprune.report.published.tables import published_tables
from moeprune.report.runs.grid import Grid, find_grids
from moeprune.report.runs.paired import paired_comparisons, paired_sentences, paired_table
from moeprune.report.runs.results import Run, load_runs
from moeprune.report.runs.seeds import Row, distinct, rows_of
from moeprune.report.runs.settings import setting_text
from moeprune.report.runs.unquantized import with_unquantized
from moeprune.report.tables.grid_tables import grid_tables
from moeprune.report.tables.run_tables import column_of
from moeprune.report.tables.seed_table import runs_of, seed_table
from moeprune.report.tables.sweep_table import methods_table
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table, print_table
from moeprune.report.tables.takeaway import takeaway
from moeprune.report.tables.times import stage_times_table

EMBEDDED = "_embedded"
NO_EXPERIMENT = "Runs"
FIGURES = "figures"


@dataclass(frozen=True)
class Part:
    """The runs of one experiment as rows; ``replaced``: runs that were started again, and count no more.

    ``measured``: the runs, and those with a quantizer once more as they were before it.
    """

    name: str
    about: PublishedExperiment
    runs: tuple[Run, ...]
    measured: tuple[Run, ...]
    rows: tuple[Row, ...]
    replaced: tuple[Run, ...]

    @property
    def slug(self) -> str:
        """What the folder of its figures is called; a name of other characters has a digest, to be told apart."""
        if not self.name:
            return "runs"
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", self.name)
        if re.fullmatch(r"(paper/)?[A-Za-z0-9_-]+", self.name) and self.name != "runs":
            return plain
        return f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def write_whole_report(directories: Sequence[Path], into: Path, console: Console) -> list[Path]:
    """Write ``report.md``, ``.tex``, ``.csv``, ``.html`` and figures into a folder; print the tables and what was
    written.

    Raises InputError where the directories hold no run.
    """
    from moeprune.report.documents.html.page import html_page  # with its template engine, which only this needs

    parts = parts_of(load_runs(directories))
    into.mkdir(parents=True, exist_ok=True)
    sections = [_section(part, into) for part in parts]
    for section in sections:
        _print(section, console)
    document = Document(_title(parts), tuple(_summary(parts)), (*sections, _times(parts), _runs(parts, into)))
    texts = {
        "report.md": markdown_document(document, into),
        "report.tex": latex_document(document, into),
        "report.html": html_page(document, into),
    }
    written = [into / name for name in texts]
    for path, text in zip(written, texts.values(), strict=True):
        with written_whole(path) as partial:
            partial.write_text(text, encoding="utf-8")
    written.append(into / "report.csv")
    write_tidy_csv(written[-1], [(part.name, part.rows, part.about.tables) for part in parts], into)
    written += [file for section in sections for figure in section.figures for file in figure.files]
    console.print(Text("\n".join(f"Written: {path}" for path in written)), soft_wrap=True)
    return written


def parts_of(runs: Sequence[Run]) -> list[Part]:
    """The runs by experiment, in the order in which these first occur; those of none come last.

    Runs that were asked to stop early, so that others find their stages in the cache, are left out.
    """
    runs = [run for run in runs if not run.status.startswith("stopped after")]
    order = list(dict.fromkeys(_experiment(run) for run in runs))
    order.sort(key=lambda name: name == "")
    parts = []
    for name in order:
        kept, replaced = distinct([run for run in runs if _experiment(run) == name])
        measured = with_unquantized(kept)
        parts.append(Part(name, _about(name), tuple(kept), tuple(measured), tuple(rows_of(measured)), tuple(replaced)))
    return parts


def _experiment(run: Run) -> str:
    """The choice of that name; empty where there was none."""
    named = run.results.experiment if run.results else None
    found = named or setting_text(run, "experiment")
    return "" if found in (None, "default", "none") else str(found)


def _about(name: str) -> PublishedExperiment:
    known = published_experiments().get(name.removeprefix("paper/").removesuffix(EMBEDDED))
    return known if known and name.startswith("paper/") else PublishedExperiment(name or NO_EXPERIMENT, "", ())


def _title(parts: Sequence[Part]) -> str:
    return f"Report of {', '.join(part.name or 'runs' for part in parts)}"


def _summary(parts: Sequence[Part]) -> list[str]:
    runs = [run for part in parts for run in (*part.runs, *part.replaced)]
    finished = sum(run.results is not None for run in runs)
    sentences = [f"{len(runs)} runs, {finished} of them with results."]
    states: dict[str, list[str]] = {}
    for run in runs:
        if run.results is None:
            states.setdefault(run.status, []).append(run.name)
    sentences += [f"{status.capitalize()}: {', '.join(names)}." for status, names in states.items()]
    replaced = [run.name for part in parts for run in part.replaced]
    if replaced:
        sentences.append(
            f"Not counted, for another run with the same settings and seed was written later: {', '.join(replaced)}."
        )
    return [" ".join(sentences)]


def _section(part: Part, into: Path) -> Section:
    title = f"{part.about.title} ({part.name})" if part.about.question else part.about.title
    comparisons = paired_comparisons(part.rows)
    first_seeds = [row.runs[0] for row in part.rows if row.runs and not row.is_dense]
    grids = find_grids(first_seeds)
    if len({grid.model for grid in grids}) < len(grids):
        grids.clear()  # several methods of one model: they are compared with each other, not each with its other sizes
    tables = [
        seed_table(part.about.title, part.rows, into),
        *filter(None, [methods_table(first_seeds), paired_table(comparisons, into)]),
        *(grid_tables(grids) if grids else []),
        *published_tables(part.about.tables, part.rows, into),
        *filter(None, [order_table(part.about.tables, part.rows)]),
    ]
    sentences = [
        part.about.question,
        *takeaway(part.measured, grids).splitlines(),
        *paired_sentences(comparisons),
    ]
    return Section(title, tuple(filter(None, sentences)), tuple(tables), _figures(part, grids, into))


def _figures(part: Part, grids: Sequence[Grid], into: Path) -> tuple[Figure, ...]:
    # Imported here: matplotlib is slow to load.
    from moeprune.report.figures.report_figures import (
        comparison_figures,
        diagnostics_figures,
        grid_figures,
        published_figures,
    )

    folder = into / FIGURES / part.slug
    folder.mkdir(parents=True, exist_ok=True)
    drawn = (
        *comparison_figures(part.rows, folder),
        *grid_figures(grids, folder),
        *published_figures(part.about.tables, part.rows, folder),
    )
    return (*drawn, *(figure for run in _drawn_runs(part.rows) for figure in diagnostics_figures(run, folder)))


def _drawn_runs(rows: Sequence[Row]) -> list[Run]:
    """Of each model one run, of the first row that removed something where there is one."""
    measured = [row for row in reversed(rows) if row.runs and not row.is_dense]
    of_model = {row.model: row.runs[0] for row in sorted(measured, key=lambda row: (row.ratio or 0) > 0)}
    return [run for _, run in sorted(of_model.items())]


def _print(section: Section, console: Console) -> None:
    console.print(Text(section.heading, style="bold"))
    for table in section.tables:
        print_table(table, console)
    console.print(Text("\n".join(section.paragraphs)), end="\n\n")


def _times(parts: Sequence[Part]) -> Section:
    """Where the time of all runs went; that of each run is in its own table.md, and in the sweep's sweep.md."""
    runs = [run for part in parts for run in part.runs]
    tables = (stage_times_table(runs),) if any(run.results for run in runs) else ()
    return Section("Time", (), tables)


def _runs(parts: Sequence[Part], into: Path) -> Section:
    """Each row with the folders of its runs."""
    rows = [(part, row) for part in parts for row in part.rows if not row.is_dense]
    columns = [
        column_of("experiment", (part.name or "-" for part, _ in rows), ROW_NAME),
        column_of("model", (row.model for _, row in rows), ROW_NAME),
        column_of("method", (row.method for _, row in rows), ROW_NAME),
        column_of("ratio", ("-" if row.ratio is None else f"{row.ratio:.4g}" for _, row in rows), ROW_NAME),
        column_of("quantizer", (row.quantizer or "-" for _, row in rows), ROW_NAME),
        column_of("seeds", (", ".join(map(str, row.seeds)) for _, row in rows), "runs"),
        Column("folders", [_folders(row, into) for _, row in rows], "runs", prose=True),
    ]
    caption = "The folders of each row's runs, from where this report lies; what a run leaves there: docs/runs.md."
    return Section("Runs", (), (Table("The runs behind each row", columns, caption),))


def _folders(row: Row, into: Path) -> Cell:
    folders = runs_of(row, into)
    return Cell(", ".join(folders), note=row.why_missing, runs=folders)
