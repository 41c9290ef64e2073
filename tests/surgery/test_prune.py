"""Cutting: nothing removed changes nothing, sliced equals masked, and what goes is what the plan says."""

import copy

import pytest
import torch
from surgery_plans import (
    everything,
    gate_up_of,
    mask_channels,
    plan_of,
    random_channels,
    random_channels_and_empty_experts,
    without_experts,
)
from transformers import AutoModelForCausalLM, DeepseekV3Config

from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.footprint.measured import count_parameters
from moeprune.models.runtime.ragged import RaggedExperts
from moeprune.surgery.prune import cut_layers, prune
from moeprune.types import Plan

HIDDEN = 32


def mask_router_logits(model, gone, *, renormalise: bool, scale: float, in_float32: bool) -> None:
    """Give removed experts the logit -inf, before the softmax: its sum, the top-k and the gates then leave them out."""
    for index, layer in enumerate(moe_layers(model)):
        removed = torch.tensor([expert for at, expert in gone if at == index], dtype=torch.int64)

        def masked(hidden, router=layer.router, removed=removed):
            x_TH = hidden.reshape(-1, hidden.shape[-1])
            dtype = torch.float32 if in_float32 else x_TH.dtype
            logits_TE = x_TH.to(dtype) @ router.weight.to(dtype).T
            logits_TE = logits_TE.index_fill(1, removed, -torch.inf)
            gates_TK, experts_TK = logits_TE.softmax(dim=-1, dtype=torch.float32).topk(router.top_k, dim=-1)
            if renormalise:
                gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
            return logits_TE, scale * gates_TK, experts_TK

        layer.router.forward = masked


ROUTERS = {
    "qwen3_renormalised": {"renormalise": True, "scale": 1.0, "in_float32": False},
    "qwen3_plain_gates": {"renormalise": False, "scale": 1.0, "in_float32": False},
    "deepseek_v2": {"renormalise": False, "scale": 1.5, "in_float32": True},
}


@torch.no_grad()
def test_removing_nothing_keeps_every_weight_bit_for_bit(tiny_model):
    dense = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    before = [(layer.experts.gate_up_proj.clone(), layer.experts.down_proj.clone()) for layer in moe_layers(tiny_model)]
    pruned = prune(tiny_model, plan_of(tiny_model, everything))
    for layer, (gate_up_EIH, down_EHC) in zip(moe_layers(pruned), before, strict=True):
        for expert in range(layer.expert_count):
            assert torch.equal(gate_up_of(layer.experts, expert), gate_up_EIH[expert])
            assert torch.equal(layer.experts[expert].down_proj.weight.T, down_EHC[expert].T)
    for name, tensor in pruned.state_dict().items():
        assert ".experts." in name or torch.equal(tensor, dense[name])


