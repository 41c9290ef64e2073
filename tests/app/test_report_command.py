"""``moeprune-report``: tables and plots of runs that somebody else started, or that drew none."""

import shutil

import pytest

from moeprune.app.report_command import run_report
from moeprune.errors import InputError


def test_jobs_of_a_sweep_draw_nothing_and_the_command_draws_what_it_shows(here, tiny):
    outcome = here("--multirun", *tiny, "ratio=0.25,0.5")
    assert outcome.code == 0
    sweep = outcome.manifests[0].parents[1]
    assert not list(sweep.glob("[01]/*.png"))
    assert run_report([str(sweep)]) == 0
    assert all((sweep / f"report.{kind}").exists() for kind in ("md", "tex", "csv", "html"))
    assert not list(sweep.glob("[01]/*.png"))
    text = (sweep / "report.md").read_text()
    assert "2 runs, 2 of them with results." in text
    (drawn,) = sweep.glob("figures/runs/*/kept_channels.svg")
    assert f"]({drawn.relative_to(sweep)})" in text


def test_of_a_run_it_prints_the_tables_of_the_run(here, tiny, capfd):
    outcome = here(*tiny, "ratio=0.5")
    run = outcome.manifests[0].parent
    for file in (*run.glob("*.png"), run / "table.md"):
        file.unlink()
    assert run_report([str(run)]) == 0
    assert "ratio 0.5: quality" in capfd.readouterr().out
    assert (run / "table.md").exists() and (run / "score_concentration.png").exists()
    assert (run / "report.html").exists()


def test_a_folder_of_neither_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no run in it or below"):
        run_report([str(tmp_path)])
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match="there is no run in it or below"):
        run_report([str(tmp_path)])


def test_several_folders_need_a_place_for_their_report(tmp_path):
    with pytest.raises(InputError, match="needs a place of its own") as raised:
        run_report([str(tmp_path / "one"), str(tmp_path / "two")])
    assert "--into FOLDER" in str(raised.value)
