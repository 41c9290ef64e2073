"""The experiments of the paper: the large ones as a dry run, their twins for real, though small."""

from pathlib import Path

import pytest
import yaml
from some_jobs import each_value_once

from moeprune.app import grids
from moeprune.app.launching import planned
from moeprune.app.main import config_folder

# On one worker: what one experiment computes, and what is known of the shape of a model, serves the others.
pytestmark = pytest.mark.xdist_group("paper")

PAPER = config_folder() / "experiment" / "paper"
NAMES = sorted(file.stem for file in PAPER.glob("*.yaml"))
TWINS = [name for name in NAMES if name.endswith("_embedded")]
LARGE = [name for name in NAMES if name not in TWINS]
OF_THE_PAPER = {"qwen1_5_moe_a2_7b", "deepseek_moe_16b", "deepseek_v2_lite", "qwen3_30b_a3b"}
PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
# What makes a twin's job last moments.
SMALL = [
    "calibration.windows=5", "calibration.sequence_length=32", "evaluation.windows=2", "evaluation.sequence_length=32",
    "evaluation.tasks=[]", "fewest_tokens=0",
]  # fmt: skip
SHORT_RECOVERY = ["training_data.windows=16", "recovery.training.epochs=1"]
SMALL_OF = {
    "recovery_embedded": SHORT_RECOVERY,
    "seeds_embedded": SHORT_RECOVERY,
    "speed_embedded": [
        f"evaluation.speed.{name}" for name in ("batch_size=1", "prompt_tokens=8", "new_tokens=2", "repeats=1")
    ],
    "attribution_order_embedded": ["scorer.tokens=50"],
}
# The job that is run, where it is not the last one.
TRIED = {
    "attribution_order_embedded": "scorer=true_ablation",
    "bits_and_channels_embedded": "quantizer=int8",
    "recovery_embedded": "recovery=lora",
    "speed_embedded": "method=reap",
}


@pytest.fixture
def only(monkeypatch):
    """``only(choose)``: sweeps have those of their jobs that ``choose`` leaves."""
    all_jobs = grids.jobs_of_grids

    def limit(choose) -> None:
        monkeypatch.setattr(grids, "jobs_of_grids", lambda *given: choose(all_jobs(*given)))

    return limit


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def planner() -> planned.Planner:
    """One for all experiments: what it predicts of a model holds for each."""
    return planned.Planner()


def test_every_experiment_has_a_twin():
    assert [f"{name}_embedded" for name in LARGE] == TWINS


@pytest.mark.parametrize("name", LARGE)
def test_a_large_experiment_is_sound_and_its_size_known_without_weights(here, only, planner, monkeypatch, name):
    only(each_value_once)
    monkeypatch.setattr(planned, "Planner", lambda: planner)
    command = (PAPER / f"{name}.yaml").read_text().splitlines()[1].split()  # some ask for a permission
    assert command[:3] == ["#", "moeprune", "--multirun"] and f"experiment=paper/{name}" in command
    outcome = here(*command[2:], "hydra/launcher=dry_run")
    assert outcome.code == 0, outcome.err
    assert "jobs could run" in outcome.out and not list(outcome.place.glob("runs/*"))


@pytest.mark.parametrize("name", TWINS)
def test_a_job_of_every_twin_runs(here, only, shared_cache, name):
    def one(jobs: list[list[str]]) -> list[list[str]]:
        tried = [job for job in jobs if TRIED.get(name) in (None, *job)]
        return [[*tried[-1], *SMALL, *SMALL_OF.get(name, ())]]

    only(one)
    outcome = here("--multirun", f"experiment=paper/{name}", f"cache_dir={shared_cache}")
    assert outcome.code == 0, outcome.err
    (manifest,) = outcome.manifests
    assert (manifest.parent / "metrics.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_how_many_jobs_it_has_and_the_page_names_it(name):
    text = (PAPER / f"{name}.yaml").read_text()
    sweeper = yaml.safe_load(text)["hydra"]["sweeper"]
    count = len(grids.jobs_of_grids(sweeper.get("params", {}), sweeper.get("grids"), []))
    assert f"\n# {count} jobs" in text
    assert f"experiment=paper/{name}" in PAGE.read_text()


def test_together_they_are_of_the_four_models():
    text = " ".join((PAPER / f"{name}.yaml").read_text() for name in LARGE)
    assert all(model in text for model in OF_THE_PAPER)
