"""Where checkpoints lie, what shape their experts have, and every way in which a checkpoint can be broken."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV32Config,
    Glm4MoeConfig,
    Qwen3MoeConfig,
)

from moeprune.errors import InputError, ModelError
from moeprune.models.adapter import moe_layers
from moeprune.models.shape import (
    ExpertShape,
    embedded_models,
    local_folder,
    read_header,
    read_shape,
    read_sizes,
    weight_files,
)

WEIGHTS = "model.safetensors"

# For what does not depend on the family.
one_model = pytest.mark.parametrize("model_name", ["deepseek_v2"])


def split_into_shards(folder):
    """Replace the one file by two shards and an index, as large checkpoints have."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / WEIGHTS).unlink()
    return [folder / file for file in shards]


def write_header(file, header: bytes, data: bytes = b""):
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture
def expected_shape(model_name):
    return ExpertShape(2, 6, 24, 2) if model_name == "deepseek_v2" else ExpertShape(2, 8, 16, 2)


def test_shape_is_read_from_a_saved_checkpoint(tiny_checkpoint, expected_shape):
    assert read_shape(tiny_checkpoint) == expected_shape


def test_shape_is_read_from_shards(tiny_checkpoint, expected_shape):
    shards = split_into_shards(tiny_checkpoint)
    assert weight_files(tiny_checkpoint) == shards
    assert read_shape(tiny_checkpoint) == expected_shape


def test_shape_is_read_from_fused_experts(tiny_model, tmp_path, expected_shape):
    """Some families store an expert axis in one tensor."""
    tiny_model.config.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    save_file(state, tmp_path / WEIGHTS)
    assert read_shape(tmp_path) == expected_shape


@one_model
@pytest.mark.parametrize("extra", ["model.layers.3", "mtp.layers.0"])
def test_layers_for_predicting_further_tokens_do_not_count(tiny_checkpoint, expected_shape, extra):
    """They lie behind the last layer or in a stack of their own, and are not loaded with the model."""
    sizes = read_sizes(tiny_checkpoint)
    more = {f"{extra}.mlp.experts.{expert}.down_proj.weight": torch.zeros(32, 24) for expert in range(6)}
    save_file({**load_file(tiny_checkpoint / WEIGHTS), **more}, tiny_checkpoint / WEIGHTS)
    assert read_shape(tiny_checkpoint) == expected_shape
    assert read_sizes(tiny_checkpoint) == sizes


@pytest.mark.parametrize("name", embedded_models())
def test_embedded_models_have_a_shape(name):
    shape = read_shape(local_folder(f"embedded:{name}"))
    assert min(shape.layers, shape.experts, shape.width, shape.top_k) > 0


