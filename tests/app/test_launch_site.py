"""The site file: what it sets, what goes before it, and what is said of a wrong one."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from moeprune.app.launching.site import KEYS, site_file, site_settings
from moeprune.app.main import config_folder
from moeprune.errors import InputError

SITE = """
partition: gpu
timeout_min: 30
setup: [module load cuda]
profiles:
  slurm_cpu:
    partition: cpu
    cpus_per_task: 3
  slurm_one_gpu:
"""


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    file = tmp_path / "site.yaml"
    file.write_text(SITE)
    monkeypatch.setenv("MOEPRUNE_SITE", str(file))
    return file


def launcher(*overrides: str) -> dict:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return OmegaConf.to_container(config.hydra.launcher, resolve=True)


def test_a_profile_takes_its_own_part_of_the_file_before_the_general_one(site):
    settings = launcher("hydra/launcher=slurm_cpu")
    assert (settings["partition"], settings["cpus_per_task"], settings["mem_gb"]) == ("cpu", 3, 32)
    settings = launcher("hydra/launcher=slurm_one_gpu")
    assert (settings["partition"], settings["timeout_min"], settings["gpus_per_node"]) == ("gpu", 30, 1)


def test_the_command_line_goes_before_the_file(site):
    assert launcher("hydra/launcher=slurm", "hydra.launcher.timeout_min=7")["timeout_min"] == 7


def test_without_a_file_the_defaults_hold(monkeypatch):
    monkeypatch.setenv("MOEPRUNE_SITE", "/dev/null")
    settings = launcher("hydra/launcher=slurm")
    assert (settings["partition"], settings["timeout_min"], settings["requeue"]) == (None, 240, True)
    assert launcher("hydra/launcher=slurm_node_8")["tasks_per_node"] == 8


def test_every_key_of_the_file_is_read_by_the_launcher():
    text = (config_folder() / "hydra/launcher/slurm.yaml").read_text()
    added_in_code = {"setup", "srun_args", "additional_parameters"}
    assert {key for key in KEYS if f"${{site:{key}," not in text} == added_in_code


def test_the_usual_place_is_the_users_configuration_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MOEPRUNE_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert site_file() is None
    assert site_settings("slurm") == {}
    usual = tmp_path / "moeprune/site.yaml"
    usual.parent.mkdir()
    usual.write_text("account: mine")
    assert site_settings("slurm") == {"account": "mine"}


def test_the_example_is_a_site_file(monkeypatch):
    example = config_folder().parent / "slurm/site_example.yaml"
    monkeypatch.setenv("MOEPRUNE_SITE", str(example))
    assert {"partition", "account"} <= set(site_settings("slurm_one_gpu"))
    assert set(yaml.safe_load(example.read_text())["profiles"]) <= {
        file.stem for file in (config_folder() / "hydra/launcher").glob("slurm*.yaml")
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partiton: gpu", "partiton.\nDid you mean: partition"),
        ("profiles: {slurm_cpu: {mem: 3}}", "profiles.slurm_cpu.mem"),
        ("- partition", "the file is not a mapping"),
        ("profiles: [slurm]", "profiles is not a mapping"),
        ("profiles: {slurm: gpu}", "profiles.slurm is not a mapping"),
        ("profiles: {slum: {partition: gpu}}", "no launcher slum.\nDid you mean: slurm"),
        ("partition: [gpu", "cannot be read"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(site, text, said):
    site.write_text(text)
    with pytest.raises(InputError) as caught:
        site_settings("slurm")
    assert said in str(caught.value)


def test_a_file_that_is_named_but_missing_is_an_error(monkeypatch):
    monkeypatch.setenv("MOEPRUNE_SITE", "/no/such/site.yaml")
    with pytest.raises(InputError, match=r"/no/such/site.yaml cannot be read: .*\nCorrect it"):
        site_settings("slurm")
