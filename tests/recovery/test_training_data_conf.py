"""The choices of training data: a local file has no other data to fall back on."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"


def records_of(choice) -> dict:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("config", [f"training_data={choice}"])
    return OmegaConf.to_container(config.training_data.records)


@pytest.mark.parametrize("choice", ["json_file", "chat_file"])
def test_a_local_file_is_asked_for(choice):
    """A path that is missing must not be inherited from a data set on the hub: OmegaConf keeps what is there."""
    assert records_of(choice)["path"] == "???"


@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ("alpaca", "tatsu-lab/alpaca"),
        ("alpaca_cleaned", "yahma/alpaca-cleaned"),
        ("dolly", "databricks/databricks-dolly-15k"),
        ("tulu_3", "allenai/tulu-3-sft-mixture"),
    ],
)
def test_data_sets_have_their_names(choice, path):
    assert records_of(choice)["path"] == path
