"""Which matrices are chosen, and how few words say how they are kept."""

import pytest
import torch
from families import build_family
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moeprune.errors import InputError, ModelError
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.grouping import common_prefixes
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.parts import part_of_modules
from moeprune.models.runtime.structure import nearest
from moeprune.surgery.prune import prune
from moeprune.types import Plan

SWITCHES = ("routed_experts", "shared_experts", "attention", "dense_mlp", "embeddings", "head")
NOTHING = dict.fromkeys(SWITCHES, False)


@pytest.fixture
def pruned():
    """A family that has every part; its head is not tied."""
    model = build_family("deepseek_v3", torch.float32)
    layers = moe_layers(model)
    width = layers[0].widths[0]
    kept = tuple(tuple(torch.arange(width) for _ in range(layer.expert_count)) for layer in layers)
    return prune(model, Plan(kept, width))


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_chooses_its_part_alone(pruned, switch):
    names = QuantizedParts(**NOTHING | {switch: True}).names(pruned)
    assert names
    assert {part_of_modules(pruned)[name] for name in names} == {switch.replace("_", " ")}
    assert all(pruned.get_submodule(name) is module for name, module in names.items())


def test_all_switches_choose_everything_linear_but_routers(pruned):
    everything = {name for name, module in pruned.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    assert QuantizedParts(**dict.fromkeys(SWITCHES, True)).names(pruned).keys() == everything
    assert QuantizedParts().names(pruned).keys() == everything - {"lm_head", "model.embed_tokens"}
    routers = [layer.router for layer in moe_layers(pruned)]
    assert not any(isinstance(router, nn.Linear) for router in routers)


def test_fused_experts_are_no_linear_layers():
    names = QuantizedParts().names(build_family("qwen3_moe", torch.float32))
    assert names and not any(".experts." in name for name in names)


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"parts are all false(.|\n)*quantizer=none"):
        QuantizedParts(**NOTHING)


@pytest.mark.parametrize("cut", [False, True])
def test_a_selection_of_parts_that_the_model_does_not_have_is_refused(build_model, cut):
    model = build_model("qwen3_renormalised", torch.float32)
    if cut:
        prune(model, Plan(tuple(tuple(torch.arange(16) for _ in range(8)) for _ in moe_layers(model)), 16))
    with pytest.raises(InputError, match=r"Qwen3MoeForCausalLM has no dense mlp, shared experts(.|\n)*attention"):
        QuantizedParts(**NOTHING | {"shared_experts": True, "dense_mlp": True}).names(model)
    some = QuantizedParts(**NOTHING | {"shared_experts": True, "routed_experts": True}).names(model)
    assert len(some) == (2 * 8 * 3 if cut else 0)  # fused experts are no linear layers, but they are there


@pytest.mark.parametrize("chosen", [{"embeddings": True}, {"head": True}])
def test_a_tied_table_and_head_are_chosen_together(build_model, chosen):
    model = build_model("qwen3_renormalised", torch.float32)
    with pytest.raises(InputError, match=r"head of Qwen3MoeForCausalLM is its embedding table(.|\n)*Set both"):
        QuantizedParts(**chosen).names(model)
    both = QuantizedParts(**NOTHING | {"embeddings": True, "head": True}).names(model)
    assert both.keys() == {"model.embed_tokens", "lm_head"}


def test_a_table_of_another_kind_is_refused(pruned):
    class Scaled(nn.Embedding):
        pass

    pruned.set_input_embeddings(Scaled(257, 32))
    with pytest.raises(ModelError, match=r"parts\.embeddings=True is not possible"):
        QuantizedParts(embeddings=True).names(pruned)


KEPT = st.sampled_from([None, {"bits": 2, "rounding": "gptq"}, {"bits": 2, "rounding": "nearest"}, {"bits": 4}])
PATHS = st.from_regex(r"top(\.[a-c]){0,2}\.[0-9]\.(up|down)", fullmatch=True)


@given(st.dictionaries(PATHS, KEPT, max_size=20))
def test_the_longest_name_gives_what_each_matrix_has(settings_of):
    entries = common_prefixes(settings_of, "top")
    assert {name: entries.get(nearest(name, entries)) for name in settings_of} == settings_of


def test_what_most_have_is_said_once():
    few, most = {"bits": 4, "rounding": "nearest"}, {"bits": 4, "rounding": "gptq"}
    experts = {f"layer.experts.{e}.{part}": few if e == 3 else most for e in range(8) for part in ("up", "down")}
    assert common_prefixes(experts, "layer") == {"layer": most, "layer.experts.3": few}
    with_plain = common_prefixes(experts | {"layer.attention": None}, "layer")
    assert with_plain == {"layer.experts": most, "layer.experts.3": few}
