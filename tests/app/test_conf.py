"""Every file in conf/ composes, and begins with a command that uses it and works."""

import itertools
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from some_jobs import each_value_once

from moeprune.app.build import build_experiment, build_optional
from moeprune.app.check import checked
from moeprune.app.grids import jobs_of_grids
from moeprune.app.main import config_folder
from moeprune.errors import InputError

CONF = config_folder()
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS = CONF / "experiment"


def choice_of(file: Path) -> tuple[str, str]:
    """(group, choice) of a file; an experiment may lie in a folder of its group."""
    group = EXPERIMENTS if EXPERIMENTS in file.parents else file.parent
    return group.relative_to(CONF).as_posix(), file.relative_to(group).with_suffix("").as_posix()


each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))


@pytest.fixture(autouse=True)
def composer() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def command_of(file: Path) -> list[str]:
    """The words of the first comment that is a command."""
    comments = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    commands = [line[2:] for line in comments if line.startswith(("# moeprune ", "# moeprune-"))]
    assert commands, f"{file} does not begin with a command"
    return shlex.split(commands[0])


def every_point(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep; of a single run, its own."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in parsed
    ]
    return [list(point) for point in itertools.product(*values)]


def without_hydra(config: DictConfig) -> DictConfig:
    """What a job gets of it."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def assert_works(config: DictConfig) -> None:
    """The config is sound; a placeholder for a checkpoint is the only thing that may be wrong with it."""
    try:
        settings = checked(config)
        build_experiment(settings)
        build_optional("tracking", settings.tracking)
    except InputError as error:
        assert "Model path '/path/to/checkpoint' is not a folder" in str(error)


@pytest.mark.parametrize("kind", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize(("words", "bits"), [("4", 4), ("3", 3), ("2", 2), ("4 quantizer.bits=5", 5)])
def test_a_quantizer_is_named_after_the_bits_that_it_has(kind, words, bits):
    choice, *overrides = words.split()
    config = compose("config", overrides=[f"quantizer={kind}{choice}", *overrides])
    assert build_optional("quantizer", config.quantizer).label == f"{kind}{bits}"


def test_the_training_config_composes():
    config = compose("train", return_hydra_config=True)
    assert config.hydra.run.dir == f"runs/train/{config.architecture}"


@each_file
def test_every_file_begins_with_a_command_that_uses_it(file):
    program, *words = command_of(file)
    if file.parent == CONF:
        assert (program, file.stem) in [("moeprune", "config"), (f"moeprune-{file.stem}", file.stem)]
    elif program != "moeprune-rerun":
        assert program == "moeprune"
        assert "=".join(choice_of(file)) in words


@each_file
def test_the_command_of_every_file_works_and_makes_its_choice(file):
    program, *words = command_of(file)
    overrides = [word for word in words if word != "--multirun"]
    if file.parent.name == "paper" and not file.stem.endswith("_embedded"):
        return  # tests/app/test_paper_experiments.py dry-runs them
    if program == "moeprune-rerun":
        return  # takes the folder of a sweep; tests/app/test_rerun.py tries it
    if program != "moeprune":
        config = compose(program.removeprefix("moeprune-"), overrides=overrides)
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        return
    made = set()
    for point in every_point(overrides):
        config = compose("config", overrides=point, return_hydra_config=True)
        made |= set(config.hydra.runtime.choices.items())
        sweeper = config.hydra.sweeper
        for job in each_value_once(jobs_of_grids(sweeper.params or {}, sweeper.get("grids"), [])):
            assert_works(compose("config", overrides=[*point, *job]) if job else without_hydra(config))
    assert file.parent == CONF or choice_of(file) in made


def test_the_default_is_a_run_that_works_and_the_demo_sweeps_two_models_and_three_methods():
    assert_works(compose("config"))
    demo = compose("config", overrides=["experiment=demo"], return_hydra_config=True)
    assert len(every_point([f"{key}={value}" for key, value in demo.hydra.sweeper.params.items()])) == 6


def test_a_method_chooses_scorer_and_allocator_and_an_experiment_its_own():
    config = compose("config", overrides=["method=frequency"], return_hydra_config=True)
    choices = config.hydra.runtime.choices
    assert (choices["scorer"], choices["allocator"]) == ("frequency", "whole_experts")
    config = compose("config", overrides=["experiment=demo", "ratio=0.25"], return_hydra_config=True)
    assert config.hydra.runtime.choices["quantizer"] == "nf4"
    assert config.ratio == 0.25
