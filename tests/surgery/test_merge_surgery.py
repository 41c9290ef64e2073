"""Merging: the mean of each group, where rows lead, and what must not change."""

import itertools

import pytest
import torch
from surgery_plans import everything, gate_up_of, plan_of

from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.footprint.measured import count_parameters
from moeprune.surgery.merging import matching_channels
from moeprune.surgery.prune import prune
from moeprune.types import Merge

GROUPS = {0: [0, 3, 5], 2: [2], 4: [4, 1]}  # of the first layer: leader and members


def merging_plan(model, groups=GROUPS, *, align=False, weight_of=lambda expert: 1.0 + expert):
    """The groups in the first layer; experts in no group, and all of the second layer, stay alone."""
    layers = moe_layers(model)
    experts = layers[0].expert_count
    leader_LE = torch.arange(experts).repeat(len(layers), 1)
    for leader, members in groups.items():
        leader_LE[0, members] = leader
    weight_LE = torch.tensor([[weight_of(e) for e in range(experts)] for _ in layers], dtype=torch.float64)

    def kept(layer, expert, width):
        return torch.arange(width if leader_LE[layer, expert] == expert else 0)

    return plan_of(model, kept, Merge(leader_LE, weight_LE, align))


@torch.no_grad()
def make_alike(model, groups, channel_order=lambda width, member: torch.arange(width)):
    """Make the members of each group copies of its leader, their channels in another order."""
    experts = moe_layers(model)[0].experts
    width = experts.down_proj.shape[2]
    for leader, members in groups.items():
        for member in members:
            order_C = torch.arange(width) if member == leader else channel_order(width, member)
            gate_CH, up_CH = experts.gate_up_proj[leader].chunk(2)
            experts.gate_up_proj[member] = torch.cat([gate_CH[order_C], up_CH[order_C]])
            experts.down_proj[member] = experts.down_proj[leader][:, order_C]


def random_order(width, member):
    return torch.randperm(width, generator=torch.Generator().manual_seed(member))


@torch.no_grad()
def test_a_leader_becomes_the_weighted_mean_of_its_group(tiny_model_64):
    experts = moe_layers(tiny_model_64)[0].experts
    gate_up_EIH, down_EHC = experts.gate_up_proj.clone(), experts.down_proj.clone()
    second = moe_layers(tiny_model_64)[1].experts.down_proj.clone()
    prune(tiny_model_64, merging_plan(tiny_model_64))
    first_layer, second_layer = moe_layers(tiny_model_64)
    leaders = [e for e in range(len(down_EHC)) if e not in (3, 5, 1)]
    for slot, leader in enumerate(leaders):
        members = GROUPS.get(leader, [leader])
        total = sum(1.0 + e for e in members)
        gate_up_IH = sum((1.0 + e) / total * gate_up_EIH[e] for e in members)
        down_HC = sum((1.0 + e) / total * down_EHC[e] for e in members)
        torch.testing.assert_close(gate_up_of(first_layer.experts, slot), gate_up_IH, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(first_layer.experts[slot].down_proj.weight.T, down_HC.T, rtol=1e-13, atol=1e-15)
    for expert, down_HC in enumerate(second):
        assert torch.equal(second_layer.experts[expert].down_proj.weight.T, down_HC.T)


def test_every_router_row_stays_and_leads_to_its_leader(tiny_model):
    rows = [layer.router.weight.detach().clone() for layer in moe_layers(tiny_model)]
    experts = len(rows[0])
    pruned = prune(tiny_model, merging_plan(tiny_model))
    first, second = moe_layers(pruned)
    assert first.experts.slot_of_row == (0, 2, 1, 0, 2, 0, *range(3, experts - 3))
    assert second.experts.slot_of_row == tuple(range(experts))
    for layer, before in zip((first, second), rows, strict=True):
        assert torch.equal(layer.router.weight, before)
        assert layer.expert_count == experts
    width = first.stored_widths[0]
    assert first.stored_widths == (width,) * (experts - 3)
    assert first.widths == (width,) * experts


@pytest.mark.parametrize("align", [False, True])
@torch.no_grad()
def test_merging_identical_experts_changes_nothing(build_model, model_name, random_windows, align):
    model = build_model(model_name, torch.float32)
    make_alike(model, GROUPS)
    ids = random_windows.input_ids_NT
    expected = model(ids).logits
    pruned = prune(model, merging_plan(model, align=align))
    torch.testing.assert_close(pruned(ids).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_permuted_copies_changes_nothing_when_channels_are_aligned(build_model, model_name, random_windows):
    aligned, mixed = (build_model(model_name, torch.float64) for _ in range(2))
    for model in (aligned, mixed):
        make_alike(model, GROUPS, random_order)
    ids = random_windows.input_ids_NT
    expected = aligned(ids).logits
    weights = moe_layers(aligned)[0].experts.gate_up_proj[0].clone()
    prune(aligned, merging_plan(aligned, align=True))
    torch.testing.assert_close(aligned(ids).logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gate_up_of(moe_layers(aligned)[0].experts, 0), weights, rtol=1e-14, atol=1e-15)
    assert (prune(mixed, merging_plan(mixed))(ids).logits - expected).abs().max() > 0.01


def test_matching_is_the_best_of_all_permutations():
    generator = torch.Generator().manual_seed(0)
    leading_CX, member_CX = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))

    def similarity(order):
        return sum(float(leading_CX[channel] @ member_CX[other]) for channel, other in enumerate(order))

    best = max(itertools.permutations(range(5)), key=similarity)
    assert tuple(matching_channels(leading_CX, member_CX).tolist()) == best


