"""A made-up report with everything that a page can hold, texts that would do harm included."""

from pathlib import Path

import pytest

from moeprune.report.documents.document import Document, Figure, Section
from moeprune.report.figures.style import empty_figure, write_figure
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

HARM = "<script>document.title = 'harmed'</script><img src=x onerror=\"document.title = 'harmed'\">"


def made_up_table() -> Table:
    """Three rows out of order, one number missing; wider than a telephone."""
    names = [Cell("reap"), Cell("moe_slimming"), Cell("frequency")]
    perplexity = [
        Cell("31.20 ± 0.40", number=31.2, second=True, runs=("sweep/0", "sweep/1")),
        Cell("9.81 ± 0.02", number=9.81, best=True, runs=("sweep/2", "sweep/3")),
        Cell("-", note=f"run 4: failed: BudgetError: {HARM}", runs=("sweep/4",)),
    ]
    tasks = [
        Column(f"a task with a long name {n}\n%", [Cell(f"{70 + row + n}.0") for row in range(3)], "tasks")
        for n in range(8)
    ]
    columns = [Column("method", names, ROW_NAME), Column("mean\nperplexity", perplexity, "perplexity"), *tasks]
    return Table("Main comparison", columns, "Bold: best.", {"tasks": "Accuracy in percent."})


def made_up_figure(folder: Path, name: str) -> Figure:
    drawing = empty_figure(4, 3)
    drawing.subplots().plot([0, 1, 2], [0, 1, 4], "o-")
    files = (folder / f"{name}.svg", folder / f"{name}.png")
    write_figure(drawing, *files)
    return Figure(name.replace("_", " "), f"What {name} shows.", files)


@pytest.fixture(scope="session")
def report_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="session")
def document(report_folder) -> Document:
    figures = tuple(made_up_figure(report_folder, name) for name in ("first_plot", "second_plot"))
    return Document(
        "A report & its <title>",
        (f"Made of what runs wrote. {HARM}",),
        (
            Section("Results", ("A sentence.",), (made_up_table(),), figures[:1]),
            Section("More", (), (), figures[1:]),
        ),
    )
