"""LaTeX: what stands in the file. That it compiles was tried by hand with pdflatex."""

from pathlib import Path

import pytest

from moeprune.report.documents.document import Document, Figure, Section
from moeprune.report.documents.latex import latex_document, latex_table, latex_text
from moeprune.report.documents.markdown import markdown_document
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table

GOLDEN = Path(__file__).parents[1] / "golden"


def table(rows: int = 2) -> Table:
    names = [Cell("he_layerwise"), Cell("50% & more"), *(Cell(f"row {number}") for number in range(2, rows))]
    numbers = [Cell("27.6 ± 0.1", best=True), Cell("-", note="run 3: failed #1"), *(Cell("1") for _ in range(2, rows))]
    seconds = [Cell("1.00", second=True), Cell("2.00"), *(Cell("1") for _ in range(2, rows))]
    return Table(
        "Main_table", [Column("method", names, ROW_NAME), Column("mean\nperplexity", numbers, "q"),
        Column("ratio", seconds, "q")], "Ratio: what was removed.", {"q": "Lower is better."},
    )  # fmt: skip


def document(folder: Path) -> Document:
    files = (folder / "figures" / "front.svg", folder / "figures" / "front.png")
    figure = Figure("The front", "Lower left is better.", files)
    section = Section("Main table", ("Is 50% too much?",), (table(),), (figure,))
    return Document("Report of paper/main_table", ("Two runs.",), (section, Section("Runs")))


def test_document_in_both_formats(tmp_path):
    assert latex_document(document(tmp_path), tmp_path) == (GOLDEN / "document.tex").read_text()
    assert markdown_document(document(tmp_path), tmp_path) == (GOLDEN / "document.md").read_text()


@pytest.mark.parametrize(
    ("plain", "written"),
    [
        ("a_b & 50% #1 $x$", r"a\_b \& 50\% \#1 \$x\$"),
        ("{x} ~ ^ \\", r"\{x\} \textasciitilde{} \textasciicircum{} \textbackslash{}"),
        ("1 < 2 > 0 ± 3", r"1 \textless{} 2 \textgreater{} 0 $\pm$ 3"),
        ("[a]", "{[}a{]}"),
        ("Ours †", r"Ours $\dagger$"),
        ("naïve 漢", "naïve ?"),
    ],
)
def test_no_character_is_taken_for_syntax(plain, written):
    assert latex_text(plain) == written


def test_every_row_has_as_many_cells_as_there_are_columns():
    lines = [line for line in latex_table(table()).splitlines() if line.endswith(r"\\")]
    assert len(lines) == 4  # two of the head, two rows
    assert {line.replace(r"\&", "").count("&") for line in lines} == {2}
    assert r"\begin{tabular}{lrr}" in latex_table(table())


def test_a_long_table_goes_on_on_the_next_page():
    text = latex_table(table(rows=100))
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    assert text.count("(continued)") == 2
    assert text.count("Ratio: what was removed.") == 1
    assert text.count("row 99") == 1


def test_letters_that_the_usual_fonts_lack_become_question_marks():
    assert latex_text("Łódź ħ ŉ ä") == "Łódź ? ? ä"
