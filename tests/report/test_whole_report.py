"""The report over runs: against golden files from fixed manifests, and what it makes of half-finished sweeps."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from moeprune.report import whole_report
from moeprune.report.published.results import PublishedExperiment
from moeprune.report.runs.results import load_runs
from moeprune.report.whole_report import Part, parts_of, write_whole_report

GOLDEN = Path(__file__).parent / "golden"
EXPERIMENT = "paper/granularity_embedded"


@pytest.fixture
def sweep(tmp_path, write_run):
    """Three methods and three seeds; one job failed and one has not begun."""
    number, jobs = 0, []
    for method, harm in (("moe_slimming", 1.0), ("mone", 1.5), ("he_layerwise", 2.0)):
        for seed in (0, 1, 2):
            overrides = (
                "model=tiny_qwen3_moe", f"method={method}", "ratio=0.375", "quantizer=none", f"seed={seed}",
                f"experiment={EXPERIMENT}",
            )  # fmt: skip
            jobs.append({"number": number, "folder": str(number), "overrides": overrides})
            more = {0: 0.0, 1: 0.1, 2: 0.3 * harm}[seed]
            if number == 7:
                error = ("BudgetError", "ratio 0.375 leaves 3 experts,\nwhich is too few.")
                write_run(tmp_path / "7", error=error, overrides=overrides)
            elif number != 8:
                write_run(
                    tmp_path / str(number), overrides=overrides, method=method, harm=harm + more, ratio=0.375,
                    quantizer="none", seed=seed, experiment=EXPERIMENT,
                    allocator="coverage" if method == "moe_slimming" else "whole_experts",
                )  # fmt: skip
            number += 1
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return tmp_path


def silent() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_markdown_and_csv_are_the_golden_ones(sweep, monkeypatch):
    monkeypatch.setattr(whole_report, "_figures", lambda *_: ())
    console = silent()
    written = write_whole_report([sweep], sweep, console)
    assert [path.name for path in written] == ["report.md", "report.tex", "report.html", "report.csv"]
    assert (sweep / "report.md").read_text() == (GOLDEN / "report.md").read_text()
    assert (sweep / "report.csv").read_text() == (GOLDEN / "report.csv").read_text()
    shown = console.file.getvalue()
    assert "Channels against whole experts" in shown and str(sweep / "report.html") in shown


def test_figures_are_drawn_and_linked(sweep):
    written = write_whole_report([sweep], sweep / "there", silent())
    drawn = [path for path in written if path.suffix in (".svg", ".png")]
    assert drawn and all(path.exists() for path in drawn)
    text = (sweep / "there" / "report.md").read_text()
    assert "](figures/paper_granularity_embedded/perplexity_by_size.svg)" in text
    assert "../0, ../1, ../2" in text
    assert "includegraphics" in (sweep / "there" / "report.tex").read_text()


def test_the_plan_that_is_drawn_of_a_model_is_one_that_removed_something(tmp_path, write_run, made_up_diagnostics):
    for number, ratio in enumerate((0, 0.5)):
        folder = write_run(tmp_path / str(number), ratio=ratio)
        (folder / "diagnostics.json").write_text(json.dumps(made_up_diagnostics))
    write_whole_report([tmp_path], tmp_path / "there", silent())
    text = (tmp_path / "there" / "report.md").read_text()
    assert "Run 1: moe_slimming at ratio 0.5." in text
    assert "Run 0:" not in text


def test_the_csv_is_tidy_and_traceable(sweep, monkeypatch):
    monkeypatch.setattr(whole_report, "_figures", lambda *_: ())
    write_whole_report([sweep], sweep, silent())
    rows = list(csv.DictReader((sweep / "report.csv").open(newline="")))
    keys = [(row["method"], row["measure"]) for row in rows]
    assert len(set(keys)) == len(keys)
    ours = next(row for row in rows if (row["method"], row["measure"]) == ("moe_slimming", "mean_perplexity"))
    assert (ours["n"], ours["seeds"], ours["runs"], ours["bits"]) == ("3", "0 1 2", "0; 1; 2", "16.0")
    values = [25 * (1 + harm * 0.375**2) for harm in (1.0, 1.1, 1.3)]
    assert float(ours["mean"]) == pytest.approx(sum(values) / 3)
    theirs = next(row for row in rows if (row["method"], row["measure"]) == ("he_layerwise", "mean_perplexity"))
    assert (theirs["n"], theirs["std"], theirs["runs"]) == ("1", "", "6; 7; 8")


def test_published_numbers_are_in_the_csv(tmp_path, write_run, monkeypatch):
    monkeypatch.setattr(whole_report, "_figures", lambda *_: ())
    tasks = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "boolq", "winogrande")
    write_run(
        tmp_path / "0", model="qwen1_5_moe_a2_7b", method="mone", ratio=0.25, quantizer="none", tasks=tasks,
        experiment="paper/granularity",
    )  # fmt: skip
    write_whole_report([tmp_path], tmp_path, silent())
    rows = list(csv.DictReader((tmp_path / "report.csv").open(newline="")))
    row = next(row for row in rows if (row["method"], row["measure"]) == ("mone", "accuracy.boolq"))
    assert (row["published"], row["published_table"]) == ("71.53", "Tab. R11")
    assert float(row["difference"]) == pytest.approx(float(row["mean"]) - 71.53)
    assert float(row["stderr"]) == pytest.approx(2 / 2**4)


def test_experiments_are_apart_and_runs_of_none_come_last(tmp_path, write_run):
    write_run(tmp_path / "single")
    write_run(tmp_path / "a" / "0", experiment="demo")
    write_run(tmp_path / "b" / "0", experiment="paper/seeds")
    write_run(tmp_path / "b" / "1", error=("OSError", "disk"), overrides=("experiment=paper/seeds",))
    warm = write_run(tmp_path / "c" / "0", experiment="demo", seed=1)
    manifest = json.loads((warm / "manifest.json").read_text()) | {"until": "statistics"}
    (warm / "manifest.json").write_text(json.dumps(manifest))
    parts = parts_of(load_runs([tmp_path]))
    assert [(part.name, part.about.title) for part in parts] == [
        ("demo", "demo"),
        ("paper/seeds", "Seeds"),
        ("", "Runs"),
    ]
    assert [len(part.runs) for part in parts] == [1, 2, 1]


def test_a_sweep_in_which_all_failed_is_reported(tmp_path, write_run):
    write_run(tmp_path / "0", error=("BudgetError", "too much"), overrides=("method=reap", "ratio=0.99"))
    write_whole_report([tmp_path], tmp_path, silent())
    text = (tmp_path / "report.md").read_text()
    assert "1 runs, 0 of them with results. Failed: 0." in text
    assert "¹ run 0: failed: BudgetError: too much" in text


def test_runs_that_another_one_replaces_are_named(tmp_path, write_run, monkeypatch):
    monkeypatch.setattr(whole_report, "_figures", lambda *_: ())
    for name, when in (("0", "2025-01-01"), ("1", "2025-01-02")):
        folder = write_run(tmp_path / name)
        manifest = json.loads((folder / "manifest.json").read_text()) | {"updated": when}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    write_whole_report([tmp_path], tmp_path, silent())
    assert "same settings and seed was written later: 0." in (tmp_path / "report.md").read_text()


def test_experiments_of_like_names_draw_into_folders_of_their_own():
    def slug(name):
        return Part(name, PublishedExperiment("", "", ()), (), (), (), ()).slug

    names = ["", "runs", "mine/a", "mine_a", "mine a", "paper/main_table", "50% #2"]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("paper/main_table") == "paper_main_table" and slug("") == "runs"
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", slug(name)) for name in names)
