"""Ragged experts against the families' own at full width, and against a loop at widths that differ."""

import pytest
import torch
from torch.nn import functional as F

from moeprune.models.adapter import moe_layers
from moeprune.models.ragged import PackedWeights, RaggedExperts

HIDDEN = 32


def random_ragged(widths, dtype=torch.float64):
    weights = PackedWeights(widths, HIDDEN, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.parameters():
        parameter.data.normal_(generator=generator)
    return RaggedExperts(weights, widths, F.silu)


def full_width_copy(experts) -> RaggedExperts:
    count, hidden, width = experts.down_proj.shape
    weights = PackedWeights([width] * count, hidden, dtype=experts.down_proj.dtype)
    for expert in range(count):
        weights.gate_up_of(expert).copy_(experts.gate_up_proj[expert])
        weights.down_of(expert).copy_(experts.down_proj[expert].T)
    return RaggedExperts(weights, [width] * count, experts.act_fn)


@torch.no_grad()
def test_full_width_equals_the_familys_own_experts(tiny_model_64):
    for layer in moe_layers(tiny_model_64):
        x_TH = torch.randn(50, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        _, gates_TK, experts_TK = layer.router(x_TH)
        expected = layer.experts(x_TH, experts_TK, gates_TK)
        actual = full_width_copy(layer.experts)(x_TH, experts_TK, gates_TK)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("widths", [(1, 24, 2, 17), (24, 1, 1, 1), (3, 3, 3, 3), (100, 1, 64, 7)])
def test_widths_that_differ_equal_a_loop_over_tokens(widths):
    ragged = random_ragged(widths)
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(12, HIDDEN, dtype=torch.float64, generator=generator)
    gates_TK, experts_TK = torch.rand(12, 4, dtype=torch.float64, generator=generator).topk(2, dim=1)
    mixed_TH = ragged(x_TH, experts_TK, gates_TK)
    starts = [sum(widths[:expert]) for expert in range(4)]
    for token in range(12):
        expected = torch.zeros(HIDDEN, dtype=torch.float64)
        for gate, expert in zip(gates_TK[token], experts_TK[token].tolist(), strict=True):
            start, width = starts[expert], widths[expert]
            gate_up = ragged.weights.gate_up[2 * start : 2 * (start + width)] @ x_TH[token]
            h_C = F.silu(gate_up[:width]) * gate_up[width:]
            expected += gate * (h_C @ ragged.weights.down[start : start + width])
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
    gradient = ragged.weights.down.grad
    assert (gradient[2:7] != 0).any()
    assert (gradient[:2] == 0).all() and (gradient[7:] == 0).all()


def test_bfloat16_stays_bfloat16():
    ragged = random_ragged((4, 8), dtype=torch.bfloat16)
    x_TH = torch.randn(3, HIDDEN).bfloat16()
    assert ragged(x_TH, torch.tensor([[0], [1], [1]]), torch.ones(3, 1)).dtype == torch.bfloat16
