"""The workspace as code: what it would save names only what runs log. Nothing is sent; the server is not there."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("wandb_workspaces")

FILE = Path(__file__).parents[2] / "sweeps" / "workspace.py"


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("workspace", FILE)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def saved(module) -> list[dict]:
    """The sections of the document that would be saved."""
    view = json.loads(module.workspace("team", "project")._to_model().model_dump_json(by_alias=True, exclude_none=True))
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "project", "moeprune")
    return view["spec"]["section"]["panelBankConfig"]["sections"]


def panels(saved, kind):
    return [panel["config"] for section in saved for panel in section["panels"] if panel["viewType"] == kind]


def test_the_front_is_perplexity_against_bytes(saved):
    first = panels(saved, "Scatter Plot")[0]
    assert (first["xAxis"], first["yAxis"]) == ("summary:final/bytes/with_overhead", "summary:final/mean_perplexity")
    assert first["xAxisLogScale"] and first["yAxisLogScale"] and first["showMinYAxisLine"]


def test_parallel_coordinates_go_from_choices_to_results(saved):
    (plot,) = panels(saved, "Parallel Coordinates Plot")
    accessors = [column["accessor"] for column in plot["columns"]]
    assert accessors[0].startswith("config:cfg") and "ratio" in accessors[0]
    assert accessors[-1] == "summary:final/mean_perplexity"


def test_heat_maps_and_loss_curves_are_there(saved):
    shown = {key for panel in panels(saved, "Media Browser") for key in panel["mediaKeys"]}
    assert "plots/kept_channels" in shown
    lines = panels(saved, "Run History Line Plot")
    assert {line["metrics"][0] for line in lines} == {"recovery/loss", "recovery/validation_loss"}
    assert {line["xAxis"] for line in lines} == {"recovery/step"}


@pytest.mark.parametrize("words", [[], ["project"], ["a/"], ["a/b", "c"]])
def test_anything_but_entity_and_project_is_explained(module, words, capsys):
    assert module.main(words) == 2
    assert "ENTITY/PROJECT" in capsys.readouterr().err
