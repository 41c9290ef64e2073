"""The report as one page of HTML."""

import base64
import hashlib
import re
from dataclasses import replace

import pytest

from moeprune.report.documents.document import Document, Section
from moeprune.report.documents.html.page import html_page
from moeprune.report.documents.html.rows import page_table
from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table


@pytest.fixture(scope="module")
def page(document, report_folder):
    return html_page(document, report_folder)


def test_nothing_is_loaded_from_elsewhere(page):
    assert not re.findall(r"<(?:link|script|img|iframe|object|embed)[^>]*\b(?:src|href)=\"(?!data:)", page)
    assert "@import" not in page and not re.findall(r"url\((?!#)", page.replace('xlink:href="', ""))


def test_the_policy_allows_only_the_scripts_and_styles_of_the_page(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1).replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
    assert not re.search(r"<[^>]+ style=", page) and not re.search(r"<[^>]+ on\w+=", page)


def test_every_text_is_escaped(page):
    assert "<title>A report &amp; its &lt;title&gt;</title>" in page
    assert page.count("<script>") == 2  # ours
    assert "<img" not in page
    assert "&lt;script&gt;document.title" in page


def test_ids_are_unique_and_links_lead_to_them(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="#|popovertarget="|aria-describedby=")([^"]+)"', page)
    assert targets and set(targets) <= set(ids)


def test_runs_and_files_are_linked_beside_the_page(page):
    for address in ("./sweep/0", "./sweep/4", "./first_plot.svg", "./second_plot.png"):
        assert f'<a href="{address}">' in page


def test_files_in_another_folder_are_reached_from_the_page(document, report_folder):
    page = html_page(document, report_folder / "elsewhere")
    assert '<a href="./../first_plot.svg">first_plot.svg</a>' in page


def test_best_and_second_best_are_told_without_colour(page):
    assert "<strong>9.81 ± 0.02</strong>" in page and "<u>31.20 ± 0.40</u>" in page


def test_it_stays_small_with_ten_figures_and_three_hundred_rows(document, report_folder):
    row = [Cell("12.34 ± 0.05", number=12.34, runs=("sweep/0", "sweep/1", "sweep/2"))] * 300
    table = Table("Long", [Column("name", row, ROW_NAME), *[Column(f"column {n}", row, "all") for n in range(12)]], "")
    long = Document("Long", (), (Section("All", (), (table,), document.sections[0].figures * 10),))
    assert len(html_page(long, report_folder)) < 2_000_000


def test_cells_sort_by_their_number_else_by_the_one_they_begin_with():
    cells = [
        Cell("27.62 ± 0.11", number=27.619), Cell("1,024.5x"), Cell("-"), Cell("nf4"), Cell("inf", number=float("inf")),
        Cell("?", number=float("nan")), Cell("-3.5"), Cell("25% nf4"),
    ]  # fmt: skip
    table = page_table(Table("t", [Column("c", cells, "g")], ""), "t")
    orders = [row.cells[0].order for row in table.rows]
    assert orders == ["27.619", "1024.5", None, None, "Infinity", None, "-3.5", "25"]


def test_runs_are_told_once_where_the_whole_row_has_the_same():
    runs = ("sweep/a b", "sweep/1")
    columns = [Column("method", [Cell("m", runs=runs)], ROW_NAME), Column("p\nq", [Cell("1", runs=runs)], "g")]
    (row,) = page_table(Table("t", columns, ""), "t").rows
    (told,) = row.runs
    assert told.head == "" and [link.address for link in told.links] == ["./sweep/a%20b", "./sweep/1"]
    columns[1] = replace(columns[1], cells=[Cell("1", runs=runs[:1])])
    (row,) = page_table(Table("t", columns, ""), "t").rows
    assert [told.head for told in row.runs] == ["method", "p q"]
    assert row.run_count == 2


def test_a_run_can_not_pretend_to_be_a_script():
    columns = [Column("method", [Cell("m", runs=("javascript:alert(1)",))], ROW_NAME)]
    (row,) = page_table(Table("t", columns, ""), "t").rows
    assert row.runs[0].links[0].address == "./javascript%3Aalert%281%29"


def test_groups_of_columns_have_a_head_of_their_own():
    columns = [
        Column(head, [Cell("1")], group) for head, group in (("m", ROW_NAME), ("a", "x"), ("b", "x"), ("c", "y"))
    ]
    table = page_table(Table("t", columns, "A.", {"y": "C.", "z": "no such"}), "t")
    assert [(group.name, group.span) for group in table.groups] == [("", 1), ("x", 2), ("y", 1)]
    assert table.captions == ("A.", "C.")
    assert page_table(Table("t", columns[:3], ""), "t").groups == ()
