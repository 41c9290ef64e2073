"""Ragged experts against the families' own at full width, and against a loop at widths that differ."""

import pytest
import torch
from torch.nn import functional as F

from moeprune.models.adapter import moe_layers
from moeprune.models.runtime.activations import ClampedSwish, Gated
from moeprune.models.runtime.ragged import Expert, RaggedExperts

HIDDEN = 32


def random_ragged(
    widths, dtype=torch.float64, slot_of_row=None, bias_EH=None, *, bias=False, gates_inputs=False, activation=None
):
    experts = [Expert(width, HIDDEN, bias=bias, dtype=dtype) for width in widths]
    generator = torch.Generator().manual_seed(0)
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data.normal_(generator=generator)
    return RaggedExperts(experts, activation or Gated(F.silu), slot_of_row, bias_EH, gates_inputs)


def expert_output(ragged, slot, x_H):
    """f of one stored expert for one token, from its parameters."""
    of = {name: parameter.detach() for name, parameter in ragged[slot].named_parameters()}
    gate, up = (
        of[f"{part}.weight"] @ x_H + of.get(f"{part}.bias", torch.zeros(1)) for part in ("gate_proj", "up_proj")
    )
    if isinstance(ragged.activation, ClampedSwish):
        alpha, limit = ragged.activation.alpha, ragged.activation.limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        h = (up + 1) * gate / (1 + torch.exp(-alpha * gate))
    else:
        h = gate / (1 + torch.exp(-gate)) * up
    return of["down_proj.weight"] @ h + of.get("down_proj.bias", torch.zeros(1))


def full_width_copy(experts) -> RaggedExperts:
    count, hidden, width = experts.down_proj.shape
    copies = [Expert(width, hidden, dtype=experts.down_proj.dtype) for _ in range(count)]
    for index, copy in enumerate(copies):
        copy.gate_proj.weight.copy_(experts.gate_up_proj[index, :width])
        copy.up_proj.weight.copy_(experts.gate_up_proj[index, width:])
        copy.down_proj.weight.copy_(experts.down_proj[index])
    return RaggedExperts(copies, Gated(experts.act_fn))


@torch.no_grad()
def test_full_width_equals_the_familys_own_experts(tiny_model_64):
    for layer in moe_layers(tiny_model_64):
        x_TH = torch.randn(50, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        _, gates_TK, experts_TK = layer.router(x_TH)
        expected = layer.experts(x_TH, experts_TK, gates_TK)
        actual = full_width_copy(layer.experts)(x_TH, experts_TK, gates_TK)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("activation", [None, ClampedSwish(1.702, 0.5)], ids=["swish", "clamped"])
@pytest.mark.parametrize("gates_inputs", [False, True], ids=["gates outputs", "gates inputs"])
@pytest.mark.parametrize("widths", [(1, 24, 2, 17), (24, 1, 1, 1), (100, 1, 64, 7), (0, 3, 0, 5)])
@torch.no_grad()
def test_widths_that_differ_equal_a_loop_over_tokens(widths, gates_inputs, activation, bias):
    ragged = random_ragged(widths, bias=bias, gates_inputs=gates_inputs, activation=activation)
    assert ragged.has_biases == bias
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(12, HIDDEN, dtype=torch.float64, generator=generator)
    gates_TK, experts_TK = torch.rand(12, 4, dtype=torch.float64, generator=generator).topk(2, dim=1)
    mixed_TH = ragged(x_TH, experts_TK, gates_TK)
    for token in range(12):
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for gate, expert in zip(gates_TK[token], experts_TK[token].tolist(), strict=True):
            if gates_inputs:
                expected += expert_output(ragged, expert, gate * x_TH[token])
            else:
                expected += gate * expert_output(ragged, expert, x_TH[token])
        torch.testing.assert_close(mixed_TH[token], expected, rtol=1e-12, atol=1e-12)


def test_all_tokens_may_go_to_one_expert():
    ragged = random_ragged((2, 5, 3))
    x_TH = torch.randn(4, HIDDEN, dtype=torch.float64)
    alone = ragged(x_TH[2:3], torch.tensor([[1]]), torch.ones(1, 1))
    together = ragged(x_TH, torch.ones(4, 1, dtype=torch.int64), torch.ones(4, 1))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-12, atol=1e-12)


def test_no_padding_is_stored():
    ragged = random_ragged((1, 24, 2, 17))
    assert sum(parameter.numel() for parameter in ragged.parameters()) == 3 * (1 + 24 + 2 + 17) * HIDDEN


