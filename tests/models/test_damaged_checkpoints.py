"""Every way in which a sharded checkpoint can be broken is a ModelError with what to do, in memory and streamed."""

import json

import pytest
import torch
from families import build_family, save_as_the_hub_does
from safetensors.torch import load_file, save_file

from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import ModelError
from moeprune.models.layers.streaming import skeleton
from moeprune.models.shape import read_shape
from moeprune.models.source import ModelSource

INDEX = "model.safetensors.index.json"
# Experts one by one, and fused, with biases.
DOWN = {
    "qwen3_moe": "model.layers.1.mlp.experts.5.down_proj.weight",
    "gpt_oss": "model.layers.1.mlp.experts.down_proj",
}


@pytest.fixture(params=DOWN)
def family(request):
    return request.param


@pytest.fixture(params=["never", "always"])
def load(request, tmp_path):
    """``load()`` the checkpoint in ``tmp_path``, in memory or streamed; every weight is read."""

    def load():
        source = ModelSource("test", str(tmp_path), "float32", "float32", 8, 8, device="cpu", streaming=request.param)
        model = source.load()
        for depth in range(2 if request.param == "always" else 0):
            with model.resident(depth):
                pass
        return model

    return load


@pytest.fixture
def folder(family, tmp_path):
    save_as_the_hub_does(build_family(family, torch.float32), tmp_path)
    return tmp_path


def file_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change_tensor(folder, name, change):
    """Replace a tensor in its shard by ``change`` of it; None takes it out."""
    file = file_of(folder, name)
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, file)


def assert_refused(load, match):
    with pytest.raises(ModelError, match=match):
        load()


def test_a_sound_checkpoint_is_loaded(folder, load):
    load()


@pytest.mark.parametrize("left", [4, 100, -1])
def test_a_truncated_shard_is_refused(folder, load, family, left):
    file = file_of(folder, DOWN[family])
    file.write_bytes(file.read_bytes()[:left])
    assert_refused(load, rf"{file.name} is damaged(?s:.*)Copy or download it again")


def test_a_missing_shard_is_refused_by_its_name(folder, load, family):
    file = file_of(folder, DOWN[family])
    file.unlink()
    assert_refused(load, rf"lacks {file.name}")


def test_a_shard_that_lacks_a_tensor_is_refused(folder, load, family):
    change_tensor(folder, DOWN[family], lambda _: None)
    assert_refused(load, r"cannot be loaded")


def test_an_index_that_leaves_out_a_shard_is_refused(folder, load, family):
    index = json.loads((folder / INDEX).read_text())
    gone = index["weight_map"][DOWN[family]]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != gone}
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(load, r"cannot be loaded(?s:.*)model\.layers\.1\.mlp")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(folder, load, content):
    (folder / INDEX).write_text(content)
    assert_refused(load, rf"{INDEX} is damaged")


def test_a_tensor_of_another_shape_is_refused(folder, load, family):
    change_tensor(folder, DOWN[family], lambda tensor: tensor[..., :-1])
    assert_refused(load, r"cannot be loaded")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_another_shape_than_the_config_says_is_refused_everywhere(folder, load, name):
    change_tensor(folder, name, lambda tensor: tensor[:-3])
    assert_refused(load, r"cannot be loaded")


def test_a_model_type_that_nobody_knows_is_refused(folder, load):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobody_moe"}))
    assert_refused(load, "of the family 'nobody_moe', which transformers does not have")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_checkpoints_in_every_precision_are_loaded(family, load, tmp_path, random_windows, dtype):
    save_as_the_hub_does(build_family(family, dtype), tmp_path)
    assert read_shape(tmp_path).width == 24
    model = load()
    assert skeleton(model).dtype == torch.float32
    statistics = collect_statistics(model, random_windows, batch_size=2)
    assert torch.isfinite(statistics.attribution_sum_LEC).all()