@torch.no_grad()
def test_merging_nothing_keeps_every_weight_bit_for_bit(build_model, model_name, random_windows):
    plain, merged = (build_model(model_name, torch.float32) for _ in range(2))
    prune(plain, plan_of(plain, everything))
    prune(merged, merging_plan(merged, {}, align=True))
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in plain.state_dict().items())
    ids = random_windows.input_ids_NT
    assert torch.equal(plain(ids).logits, merged(ids).logits)


@torch.no_grad()
def test_fewer_groups_than_top_k_work(tiny_model, random_windows):
    experts = moe_layers(tiny_model)[0].expert_count
    pruned = prune(tiny_model, merging_plan(tiny_model, {1: list(range(experts))}))
    assert moe_layers(pruned)[0].stored_widths == (pruned.get_submodule(moe_layers(pruned)[0].name).widths[0],)
    assert torch.isfinite(pruned(random_windows.input_ids_NT).logits).all()


def test_a_merged_expert_is_counted_once(tiny_model):
    before = count_parameters(tiny_model)
    width = moe_layers(tiny_model)[0].widths[0]
    after = count_parameters(prune(tiny_model, merging_plan(tiny_model)))
    assert before.total - after.total == before.routed - after.routed == 3 * 3 * width * 32
    assert after.active == before.active - (before.total - after.total) + 3 * 3 * width * 32


@pytest.mark.parametrize(
    "spoil",
    [
        lambda merge, kept: merge.leader_LE[0].index_fill_(0, torch.tensor([0]), 3),  # 0 follows 3, which follows 0
        lambda merge, kept: merge.weight_LE[0].index_fill_(0, torch.tensor([0, 3, 5]), 0.0),
        lambda merge, kept: merge.weight_LE[0].index_fill_(0, torch.tensor([3]), -1.0),
        lambda merge, kept: kept[0].__setitem__(3, kept[0][0]),
        lambda merge, kept: kept[0].__setitem__(0, torch.arange(0)),
    ],
    ids=["leader follows", "group of no weight", "negative weight", "follower keeps", "leader keeps none"],
)
def test_groups_that_do_not_fit_are_an_input_error_and_nothing_is_cut(tiny_model, spoil):
    plan = merging_plan(tiny_model)
    kept = [list(layer) for layer in plan.kept]
    spoil(plan.merge, kept)
    plan = type(plan)(tuple(map(tuple, kept)), plan.width, merge=plan.merge)
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    with pytest.raises(InputError, match="merge groups do not fit"):
        prune(tiny_model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_groups_of_another_shape_are_an_input_error(tiny_model):
    plan = merging_plan(tiny_model)
    merge = Merge(plan.merge.leader_LE[:1], plan.merge.weight_LE[:1], False)
    with pytest.raises(InputError, match="merge groups are for"):
        prune(tiny_model, type(plan)(plan.kept, plan.width, merge=merge))