def test_gradients_reach_the_experts_that_got_tokens_and_no_others():
    ragged = random_ragged((2, 5, 3))
    ragged(
        torch.randn(6, HIDDEN, dtype=torch.float64), torch.ones(6, 1, dtype=torch.int64), torch.ones(6, 1)
    ).sum().backward()
    assert all((parameter.grad != 0).any() for parameter in ragged[1].parameters())
    assert all(parameter.grad is None for slot in (0, 2) for parameter in ragged[slot].parameters())


def test_bfloat16_stays_bfloat16():
    ragged = random_ragged((4, 8), dtype=torch.bfloat16)
    x_TH = torch.randn(3, HIDDEN).bfloat16()
    assert ragged(x_TH, torch.tensor([[0], [1], [1]]), torch.ones(3, 1)).dtype == torch.bfloat16


def random_bias(rows, dtype=torch.float64):
    return torch.randn(rows, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias_EH", [None, random_bias(6)], ids=["plain", "biased"])
@pytest.mark.parametrize(
    "slot_of_row", [(0, -1, 1, 2, -1, 0), (2, 1, 0, 0, 1, 2), (-1, -1, -1, -1, -1, 1)], ids=["empty", "merged", "one"]
)
def test_router_rows_lead_to_any_expert_or_none(slot_of_row, bias_EH):
    """Against a loop over tokens; rows that share an expert add their gates."""
    ragged = random_ragged((3, 7, 2), slot_of_row=slot_of_row, bias_EH=bias_EH)
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(20, HIDDEN, dtype=torch.float64, generator=generator)
    gates_TK, experts_TK = torch.rand(20, 6, dtype=torch.float64, generator=generator).topk(3, dim=1)
    mixed_TH = ragged(x_TH, experts_TK, gates_TK)
    for token in range(20):
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for gate, row in zip(gates_TK[token], experts_TK[token].tolist(), strict=True):
            if slot_of_row[row] >= 0:
                expected += gate * expert_output(ragged, slot_of_row[row], x_TH[token])
            if bias_EH is not None:
                expected += gate * bias_EH[row]
        torch.testing.assert_close(mixed_TH[token], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(4,), ()], ids=["one expert elsewhere", "no expert at all"])
def test_tokens_that_all_meet_no_expert_get_zero_or_the_bias(widths, dtype):
    bias_EH = random_bias(3, dtype)
    slot_of_row = (-1, -1, len(widths) - 1)
    x_TH = torch.randn(2, HIDDEN).to(dtype)
    rows_TK, gates_TK = torch.tensor([[0], [1]]), torch.tensor([[0.5], [2.0]])
    silent = random_ragged(widths, dtype, slot_of_row)(x_TH, rows_TK, gates_TK)
    assert torch.equal(silent, torch.zeros(2, HIDDEN, dtype=dtype))
    biased = random_ragged(widths, dtype, slot_of_row, bias_EH)(x_TH, rows_TK, gates_TK)
    assert biased.dtype == dtype
    assert torch.equal(biased, gates_TK.to(dtype) * bias_EH[:2])


def test_the_rows_in_order_are_the_default_bit_for_bit():
    x_TH = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    gates_TK, experts_TK = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)).topk(2, dim=1)
    given, default = (random_ragged((4, 1, 3), torch.float32, slots) for slots in ((0, 1, 2), None))
    assert torch.equal(given(x_TH, experts_TK, gates_TK), default(x_TH, experts_TK, gates_TK))
    assert given.rows_are_slots and default.rows_are_slots
    assert default.slot_of_row == (0, 1, 2)


def test_widths_of_rows_and_of_stored_experts_differ():
    ragged = random_ragged((4, 7), slot_of_row=(1, -1, 1, 0))
    assert (ragged.widths, ragged.row_widths, ragged.rows_are_slots) == ((4, 7), (7, 0, 7, 4), False)


@pytest.mark.parametrize("slot_of_row", [(0, 2), (0, -2)])
def test_a_row_to_an_expert_that_is_not_there_is_refused(slot_of_row):
    with pytest.raises(ValueError, match="names experts that are not there"):
        random_ragged((4, 7), slot_of_row=slot_of_row)


def test_gradients_reach_the_bias_of_rows_that_got_tokens():
    ragged = random_ragged((4,), slot_of_row=(-1, 0, -1), bias_EH=random_bias(3))
    x_TH = torch.randn(2, HIDDEN, dtype=torch.float64)
    ragged(x_TH, torch.tensor([[0], [1]]), torch.tensor([[0.5], [0.25]])).sum().backward()
    assert torch.equal(ragged.bias_EH.grad[:, 0], torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64))
