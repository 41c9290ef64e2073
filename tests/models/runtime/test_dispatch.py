"""Grouping assignments by expert and adding them up again, against loops."""

import pytest
import torch

from moeprune.models.runtime.dispatch import combine, dispatch


def random_routing(tokens: int, experts: int, top_k: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    experts_TK = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    return experts_TK, torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (5, 3, 1), (13, 8, 2), (9, 4, 4), (2, 40, 3)])
def test_every_assignment_is_grouped_with_its_expert_in_token_order(tokens, experts, top_k):
    experts_TK, gates_TK = random_routing(tokens, experts, top_k, seed=tokens)
    routed = dispatch(experts_TK, gates_TK, experts)
    expected = [
        (expert, token, float(gates_TK[token, slot]))
        for expert in range(experts)
        for token in range(tokens)
        for slot in range(top_k)
        if experts_TK[token, slot] == expert
    ]
    grouped = [
        (expert, token, gate)
        for expert, rows in routed.active()
        for token, gate in zip(routed.token_A[rows].tolist(), routed.gate_A[rows].tolist(), strict=True)
    ]
    assert grouped == expected
    assert routed.counts == [sum(expert == e for e, *_ in expected) for expert in range(experts)]


def test_experts_without_tokens_are_not_visited():
    routed = dispatch(torch.tensor([[3], [1], [3]]), torch.ones(3, 1), 5)
    assert [expert for expert, _ in routed.active()] == [1, 3]


def test_assignments_to_no_expert_are_left_out():
    gates_TK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    routed = dispatch(torch.tensor([[3, 0], [3, 3], [2, 3]]), gates_TK, 3)
    assert routed.counts == [1, 0, 1]
    assert routed.token_A.tolist() == [0, 2]
    assert torch.equal(routed.gate_A, gates_TK[[0, 2], [1, 0]])
    assert [expert for expert, _ in routed.active()] == [0, 2]


@pytest.mark.parametrize("seed", range(4))
def test_combine_is_the_gated_sum_of_each_token(seed):
    experts_TK, gates_TK = random_routing(7, 5, 3, seed)
    output_TEH = torch.randn(7, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    routed = dispatch(experts_TK, gates_TK, 5)
    expert_A = torch.arange(5).repeat_interleave(torch.tensor(routed.counts))
    mixed_TH = combine(output_TEH[routed.token_A, expert_A], routed, 7)
    for token in range(7):
        expected = sum(gates_TK[token, slot] * output_TEH[token, experts_TK[token, slot]] for slot in range(3))
        torch.testing.assert_close(mixed_TH[token], expected, rtol=1e-13, atol=1e-13)


def test_combine_keeps_the_dtype_of_the_experts_outputs():
    routed = dispatch(torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.float32), 2)
    assert combine(torch.ones(2, 4, dtype=torch.bfloat16), routed, 2).dtype == torch.bfloat16


def test_gates_of_higher_precision_are_rounded_with_the_product_and_not_before():
    """DeepSeek's routers give float32 gates to bfloat16 experts, and the families round the gated output once."""
    experts_TK, gates_TK = random_routing(40, 6, 2, seed=0)
    routed = dispatch(experts_TK, gates_TK.float(), 6)
    output_AH = torch.randn(80, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected_TH = torch.zeros(40, 5, dtype=torch.bfloat16)
    for output_H, token, gate in zip(output_AH, routed.token_A.tolist(), routed.gate_A, strict=True):
        expected_TH[token] += (output_H.float() * gate).bfloat16()
    assert torch.equal(combine(output_AH, routed, 40), expected_TH)


def test_gates_may_scale_what_goes_in_instead_of_what_comes_out():
    experts_TK, gates_TK = random_routing(7, 5, 2, seed=3)
    hidden_TH = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain, scaled = (dispatch(experts_TK, gates_TK, 5, gates_inputs) for gates_inputs in (False, True))
    assert torch.equal(plain.inputs(hidden_TH), hidden_TH[plain.token_A])
    assert torch.equal(scaled.inputs(hidden_TH), hidden_TH[plain.token_A] * plain.gate_A[:, None])
    assert torch.equal(scaled.gate_A, torch.ones_like(plain.gate_A))
    assert (scaled.counts, scaled.token_A.tolist()) == (plain.counts, plain.token_A.tolist())
    assert scaled.inputs(hidden_TH.bfloat16()).dtype == torch.bfloat16