# 16 experts, top-2; where there are 8 groups, of 2 neighbours each, one of them is chosen.
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 4, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "n_routed_experts": 16, "n_shared_experts": 1, "topk_group": 1, "initializer_range": 0.3,
}  # fmt: skip
LATENT_ATTENTION = {
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
DEEPSEEK = {**SMALL, **LATENT_ATTENTION}
QWEN = {"num_experts": 16, **{name: value for name, value in SMALL.items() if name in Qwen3MoeConfig().to_dict()}}


@pytest.mark.parametrize(
    ("config", "unsaid", "expected"),
    [
        (DeepseekV2Config(**DEEPSEEK, n_group=8, topk_method="group_limited_greedy"), [], True),
        (DeepseekV2Config(**DEEPSEEK, n_group=8, topk_method="greedy"), [], False),
        (DeepseekV2Config(**DEEPSEEK, n_group=8), ["topk_method"], False),
        (DeepseekV2Config(**DEEPSEEK, n_group=None), [], False),
        (DeepseekV2Config(**DEEPSEEK, n_group=1, topk_method="group_limited_greedy"), [], False),
        (DeepseekV3Config(**DEEPSEEK, n_group=8), [], True),
        (DeepseekV3Config(**DEEPSEEK, n_group=8), ["n_group"], True),
        (DeepseekV3Config(**DEEPSEEK, n_group=8, topk_method="noaux_tc"), [], True),
        (DeepseekV3Config(**DEEPSEEK, n_group=8, topk_method="greedy"), [], True),
        (DeepseekV3Config(**DEEPSEEK, n_group=1), [], False),
        (DeepseekV32Config(**{**DEEPSEEK, "q_lora_rank": 8}, n_group=8), ["n_group"], True),
        (Glm4MoeConfig(**SMALL, n_group=8), [], True),
        (Glm4MoeConfig(**SMALL, n_group=1), [], False),
        (Glm4MoeConfig(**SMALL), ["n_group"], False),
        (Qwen3MoeConfig(**QWEN), [], False),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else str(value),
)
def test_whether_routers_choose_among_groups_is_read_as_they_do_it(tmp_path, config, unsaid, expected):
    """What a config leaves out, or says to a family that does not listen, is what the family makes of it."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: said[key] for key in said if key not in unsaid}))
    layer = moe_layers(AutoModelForCausalLM.from_pretrained(tmp_path))[0]
    assert read_shape(tmp_path).routes_by_group == layer.routes_by_group == expected
    with torch.no_grad():
        _, _, experts_TK = layer.router(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)))
    group_TK = experts_TK // 2
    assert bool((group_TK[:, 0] == group_TK[:, 1]).all()) == expected


def test_headers_name_every_tensor_with_its_shape(tiny_checkpoint):
    header, tensors = read_header(tiny_checkpoint / WEIGHTS), load_file(tiny_checkpoint / WEIGHTS)
    assert {name: entry["shape"] for name, entry in header.items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }


@one_model
@pytest.mark.parametrize("left", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_a_model_error(tiny_checkpoint, left):
    file = tiny_checkpoint / WEIGHTS
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged: (?s:.*)Copy or download it again"):
        read_shape(tiny_checkpoint)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}',
        b"\xff\xfe not json at all",
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": "F32"}',
        b'["a"]',
    ],
    ids=["cut", "not text", "no offsets", "entry is no object", "no object"],
)
def test_a_corrupt_header_is_a_model_error(tmp_path, header):
    write_header(tmp_path / WEIGHTS, header, bytes(8))
    with pytest.raises(ModelError, match="is damaged"):
        read_header(tmp_path / WEIGHTS)


@one_model
def test_a_file_with_bytes_too_many_is_a_model_error(tiny_checkpoint):
    with (tiny_checkpoint / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ModelError, match="bytes were expected"):
        read_shape(tiny_checkpoint)


@one_model
def test_a_missing_shard_is_a_model_error_that_names_it(tiny_checkpoint):
    split_into_shards(tiny_checkpoint)[1].unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        read_shape(tiny_checkpoint)


@one_model
def test_missing_weights_are_a_model_error(tiny_checkpoint):
    (tiny_checkpoint / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"lacks model\.safetensors"):
        read_shape(tiny_checkpoint)


@one_model
@pytest.mark.parametrize("content", ["{", '{"metadata": {}}', "[]"])
def test_a_damaged_index_is_a_model_error(tiny_checkpoint, content):
    split_into_shards(tiny_checkpoint)
    (tiny_checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json"):
        read_shape(tiny_checkpoint)


@one_model
def test_a_missing_config_is_a_model_error(tiny_checkpoint):
    (tiny_checkpoint / "config.json").unlink()
    with pytest.raises(ModelError, match=r"is no checkpoint: it has no config\.json"):
        read_shape(tiny_checkpoint)


@one_model
def test_a_damaged_config_is_a_model_error(tiny_checkpoint):
    (tiny_checkpoint / "config.json").write_text('{"num_experts_per_tok": ')
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        read_shape(tiny_checkpoint)


@one_model
def test_a_checkpoint_without_experts_is_a_model_error_that_says_what_was_found(tiny_checkpoint):
    save_file({"model.layers.0.mlp.down_proj.weight": torch.zeros(2, 2)}, tiny_checkpoint / WEIGHTS)
    with pytest.raises(ModelError, match=r"(?s)no MoE checkpoint that can be pruned.*Found: 0 layers with experts"):
        read_shape(tiny_checkpoint)


@one_model
def test_experts_of_several_widths_are_a_model_error(tiny_checkpoint):
    tensors = load_file(tiny_checkpoint / WEIGHTS)
    name = next(name for name in tensors if name.endswith("experts.1.down_proj.weight"))
    save_file({**tensors, name: tensors[name][:, :5].contiguous()}, tiny_checkpoint / WEIGHTS)
    with pytest.raises(ModelError, match=r"widths \[5, "):
        read_shape(tiny_checkpoint)


def test_an_unknown_embedded_model_is_an_input_error_with_the_nearest_names():
    with pytest.raises(InputError, match=r"(?s)'tiny_qwen3' does not exist.*Did you mean: tiny_qwen3_moe"):
        local_folder("embedded:tiny_qwen3")


@pytest.mark.parametrize("path", ["/no/such/folder", "./checkpoints/mine", "~/nothing-here", "just-a-word", "a/b/c"])
def test_a_path_that_is_no_folder_is_an_input_error(path):
    with pytest.raises(InputError, match="is not a folder"):
        local_folder(path)


def test_a_hub_name_is_not_a_local_folder():
    assert local_folder("Qwen/Qwen1.5-MoE-A2.7B") is None
