"""Finding MoE layers by structure, keeping router rows, and recording what routers decide."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

from moeprune.errors import ModelError
from moeprune.models.adapter import moe_layers, recorded_routing
from moeprune.models.runtime.router import keep_router_rows


@pytest.fixture
def biased_model():
    """A tiny DeepSeek-V3, whose routers hold a bias per expert in a buffer; one group of 6 experts."""
    config = DeepseekV3Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    (layer,) = moe_layers(model)
    layer.router.e_score_correction_bias.copy_(torch.randn(6))
    return model


def test_layers_are_found_in_order_with_their_shape(tiny_model, model_name):
    expected = {
        "qwen3_renormalised": ([0, 1], 8, 16),
        "qwen3_plain_gates": ([0, 1], 8, 16),
        "deepseek_v2": ([1, 2], 6, 24),
    }
    indices, experts, width = expected[model_name]
    layers = moe_layers(tiny_model)
    assert [layer.name for layer in layers] == [f"model.layers.{index}.mlp.experts" for index in indices]
    for layer in layers:
        assert (layer.expert_count, layer.widths, layer.hidden_size, layer.top_k) == (
            experts,
            (width,) * experts,
            32,
            2,
        )
        assert tiny_model.get_submodule(layer.name) is layer.experts


def test_a_dense_model_is_a_model_error_that_says_what_was_looked_for():
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"(?s)Qwen3ForCausalLM has no routed experts.*gate_up_proj.*down_proj"):
        moe_layers(AutoModelForCausalLM.from_config(config))


def test_a_router_with_a_bias_buffer_is_found(biased_model):
    (layer,) = moe_layers(biased_model)
    assert (layer.expert_count, layer.widths[0], layer.top_k) == (6, 8, 2)


def test_keeping_router_rows_takes_weight_and_bias_of_the_live_experts(biased_model):
    router = moe_layers(biased_model)[0].router
    weight, bias, live = router.weight.detach().clone(), router.e_score_correction_bias.clone(), [1, 3, 4]
    keep_router_rows(router, torch.tensor(live))
    assert torch.equal(router.weight, weight[live])
    assert torch.equal(router.e_score_correction_bias, bias[live])
    assert isinstance(router.weight, nn.Parameter)
    assert "e_score_correction_bias" in dict(router.named_buffers())
    assert router.num_experts == 3


def test_a_router_with_fewer_rows_chooses_as_if_the_others_were_out_of_reach(biased_model):
    router = moe_layers(biased_model)[0].router
    x_TH = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    live = torch.tensor([1, 3, 4])
    bias = router.e_score_correction_bias.clone()
    router.e_score_correction_bias[[0, 2, 5]] = -1e9
    _, wanted_gates, wanted = router(x_TH)
    router.e_score_correction_bias.copy_(bias)
    keep_router_rows(router, live)
    logits_TE, gates, chosen = router(x_TH)
    assert logits_TE.shape == (40, 3)
    assert torch.equal(live[chosen].sort().values, wanted.sort().values)
    torch.testing.assert_close(gates.sort().values, wanted_gates.sort().values)


def test_values_that_are_not_per_expert_stay_when_router_rows_go():
    router = nn.Module()
    router.weight = nn.Parameter(torch.randn(4, 5))
    router.register_buffer("scale", torch.ones(1))
    router.register_buffer("step", torch.tensor(3))
    keep_router_rows(router, torch.tensor([0, 2]))
    assert router.weight.shape == (2, 5)
    assert (router.scale.tolist(), router.step.item()) == ([1.0], 3)


def test_routing_is_recorded_in_layer_order_and_hooks_go(tiny_model, random_windows):
    with recorded_routing(tiny_model) as routing:
        tiny_model(random_windows.input_ids_NT)
    layers = moe_layers(tiny_model)
    assert len(routing) == len(layers)
    for seen, layer in zip(routing, layers, strict=True):
        assert seen.logits_TE.shape == (55, layer.expert_count)
        assert seen.gates_TK.shape == seen.experts_TK.shape == (55, 2)
        # The best logit belongs to the expert with the largest gate.
        best = seen.experts_TK.gather(1, seen.gates_TK.argmax(dim=1, keepdim=True)).flatten()
        assert torch.equal(best, seen.logits_TE.argmax(dim=1))
        assert not layer.router._forward_hooks


def test_hooks_go_after_an_error_too(tiny_model):
    with pytest.raises(RuntimeError, match="stop"), recorded_routing(tiny_model):
        raise RuntimeError("stop")
    assert all(not layer.router._forward_hooks for layer in moe_layers(tiny_model))


def test_gates_are_what_the_family_finally_applies(tiny_model, model_name, random_windows):
    """Renormalised to 1, plain softmax values, or those times the family's factor."""
    with recorded_routing(tiny_model) as routing:
        tiny_model(random_windows.input_ids_NT)
    for seen in routing:
        chosen = seen.logits_TE.softmax(dim=1).gather(1, seen.experts_TK)
        if model_name == "qwen3_renormalised":
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        if model_name == "deepseek_v2":
            chosen = chosen * 1.5
        torch.testing.assert_close(seen.gates_TK, chosen)
