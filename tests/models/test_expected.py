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


def test_code_in_a_checkpoint_is_neither_run_nor_offered_to_be_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")
    (tmp_path / "code.py").write_text("raise SystemExit('this was run')")
    config = {"model_type": "of_nobody", "auto_map": {"AutoConfig": "code.TheirConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"of_nobody.*\n.*code of a checkpoint is never run"):
        read_config(tmp_path)


def test_a_tokenizer_of_other_code_is_neither_run_nor_offered(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "y")
    (folder / "code.py").write_text("raise SystemExit('this was run')")
    tokenizer = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["code.Theirs", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="tokenizer"):
        ModelSource("tiny", str(folder), "float32", "float32", 8, 8).tokenizer()


def test_a_pruned_checkpoint_is_said_to_be_one(tmp_path):
    config = {"model_type": "pruned_qwen3_moe", "auto_map": {"AutoConfig": "code.TheirConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for streaming in ("always", "never"):
        source = ModelSource("pruned", str(tmp_path), "float32", "float32", 8, 8, streaming=streaming)
        for read in (source.load, source.tokenizer):
            with pytest.raises(ModelError, match="pruned already"):
                read()


def test_what_cannot_be_read_or_built_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        read_config(tmp_path)
    for text in ("[]", "{", "{}", '{"model_type": 5}', '{"model_type": "qwen3_moe", "hidden_size": "wide"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError):
            read_config(tmp_path)
    with pytest.raises(ModelError, match="'no_such_family'"):
        config_of({"model_type": "no_such_family"})