@torch.no_grad()
def test_removing_nothing_twice_gives_bit_identical_logits(build_model, model_name, random_windows):
    first, second = (build_model(model_name, torch.float32) for _ in range(2))
    for model in (first, second):
        prune(model, plan_of(model, everything))
    ids = random_windows.input_ids_NT
    assert torch.equal(first(ids).logits, second(ids).logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_removing_nothing_leaves_the_logits(build_model, model_name, random_windows, dtype, tolerance):
    """The dense experts add up in another order, so in floating point the logits are close rather than equal."""
    model = build_model(model_name, dtype)
    ids = random_windows.input_ids_NT
    expected = model(ids).logits
    actual = prune(model, plan_of(model, everything))(ids).logits
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_sliced_equals_masked(build_model, model_name, random_windows, dtype, tolerance):
    masked, sliced = (build_model(model_name, dtype) for _ in range(2))
    plan = plan_of(masked, random_channels)
    mask_channels(masked, plan)
    prune(sliced, plan)
    ids = random_windows.input_ids_NT
    torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_cutting_changes_the_logits(tiny_model, random_windows):
    """Otherwise the comparisons above would show nothing."""
    ids = random_windows.input_ids_NT
    before = tiny_model(ids).logits
    after = prune(tiny_model, plan_of(tiny_model, random_channels))(ids).logits
    assert (after - before).abs().max() > 0.01


@torch.no_grad()
def test_removing_experts_equals_masking_their_router_logits(build_model, model_name, random_windows):
    """Tolerance: the families compute the softmax in float32, and its rounding depends on the number of experts."""
    gone = [(0, 0), (0, 3), (1, 5), (1, 1), (1, 2)]
    dense, pruned = (build_model(model_name, torch.float64) for _ in range(2))
    ids = random_windows.input_ids_NT
    before = dense(ids).logits
    mask_router_logits(dense, [], **ROUTERS[model_name])
    torch.testing.assert_close(dense(ids).logits, before, rtol=1e-5, atol=1e-5)
    mask_router_logits(dense, gone, **ROUTERS[model_name])
    prune(pruned, plan_of(pruned, without_experts(*gone)))
    expected = dense(ids).logits
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.01


@torch.no_grad()
def test_experts_and_channels_may_go_together(build_model, model_name, random_windows):
    gone = [(0, 4), (1, 0)]
    dense, pruned = (build_model(model_name, torch.float64) for _ in range(2))

    def kept(layer, expert, width):
        return torch.arange(0) if (layer, expert) in gone else random_channels(layer, expert, width)

    plan = plan_of(dense, kept)
    mask_channels(dense, plan)
    mask_router_logits(dense, gone, **ROUTERS[model_name])
    prune(pruned, plan)
    ids = random_windows.input_ids_NT
    torch.testing.assert_close(pruned(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_kept_rows_of_empty_experts_add_nothing(build_model, model_name, random_windows, dtype, tolerance):
    """As if the weights of these experts were zero: routing and gates are those of the dense model."""
    zeroed, pruned = (build_model(model_name, dtype) for _ in range(2))
    plan = plan_of(zeroed, random_channels_and_empty_experts)
    mask_channels(zeroed, plan)
    for layer in moe_layers(zeroed):
        layer.experts.gate_up_proj[1] = 0
    prune(pruned, plan, "keep_row")
    ids = random_windows.input_ids_NT
    torch.testing.assert_close(pruned(ids).logits, zeroed(ids).logits, rtol=tolerance, atol=tolerance)
    assert [list(layer.widths) for layer in moe_layers(pruned)] == plan.widths_LE.tolist()
    assert [layer.expert_count for layer in moe_layers(pruned)] == [len(kept) for kept in plan.kept]


@torch.no_grad()
def test_with_kept_rows_a_layer_may_lose_all_its_experts(tiny_model, random_windows):
    experts = moe_layers(tiny_model)[0].expert_count
    pruned = prune(tiny_model, plan_of(tiny_model, without_experts(*[(0, e) for e in range(experts)])), "keep_row")
    layer = moe_layers(pruned)[0]
    outputs = []
    layer.experts.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    assert torch.isfinite(pruned(random_windows.input_ids_NT).logits).all()
    assert not outputs[0].any()
    assert (layer.stored_widths, layer.widths) == ((), (0,) * experts)


@torch.no_grad()
def test_rows_that_lead_nowhere_stay_only_where_asked(build_model, model_name, random_windows):
    removed, kept = (build_model(model_name, torch.float32) for _ in range(2))
    plan = plan_of(removed, without_experts((0, 2), (1, 0)))
    prune(removed, plan, "remove_row")
    prune(kept, plan, "keep_row")
    ids = random_windows.input_ids_NT
    assert (removed(ids).logits - kept(ids).logits).abs().max() > 0.01
    assert moe_layers(kept)[0].expert_count == moe_layers(removed)[0].expert_count + 1


def test_another_row_policy_is_an_input_error(tiny_model):
    with pytest.raises(InputError, match=r"(?s)empty_experts=keep_rows.*Did you mean: keep_row"):
        prune(tiny_model, plan_of(tiny_model, everything), "keep_rows")


def test_parameters_removed_are_those_of_the_plan(tiny_model):
    plan = plan_of(tiny_model, random_channels)
    before = count_parameters(tiny_model)
    after = count_parameters(prune(tiny_model, plan))
    removed = 3 * HIDDEN * (plan.total_channels - plan.kept_channels)
    assert before.total - after.total == before.routed - after.routed == removed
    assert after.routed == sum(
        parameter.numel() for name, parameter in tiny_model.named_parameters() if ".mlp.experts." in name
    )


def test_a_removed_expert_takes_its_router_row_along(tiny_model):
    rows = [layer.router.weight.detach().clone() for layer in moe_layers(tiny_model)]
    prune(tiny_model, plan_of(tiny_model, without_experts((0, 1), (0, 2), (1, 0))))
    first, second = moe_layers(tiny_model)
    experts = len(rows[0])
    assert torch.equal(first.router.weight, rows[0][[0, *range(3, experts)]])
    assert torch.equal(second.router.weight, rows[1][1:])
    assert (first.expert_count, second.expert_count) == (experts - 2, experts - 1)


def test_widths_follow_the_plan(tiny_model):
    plan = plan_of(tiny_model, random_channels)
    prune(tiny_model, plan)
    assert [list(layer.widths) for layer in moe_layers(tiny_model)] == plan.widths_LE.tolist()


def test_the_dtype_stays(tiny_model):
    pruned = prune(tiny_model.bfloat16(), plan_of(tiny_model, random_channels))
    assert {parameter.dtype for parameter in pruned.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: Plan(plan.kept[:-1], plan.width),
        lambda plan: Plan(tuple(layer[:-1] for layer in plan.kept), plan.width),
        lambda plan: Plan(plan.kept, plan.width + 8),
    ],
    ids=["fewer layers", "fewer experts", "another width"],
)
def test_a_plan_for_another_model_is_an_input_error(tiny_model, change):
    plan = change(plan_of(tiny_model, everything))
    with pytest.raises(InputError, match=r"(?s)The plan is for .* MoE layers.*Make the plan from statistics of this"):
        prune(tiny_model, plan)


@pytest.mark.parametrize("kept_of", [everything, random_channels])
def test_a_pruned_model_is_not_pruned_again(tiny_model, kept_of):
    plan = plan_of(tiny_model, kept_of)
    prune(tiny_model, plan)
    with pytest.raises(InputError, match="pruned already"):
        prune(tiny_model, plan)


def test_fewer_live_experts_than_top_k_are_an_input_error_and_nothing_is_cut(tiny_model):
    experts = moe_layers(tiny_model)[1].expert_count
    before = set(tiny_model.state_dict())
    plan = plan_of(tiny_model, without_experts(*[(1, expert) for expert in range(1, experts)]))
    with pytest.raises(InputError, match=r"would keep 1 experts, but every token is sent to 2"):
        prune(tiny_model, plan)
    assert set(tiny_model.state_dict()) == before


@torch.no_grad()
def test_as_many_live_experts_as_top_k_are_enough(tiny_model, random_windows):
    experts = moe_layers(tiny_model)[0].expert_count
    gone = [(layer, expert) for layer in range(2) for expert in range(2, experts)]
    pruned = prune(tiny_model, plan_of(tiny_model, without_experts(*gone)))
    assert torch.isfinite(pruned(random_windows.input_ids_NT).logits).all()


@pytest.fixture
def grouped_model():
    """A tiny DeepSeek-V3 whose router first chooses one of two groups of experts."""
    config = DeepseekV3Config(
        vocab_size=257, hidden_size=HIDDEN, intermediate_size=48, moe_intermediate_size=8, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def test_channels_may_go_where_the_router_chooses_groups(grouped_model, random_windows):
    ids = random_windows.input_ids_NT
    expected = grouped_model(ids).logits
    actual = prune(grouped_model, plan_of(grouped_model, everything))(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gone", [[0], [0, 1], [0, 4]])
def test_experts_may_not_go_where_the_router_chooses_groups(grouped_model, gone):
    """Their removal would shift the others into groups they were not trained in."""
    before = set(grouped_model.state_dict())
    plan = plan_of(grouped_model, without_experts(*[(0, expert) for expert in gone]))
    with pytest.raises(InputError, match=r"(?s)groups.*surgery=keep_rows"):
        prune(grouped_model, plan)
    assert set(grouped_model.state_dict()) == before


@torch.no_grad()
def test_experts_may_go_where_the_router_chooses_groups_if_their_rows_stay(grouped_model, random_windows):
    ids = random_windows.input_ids_NT
    plan = plan_of(grouped_model, without_experts((0, 0), (0, 4)))
    zeroed = copy.deepcopy(grouped_model)
    mask_channels(zeroed, plan)
    pruned = prune(grouped_model, plan, "keep_row")
    torch.testing.assert_close(pruned(ids).logits, zeroed(ids).logits, rtol=1e-5, atol=1e-5)


def test_dense_experts_are_dropped_layer_by_layer(tiny_model):
    """All of them beside all that stays of them would not fit on an accelerator that holds the model."""
    dense = [layer.experts for layer in moe_layers(tiny_model)]
    cut = 0
    for _, _, layer in cut_layers(tiny_model, plan_of(tiny_model, random_channels)):
        cut += any(isinstance(module, RaggedExperts) for module in layer.modules())
        assert [experts.down_proj.is_meta for experts in dense] == [index < cut for index in range(len(dense))]
        assert [experts.gate_up_proj.is_meta for experts in dense] == [index < cut for index in range(len(dense))]
    assert cut == len(dense) == 2
