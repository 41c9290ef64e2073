"""A checkpoint must be the one that its conf file says, and facts alone make a config."""

import json

import pytest
import torch
from families import build_family, save_as_the_hub_does
from transformers import Qwen3_5MoeConfig

from moeprune.errors import ModelError
from moeprune.models.expected import config_of, read_config, require_expected
from moeprune.models.source import ModelSource


@pytest.fixture
def folder(tmp_path):
    save_as_the_hub_does(build_family("deepseek", torch.float32), tmp_path)
    return tmp_path


def test_a_fact_that_differs_is_named_before_weights_are_read(folder):
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")
    expected = {"model_type": "deepseek", "n_routed_experts": 64}
    source = ModelSource("tiny", str(folder), "float32", "float32", 8, 8, expected=expected)
    with pytest.raises(ModelError, match="n_routed_experts 8, expected was 64"):
        source.load()


def test_a_checkpoint_as_expected_is_accepted(folder):
    require_expected(folder, None)
    require_expected(folder, {"model_type": "deepseek", "n_routed_experts": 8, "hidden_size": 32})
    with pytest.raises(ModelError, match="model_type 'deepseek', expected was 'qwen3_moe'"):
        require_expected(folder, {"model_type": "qwen3_moe"})


def test_a_fact_that_is_not_written_has_the_familys_value(folder):
    values = json.loads((folder / "config.json").read_text())
    values.pop("norm_topk_prob", None)
    (folder / "config.json").write_text(json.dumps(values))
    require_expected(folder, {"norm_topk_prob": False})


def test_of_a_model_that_also_sees_the_text_models_facts_count(tmp_path):
    Qwen3_5MoeConfig(text_config={"hidden_size": 96}).save_pretrained(tmp_path)
    assert read_config(tmp_path).hidden_size == 96
    require_expected(tmp_path, {"model_type": "qwen3_5_moe_text", "hidden_size": 96})


def test_what_cannot_be_read_or_built_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match="'no_such_family'"):
        config_of({"model_type": "no_such_family"})
