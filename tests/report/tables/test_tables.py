"""The column model: splitting, Markdown, terminal."""

import io

from rich.console import Console

from moeprune.report.tables.table import ROW_NAME, Cell, Column, Table, markdown, parts, print_table


def column(head: str, *texts: str, group: str, prose: bool = False) -> Column:
    return Column(head, [Cell(text) for text in texts], group, prose)


def wide_table() -> Table:
    numbers = [column(f"number {i}", "1.00", group="numbers") for i in range(8)]
    sizes = [column(f"size {i}", "2.00", group="sizes") for i in range(8)]
    return Table("All", [column("row", "a", group=ROW_NAME), *numbers, *sizes], "Of both.", {"sizes": "Of sizes."})


def test_a_narrow_table_stays_whole_with_all_captions():
    (part,) = parts(wide_table(), width=1000)
    assert (part.title, part.caption) == ("All", "Of both. Of sizes.")


def test_a_wide_table_is_split_by_group_and_loses_no_column():
    split = parts(wide_table(), width=60)
    heads = [column.head for part in split for column in part.columns]
    assert set(heads) == {column.head for column in wide_table().columns}
    assert heads.count("row") == len(split)
    assert [part.title for part in split] == [
        "All: numbers (1 of 2)",
        "All: numbers (2 of 2)",
        "All: sizes (1 of 2)",
        "All: sizes (2 of 2)",
    ]
    assert [part.caption for part in split] == ["", "Of both.", "", "Of both. Of sizes."]


def test_markdown_marks_best_and_keeps_text_out_of_the_syntax():
    table = Table(
        "T",
        [
            column("run", "a|b", "<c>", group=ROW_NAME),
            Column("mean\nperplexity", [Cell("9.00", best=True), Cell("10.00")], "g"),
        ],
        "Caption.",
    )
    assert markdown(table) == (
        "### T\n"
        "\n"
        "| run    | mean perplexity |\n"
        "| ------ | --------------: |\n"
        "| a\\|b   |        **9.00** |\n"
        "| &lt;c> |           10.00 |\n"
        "\n"
        "Caption.\n"
    )


def test_the_terminal_shows_every_character_at_any_width():
    message = "failed: BudgetError: [bold]ratio 0.99[/] keeps fewer experts than top-k needs"
    table = Table(
        "T",
        [
            column("run", "a_run_with_a_rather_long_name", group=ROW_NAME),
            column("perplexity", "12.34", group="g"),
            column("status", message, group="g", prose=True),
        ],
        "Caption.",
    )
    for width in (200, 70, 30):
        terminal = io.StringIO()
        print_table(table, Console(width=width, file=terminal))
        shown = terminal.getvalue()
        assert max(len(line) for line in shown.splitlines()) <= width
        assert "…" not in shown
        letters = "".join(shown.split())
        for text in ("failed:", "[bold]ratio", "12.34"):
            assert text in letters


def test_second_best_and_notes_are_marked_on_paper_and_in_the_terminal():
    cells = [
        Cell("1.00", best=True),
        Cell("2.00", second=True),
        Cell("-", note="failed: <oom>"),
        Cell("-", note="late"),
    ]
    more = [Cell("3.00"), Cell("4.00", note="late"), Cell("5.00"), Cell("6.00")]
    table = Table("T", [Column("a", cells, ROW_NAME), Column("b", more, "g")], "Caption.")
    assert markdown(table) == (
        "### T\n"
        "\n"
        "| a           |      b |\n"
        "| ----------- | -----: |\n"
        "| **1.00**    |   3.00 |\n"
        "| <u>2.00</u> | 4.00 ¹ |\n"
        "| - ²         |   5.00 |\n"
        "| - ¹         |   6.00 |\n"
        "\n"
        "Caption.\n"
        "\n"
        "¹ late\n"
        "\n"
        "² failed: &lt;oom>\n"
    )
    terminal = io.StringIO()
    print_table(table, Console(width=60, file=terminal))
    assert "4.00 ¹" in terminal.getvalue()
    assert "² failed: <oom>" in terminal.getvalue()
