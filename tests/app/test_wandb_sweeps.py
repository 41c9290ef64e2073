"""sweeps/*.yaml: the commands that W&B's own agent builds from them compose, and what they optimise is logged.

The agent's code is the one that is installed; the server's part, which picks values, is played here: every value of a
list, and both ends of a range.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from wandb import wandb_agent

from moeprune.app.check import checked

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
ENDS = {"int_uniform": int, "uniform": float, "log_uniform_values": float}
# What wandb's documentation allows at the top of a sweep file.
KEYS = {
    "program", "project", "entity", "name", "description", "method", "metric", "early_terminate", "run_cap",
    "parameters", "command",
}  # fmt: skip


def values(settings: dict[str, Any]) -> list[Any]:
    if "distribution" in settings:
        kind = ENDS[settings["distribution"]]
        return [kind(settings["min"]), kind(settings["max"])]
    return settings["values"] if "values" in settings else [settings["value"]]


def points(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """Each value of each parameter at least once."""
    space = {name: values(settings) for name, settings in sweep["parameters"].items()}
    longest = max(map(len, space.values()))
    return [{name: options[turn % len(options)] for name, options in space.items()} for turn in range(longest)]


@pytest.fixture
def built(tmp_path, monkeypatch):
    """``built(sweep, point)``: the words that the agent would start for a point of a sweep."""
    monkeypatch.chdir(tmp_path)
    started: list[list[str]] = []

    class Process:
        def __init__(self, command, env, forward_signals):
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    # The agent changes these, so they are put back afterwards.
    for name, value in {"DIR": str(tmp_path), "SWEEP_ID": "sweep1", "RUN_ID": "", "SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)

    def build(sweep: dict[str, Any], point: dict[str, Any]) -> list[str]:
        agent = wandb_agent.Agent(api=None, queue=None, sweep_id="sweep1")
        agent._sweep_command = list(sweep["command"])
        arguments = {name: {"value": value} for name, value in point.items()}
        agent._command_run({"run_id": "run1", "program": sweep["program"], "args": arguments})
        return started.pop()

    return build


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_command_of_the_agent_composes(file, built, monkeypatch):
    sweep = yaml.safe_load(file.read_text())
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for point in points(sweep):
            environment, program, *overrides = built(sweep, point)
            assert (environment, program) == ("/usr/bin/env", "moeprune")
            config = checked(compose("config", overrides))
            instantiate(config.allocator)  # raises for a word that it does not know
            assert config.tracking._target_ == "moeprune.app.tracking.WandbTracker"
            for name, value in point.items():
                if "." in name or name == "ratio":
                    assert_is(config, name, value)


def assert_is(config, name: str, value: Any) -> None:
    found = config
    for part in name.split("."):
        found = found[part]
    assert found == value


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_file_says_what_it_asks_and_how_it_is_started(file):
    question, command, *_ = file.read_text().splitlines()
    assert question.startswith("# ") and question.endswith("?")
    assert command == f"# wandb sweep sweeps/{file.name}"
    sweep = yaml.safe_load(file.read_text())
    assert set(sweep) <= KEYS
    assert file.name in (ROOT / "sweeps" / "README.md").read_text()


def test_early_stopping_watches_what_is_logged_in_steps():
    """Hyperband counts how often the metric was logged: only a recovery logs one again and again."""
    sweep = yaml.safe_load((ROOT / "sweeps" / "allocator_search.yaml").read_text())
    point = points(sweep)[0]
    assert sweep["metric"]["name"] == "recovery/validation_loss"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [f"{name}={value}" for name, value in point.items()])
    training = config.recovery.training
    windows = config.training_data.windows - training.validation_windows
    measured = training.epochs * windows // training.batch_size // training.validate_every_steps
    rungs = [sweep["early_terminate"]["min_iter"] * sweep["early_terminate"]["eta"] ** rung for rung in range(3)]
    assert rungs[-1] < measured
