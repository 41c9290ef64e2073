"""Every way to compute routed experts, against a loop over tokens and against the one that autograd follows."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.models.compressed.four_bit import four_bit_linear
from moeprune.models.runtime import kernels
from moeprune.models.runtime.activations import ClampedSwish, Gated
from moeprune.models.runtime.grouped import GroupedLinear
from moeprune.models.runtime.kernels import Batch
from moeprune.models.runtime.ragged import Expert

HIDDEN = 16
WIDTHS = (8, 0, 24, 3, 8, 24)


def random_experts(widths=WIDTHS, dtype=torch.float64, bias=False, hidden=HIDDEN) -> nn.ModuleList:
    experts = nn.ModuleList([Expert(width, hidden, bias=bias, dtype=dtype) for width in widths])
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(generator=generator)
    return experts


def random_batch(
    tokens, experts, dtype=torch.float64, top_k=3, activation=None, gates_inputs=False, hidden=HIDDEN
) -> Batch:
    """Tokens go to expert ``len(experts)``, none, as often as to any other; expert 0 gets no token."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn(tokens, hidden, generator=generator).to(dtype)
    slots_TK = 1 + torch.rand(tokens, len(experts), generator=generator).topk(top_k).indices
    gates_TK = torch.rand(tokens, top_k, generator=generator).to(dtype)
    return Batch(experts, activation or Gated(F.silu), hidden_TH, slots_TK, gates_TK, gates_inputs)


def by_hand(batch: Batch) -> Tensor:
    """One token and one expert at a time, each product written out."""
    mixed_TH = torch.zeros_like(batch.hidden_TH)
    for token, x_H in enumerate(batch.hidden_TH):
        for slot, gate in zip(batch.slots_TK[token].tolist(), batch.gates_TK[token], strict=True):
            if slot == len(batch.experts):
                continue
            expert = batch.experts[slot]
            given_H = x_H * gate if batch.gates_inputs else x_H
            gate_C, up_C = (_affine(layer, given_H) for layer in (expert.gate_proj, expert.up_proj))
            f_H = _affine(expert.down_proj, batch.activation(gate_C, up_C))
            mixed_TH[token] += f_H if batch.gates_inputs else gate * f_H
    return mixed_TH


def _affine(layer, x_I):
    y_O = (layer.weight * x_I).sum(dim=1)
    return y_O if layer.bias is None else y_O + layer.bias


