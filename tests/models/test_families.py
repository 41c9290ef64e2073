"""Every family: its experts are found, keep the contract, compute what transformers computes, and what cannot be pruned
is refused with a reason."""

import copy
import json

import pytest
import torch
from families import FAMILIES, build_family, save_as_the_hub_does
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MiniMaxM2Config, NemotronHConfig

from moeprune.errors import ModelError
from moeprune.models.adapter import decoder_layers, moe_layers, recorded_routing
from moeprune.models.families import to_contract
from moeprune.models.runtime.dispatch import dispatch
from moeprune.models.shape import ExpertShape, read_shape, read_sizes

COARSE = ("mixtral", "phimoe", "gpt_oss", "llama4", "minimax", "granitemoe")
# transformers computes this family's gates in float32, whatever the model's precision.
TOLERANCE = {"llama4": 1e-5}
EXACT = 1e-12
INDEX = "model.safetensors.index.json"

every_family = pytest.mark.parametrize("family", FAMILIES)


def moe_layer_count(family):
    return 1 if family in ("qwen2_moe", "ernie4_5_moe") else 2


def logits_of(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


@every_family
def test_all_experts_are_found_with_their_shape(family):
    model = build_family(family)
    to_contract(model)
    layers = moe_layers(model)
    assert len(layers) == moe_layer_count(family)
    for layer in layers:
        experts, top_k = (6, 2) if family in COARSE else (8, 3)
        assert (layer.expert_count, layer.widths, layer.top_k) == (experts, (24,) * experts, top_k)
        assert (layer.hidden_size, layer.gates_inputs, layer.routes_by_group) == (32, family == "llama4", False)
        assert model.get_submodule(layer.name) is layer.experts
        assert layer.experts.gate_up_proj.shape == (experts, 48, 32)
        assert layer.experts.down_proj.shape == (experts, 32, 24)


@every_family
def test_a_model_brought_to_the_contract_computes_what_it_did(family, random_windows):
    model = build_family(family)
    expected = logits_of(model, random_windows.input_ids_NT)
    to_contract(model)
    tolerance = TOLERANCE.get(family, EXACT)
    torch.testing.assert_close(logits_of(model, random_windows.input_ids_NT), expected, atol=tolerance, rtol=tolerance)


@every_family
def test_a_single_layer_is_brought_to_the_contract_on_any_device(family):
    """What streaming does: one layer at a time, and the others on the meta device, with the same names and shapes."""
    whole, by_layer, empty = build_family(family), build_family(family), build_family(family).to("meta")
    to_contract(whole)
    for _, layer in decoder_layers(by_layer):
        to_contract(layer)
    to_contract(empty)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in by_layer.state_dict().items())
    assert {name: value.shape for name, value in empty.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert all(value.is_meta for value in empty.state_dict().values())


@every_family
def test_bringing_to_the_contract_twice_changes_nothing(family):
    model = build_family(family)
    to_contract(model)
    modules = dict(model.named_modules())
    to_contract(model)
    assert dict(model.named_modules()) == modules


@every_family
def test_the_routed_output_is_the_sum_of_gated_experts(family, random_windows, seen_layers):
    """Router and experts keep the contract: top-k experts per token, gates as the family finally applies them."""
    model = build_family(family)
    to_contract(model)
    with seen_layers(model) as seen:
        model(random_windows.input_ids_NT)
    for call in seen:
        layer = call.layer
        assert call.logits_TE.shape == (55, layer.expert_count)
        assert call.gates_TK.shape == call.experts_TK.shape == (55, layer.top_k)
        routed = dispatch(call.experts_TK, call.gates_TK, layer.expert_count, layer.gates_inputs)
        assert sum(routed.counts) == 55 * layer.top_k
        one_by_one = torch.zeros_like(call.m_TH)
        for place in range(layer.top_k):
            chosen, gates = call.experts_TK[:, [place]], call.gates_TK[:, [place]]
            with torch.no_grad():
                one_by_one += layer.experts(call.x_TH, chosen, gates)
        torch.testing.assert_close(one_by_one, call.m_TH, atol=EXACT, rtol=1e-7)


@every_family
def test_the_checkpoint_tells_the_shape_that_the_model_has(family, tmp_path):
    """Sharded, under the hub's keys; read without loading anything."""
    model = build_family(family)
    save_as_the_hub_does(model, tmp_path)
    assert (tmp_path / INDEX).exists()
    to_contract(model)
    layers = moe_layers(model)
    expected = ExpertShape(len(layers), layers[0].expert_count, 24, layers[0].top_k, layers[0].routes_by_group)
    assert read_shape(tmp_path) == expected
    sizes = read_sizes(tmp_path)
    assert sizes.total_parameters == sum(values.numel() for values in model.state_dict().values())
    assert sizes.routed_parameters == sum(
        values.numel() for layer in layers for values in layer.experts.state_dict().values()
    )


@every_family
def test_loading_the_checkpoint_gives_the_same_model(family, tmp_path, random_windows):
    model = build_family(family)
    save_as_the_hub_does(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    torch.testing.assert_close(
        logits_of(loaded.eval(), random_windows.input_ids_NT),
        logits_of(model, random_windows.input_ids_NT),
        atol=EXACT,
        rtol=EXACT,
    )


def test_experts_stored_one_by_one_are_read_in_numerical_order(tmp_path):
    """Twelve experts: in the order of their names the eleventh would come second."""
    model = build_family("qwen3_moe", num_experts=12)
    save_as_the_hub_does(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for wanted, got in zip(moe_layers(model), moe_layers(loaded), strict=True):
        assert torch.equal(wanted.experts.down_proj, got.experts.down_proj)


def test_gates_of_llama_4_scale_the_inputs(random_windows):
    model = build_family("llama4")
    to_contract(model)
    layer = moe_layers(model)[0]
    x_TH = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates, expert = torch.full((5, 1), 0.25, dtype=torch.float64), torch.full((5, 1), 3)
    with torch.no_grad():
        scaled = layer.experts(0.25 * x_TH, expert, torch.ones_like(gates))
        torch.testing.assert_close(layer.experts(x_TH, expert, gates), scaled, atol=EXACT, rtol=EXACT)
        with recorded_routing(model) as routing:
            model(random_windows.input_ids_NT)
    chosen = routing[0].logits_TE.gather(1, routing[0].experts_TK)
    torch.testing.assert_close(routing[0].gates_TK, chosen.sigmoid(), atol=1e-6, rtol=1e-6)


def refusal(model) -> str:
    with pytest.raises(ModelError) as refused:
        moe_layers(model)
    message = str(refused.value)
    assert "Looked for: a decoder layer with an experts module" in message
    return message


def test_outliers_are_refused_until_they_keep_the_contract():
    assert "modules named GptOssExperts" in refusal(build_family("gpt_oss"))
    assert "3 decoder layers, and modules named Llama4TextExperts" in refusal(build_family("llama4"))


def test_a_router_that_needs_more_than_hidden_states_is_refused():
    config = MiniMaxM2Config(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    assert "Router wants more than hidden states to route by" in refusal(AutoModelForCausalLM.from_config(config))


def test_experts_without_a_gate_are_refused():
    config = NemotronHConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, layers_block_type=["moe"], num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8, n_group=1, topk_group=1, mamba_num_heads=2, mamba_head_dim=8,
        ssm_state_size=4, n_groups=1, intermediate_size=8,
    )  # fmt: skip
    assert "modules named NemotronHExperts" in refusal(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("other", ["clamped", "gate and up exchanged", "another function"])
def test_an_activation_that_is_not_the_expected_one_is_refused(other):
    model = build_family("qwen3_moe")
    experts = moe_layers(model)[0].experts
    act_fn = copy.deepcopy(experts.act_fn)
    experts._apply_gate = {
        "clamped": lambda gate_up: act_fn(gate_up.chunk(2)[0].clamp(max=10)) * gate_up.chunk(2)[1],
        "gate and up exchanged": lambda gate_up: act_fn(gate_up.chunk(2)[1]) * gate_up.chunk(2)[0],
        "another function": lambda gate_up: torch.relu(gate_up.chunk(2)[0]) * gate_up.chunk(2)[1],
    }[other]
    assert "model.layers.0.mlp.experts: Qwen3MoeExperts does not compute act(gate) * up" in refusal(model)


def test_a_norm_after_each_expert_is_refused():
    model = build_family("qwen3_moe")
    moe_layers(model)[1].experts.has_post_expert_norm = True
    assert "model.layers.1.mlp.experts: Qwen3MoeExperts normalises what its experts give" in refusal(model)


def nest_in_a_larger_model(folder):
    """Rewrite a checkpoint as those of models that also see store their language model."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": config}))
    index = json.loads((folder / INDEX).read_text())
    for file in set(index["weight_map"].values()):
        tensors = {f"language_model.{name}": values for name, values in load_file(folder / file).items()}
        tensors[f"vision_model.layers.{file}.weight"] = torch.zeros(3, 3)
        save_file(tensors, folder / file)


def test_a_checkpoint_with_a_language_model_in_a_larger_one_is_read(tmp_path):
    """Its config says under text_config what the language model is; other parts do not count."""
    model = build_family("llama4")
    save_as_the_hub_does(model, tmp_path)
    plain = read_shape(tmp_path), read_sizes(tmp_path)
    nest_in_a_larger_model(tmp_path)
    assert (read_shape(tmp_path), read_sizes(tmp_path)) == plain


def test_experts_in_four_bits_are_refused(tmp_path):
    """GPT-OSS is published so."""
    model = build_family("gpt_oss")
    model.config.save_pretrained(tmp_path)
    blocks = {"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(6, 32, 1, 16, dtype=torch.uint8)}
    save_file(blocks, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"(?s)are quantised .*down_proj_blocks.*Use the checkpoint in bfloat16"):
        read_shape(tmp_path)


@pytest.mark.parametrize("change", ["no activation", "an activation of two values"])
def test_experts_that_combine_gate_and_up_on_their_own_are_refused(change):
    experts = moe_layers(model := build_family("qwen3_moe"))[0].experts
    if change == "no activation":
        del experts.act_fn
    else:
        experts.act_fn = nn.Bilinear(1, 1, 1)
    assert "Qwen3MoeExperts does not compute act(gate) * up" in refusal(model)