@torch.no_grad()
@pytest.mark.parametrize("gates_inputs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [Gated(F.silu), ClampedSwish(1.7, 1.0)], ids=["swish", "clamped"])
@pytest.mark.parametrize("kernel", [kernels.loop])
def test_each_loop_equals_one_token_and_expert_at_a_time(kernel, activation, bias, gates_inputs):
    batch = random_batch(20, random_experts(bias=bias), activation=activation, gates_inputs=gates_inputs)
    torch.testing.assert_close(kernel(batch), by_hand(batch), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("gates_inputs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_one_token_equals_one_expert_at_a_time(seed, bias, gates_inputs):
    many = random_batch(20, random_experts(bias=bias), gates_inputs=gates_inputs)
    token = slice(seed, seed + 1)
    batch = Batch(
        many.experts, many.activation, many.hidden_TH[token], many.slots_TK[token], many.gates_TK[token], gates_inputs
    )
    torch.testing.assert_close(kernels.one_token(batch), by_hand(batch), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("gates_inputs", [False, True])
@pytest.mark.parametrize("widths", [(8, 0, 24, 8, 8, 24), (4, 4, 4, 4), (0, 0, 4, 0)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_experts_of_equal_width_in_one_grouped_product(tokens, widths, gates_inputs):
    """In float32: the grouped product knows no float64."""
    batch = random_batch(tokens, random_experts(widths, torch.float32), torch.float32, gates_inputs=gates_inputs)
    torch.testing.assert_close(kernels.by_width(batch), by_hand(batch), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_grouped_product_in_bfloat16():
    batch = random_batch(20, random_experts((8, 16, 16, 8), torch.bfloat16), torch.bfloat16)
    torch.testing.assert_close(kernels.by_width(batch), kernels.loop(batch), rtol=0.05, atol=0.5)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [kernels.loop, kernels.by_width])
@pytest.mark.parametrize("widths", [(4,), ()], ids=["one expert elsewhere", "no expert at all"])
def test_tokens_that_meet_no_expert_get_zero(kernel, widths):
    experts = random_experts(widths, torch.float32)
    hidden_TH, slots_TK = torch.ones(3, HIDDEN), torch.full((3, 2), len(widths))
    batch = Batch(experts, Gated(F.silu), hidden_TH, slots_TK, torch.ones(3, 2))
    assert torch.equal(kernel(batch), torch.zeros(3, HIDDEN))
    assert torch.equal(
        kernels.one_token(Batch(experts, Gated(F.silu), hidden_TH[:1], slots_TK[:1], torch.ones(1, 2))),
        torch.zeros(1, HIDDEN),
    )


@torch.no_grad()
def test_gates_of_higher_precision_keep_the_dtype_of_the_hidden_states():
    experts = random_experts((8, 8, 16, 16), torch.bfloat16)
    for tokens, kernel in [(1, kernels.one_token), *((9, kernel) for kernel in [kernels.loop, kernels.by_width])]:
        for gates_inputs in (False, True):
            batch = random_batch(tokens, experts, torch.bfloat16, gates_inputs=gates_inputs)
            exact = Batch(
                experts, batch.activation, batch.hidden_TH, batch.slots_TK, batch.gates_TK.float(), gates_inputs
            )
            assert kernel(exact).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [kernels.one_token, kernels.loop])
def test_gradients_reach_the_experts_that_got_tokens_and_no_others(kernel):
    batch = random_batch(1 if kernel is kernels.one_token else 6, random_experts())
    batch.hidden_TH.requires_grad_()
    kernel(batch).sum().backward()
    given_TH, batch.hidden_TH.grad = batch.hidden_TH.grad, None
    weights = [expert.down_proj.weight for expert in batch.experts]
    given = [weight.grad for weight in weights]
    batch.experts.zero_grad()
    by_hand(batch).sum().backward()
    torch.testing.assert_close(given_TH, batch.hidden_TH.grad, rtol=1e-10, atol=1e-12)
    met = set(batch.slots_TK.flatten().tolist()) - {len(batch.experts)}
    assert {slot for slot, gradient in enumerate(given) if gradient is not None} == met
    for slot in met:
        torch.testing.assert_close(given[slot], weights[slot].grad, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_choice_by_shape():
    experts = random_experts(dtype=torch.float32)
    batches = [random_batch(tokens, experts, torch.float32) for tokens in (1, 2, 500)]
    assert [kernels.choose_kernel(batch) for batch in batches] == [kernels.one_token, kernels.loop, kernels.loop]
    torch.testing.assert_close(kernels.mix_experts(batches[0]), kernels.loop(batches[0]))


def test_what_suits_grouped_products():
    x_TH = torch.zeros(2, HIDDEN)
    assert kernels.has_few_plain_widths(random_experts((8, 16, 0, 8, 16, 0, 8, 8, 8, 8, 8, 8)), x_TH)
    for widths in [(8, 16, 24, 8), (4, 4, 4, 4)]:
        assert not kernels.has_few_plain_widths(random_experts(widths), x_TH)
    assert not kernels.has_few_plain_widths(random_experts((8,) * 4, bias=True), x_TH)
    assert not kernels.has_few_plain_widths(random_experts((8,) * 4), torch.zeros(2, HIDDEN, device="meta"))
    hooked, patched = random_experts((8,) * 4), random_experts((8,) * 4)
    hooked[1].up_proj.register_forward_hook(lambda _layer, _inputs, output: 2 * output)
    patched[1].up_proj.forward = lambda x_TH: x_TH
    grouped = random_experts((8,) * 4)
    grouped[1].up_proj = GroupedLinear(HIDDEN, 8, 4, 8, "nearest", bias=False)
    assert not kernels.has_few_plain_widths(grouped, x_TH)
    assert not kernels.has_few_plain_widths(hooked, x_TH)
    assert not kernels.has_few_plain_widths(patched, x_TH)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [kernels.one_token, kernels.loop])
def test_layers_that_stand_for_linear_ones_are_called(kernel):
    experts = random_experts((64, 128), torch.float32, hidden=64)
    rounded = copy.deepcopy(experts)
    for expert, other in zip(experts, rounded, strict=True):
        for name, linear in list(expert.named_children()):
            four_bit = four_bit_linear(linear.weight, None, block_size=64, nested=False)
            setattr(expert, name, four_bit)
            getattr(other, name).weight.copy_(four_bit(torch.eye(linear.in_features)).T)
    batch = random_batch(1 if kernel is kernels.one_token else 7, experts, torch.float32, top_k=2, hidden=64)
    expected = by_hand(random_batch(len(batch.hidden_TH), rounded, torch.float32, top_k=2, hidden=64))
    torch.testing.assert_close(kernel(batch), expected, rtol=1e-4, atol=1e-2)
