"""The closed forms against autograd and direct recomputation of the block-local loss, in float64, routing fixed.

loss(mask) = sum_t q_t ||y'_t - y_t||^2,   y' = y with the channels of all routed experts multiplied by the mask
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import InputError
from moeprune.scoring.attribution import AttributionScorer, attribution_LEC, block_local_loss_L
from moeprune.scoring.removal import RemovalScorer

ALPHA = 0.9


@dataclass(frozen=True)
class Block:
    """The routed part of one layer as a function of one mask per channel; tokens and routing as they were seen."""

    y_TH: Tensor
    gates_TE: Tensor
    h_TEC: Tensor
    down_EHC: Tensor

    @classmethod
    def of(cls, seen) -> "Block":
        experts = seen.layer.experts
        gate_TEC, up_TEC = torch.einsum("th,eih->tei", seen.x_TH, experts.gate_up_proj.detach()).chunk(2, dim=-1)
        gates_TE = torch.zeros(len(seen.x_TH), seen.layer.expert_count, dtype=torch.float64)
        gates_TE.scatter_(1, seen.experts_TK, seen.gates_TK.double())
        return cls(seen.y_TH, gates_TE, experts.act_fn(gate_TEC) * up_TEC, experts.down_proj.detach())

    def routed(self, mask_EC: Tensor) -> Tensor:
        """m_TH with every channel multiplied by its mask."""
        f_TEH = torch.einsum("tec,ehc->teh", self.h_TEC * mask_EC, self.down_EHC)
        return torch.einsum("te,teh->th", self.gates_TE, f_TEH)

    def loss(self, mask_EC: Tensor) -> Tensor:
        others_TH = self.y_TH - self.routed(torch.ones_like(mask_EC))
        changed_TH = others_TH + self.routed(mask_EC)
        error_T = (changed_TH - self.y_TH).square().sum(dim=-1)
        return (error_T / (self.y_TH.square().sum(dim=-1) + OUTPUT_NORM_EPS)).sum()

    def mask(self, value: float) -> Tensor:
        return torch.full((self.h_TEC.shape[1], self.h_TEC.shape[2]), value, dtype=torch.float64)


@pytest.fixture
def statistics_and_blocks(tiny_model_64, random_windows, seen_layers):
    with seen_layers(tiny_model_64) as seen:
        statistics = collect_statistics(tiny_model_64, random_windows, batch_size=2)
    return statistics, [Block.of(layer) for layer in seen]


def assert_close_to_scale(actual: Tensor, expected: Tensor) -> None:
    """Relative to each value, and for values that cancel to nearly nothing, to the largest."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13 * float(expected.abs().max()))


def test_the_block_computes_what_the_layer_computed(tiny_model_64, random_windows, seen_layers):
    """Otherwise the other tests of this file would compare nothing."""
    with seen_layers(tiny_model_64) as seen:
        tiny_model_64(random_windows.input_ids_NT)
    for layer in seen:
        block = Block.of(layer)
        torch.testing.assert_close(block.routed(block.mask(1.0)), layer.m_TH, rtol=1e-12, atol=1e-12)
        assert 0.05 < layer.m_TH.norm() / layer.y_TH.norm() < 2


@pytest.mark.parametrize("alpha", [ALPHA, 0.5])
def test_channel_attribution_equals_autograd(statistics_and_blocks, alpha):
    """``A_ec = -mask_ec dL/dmask_ec`` at mask = alpha."""
    statistics, blocks = statistics_and_blocks
    scores = AttributionScorer(alpha)(statistics)
    for layer, block in enumerate(blocks):
        mask_EC = block.mask(alpha).requires_grad_()
        (gradient_EC,) = torch.autograd.grad(block.loss(mask_EC), mask_EC)
        assert_close_to_scale(scores.channel_LEC[layer], -alpha * gradient_EC)


def test_expert_attribution_equals_autograd_with_one_mask_per_expert(statistics_and_blocks):
    statistics, blocks = statistics_and_blocks
    scores = AttributionScorer(ALPHA)(statistics)
    for layer, block in enumerate(blocks):
        mask_E1 = torch.full((len(block.down_EHC), 1), ALPHA, dtype=torch.float64, requires_grad=True)
        loss = block.loss(mask_E1.expand(-1, block.h_TEC.shape[2]))
        (gradient_E1,) = torch.autograd.grad(loss, mask_E1)
        assert_close_to_scale(scores.expert_LE[layer], -ALPHA * gradient_E1.flatten())


def test_layer_loss_equals_the_loss_at_alpha(statistics_and_blocks):
    statistics, blocks = statistics_and_blocks
    expected = torch.stack([block.loss(block.mask(ALPHA)) for block in blocks])
    assert_close_to_scale(block_local_loss_L(statistics, ALPHA), expected)
    assert_close_to_scale(AttributionScorer(ALPHA)(statistics).layer_L, expected)


def test_expert_removal_equals_the_loss_without_that_expert(statistics_and_blocks):
    """``R_e = sum_t q g^2 ||f||^2`` is the exact loss of removing one expert from the intact layer."""
    statistics, blocks = statistics_and_blocks
    scores = RemovalScorer()(statistics)
    for layer, block in enumerate(blocks):
        losses = []
        for expert in range(len(block.down_EHC)):
            mask_EC = block.mask(1.0)
            mask_EC[expert] = 0
            losses.append(block.loss(mask_EC))
        assert_close_to_scale(scores.expert_LE[layer], torch.stack(losses))


def test_channel_removal_equals_the_loss_without_that_channel(statistics_and_blocks):
    """``R_ec = ||w_c||^2 sum_t q g^2 h^2``."""
    statistics, blocks = statistics_and_blocks
    removal_LEC = RemovalScorer()(statistics).channel_LEC
    for layer, block in enumerate(blocks):
        losses_EC = torch.zeros_like(block.mask(1.0))
        for expert, channel in torch.cartesian_prod(*(torch.arange(size) for size in losses_EC.shape)).tolist():
            mask_EC = block.mask(1.0)
            mask_EC[expert, channel] = 0
            losses_EC[expert, channel] = block.loss(mask_EC)
        assert_close_to_scale(removal_LEC[layer], losses_EC)


def test_removal_at_alpha_is_exact_to_second_order(statistics_and_blocks):
    """``A_e + alpha^2 R_e`` is the change of the loss at alpha when expert e goes."""
    statistics, blocks = statistics_and_blocks
    predicted_LE = RemovalScorer(ALPHA, intact=False)(statistics).expert_LE
    for layer, block in enumerate(blocks):
        start = block.loss(block.mask(ALPHA))
        changes = []
        for expert in range(len(block.down_EHC)):
            mask_EC = block.mask(ALPHA)
            mask_EC[expert] = 0
            changes.append(block.loss(mask_EC) - start)
        assert_close_to_scale(predicted_LE[layer], torch.stack(changes))


def test_channel_removal_at_alpha_is_exact_to_second_order(statistics_and_blocks):
    """``A_ec + alpha^2 R_ec`` is the change of the loss at alpha when channel c of expert e goes."""
    statistics, blocks = statistics_and_blocks
    predicted_LEC = RemovalScorer(ALPHA, intact=False)(statistics).channel_LEC
    for layer, block in enumerate(blocks):
        start = block.loss(block.mask(ALPHA))
        changes_EC = torch.zeros_like(block.mask(1.0))
        for expert, channel in torch.cartesian_prod(*(torch.arange(size) for size in changes_EC.shape)).tolist():
            mask_EC = block.mask(ALPHA)
            mask_EC[expert, channel] = 0
            changes_EC[expert, channel] = block.loss(mask_EC) - start
        assert_close_to_scale(predicted_LEC[layer], changes_EC)


@pytest.mark.parametrize("scorer_type", [AttributionScorer, RemovalScorer])
@pytest.mark.parametrize("alpha", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_an_alpha_that_scales_by_nothing_or_too_much_is_refused(scorer_type, alpha):
    with pytest.raises(InputError, match=rf"alpha={alpha} is not possible\.\nUse a number above 0 and below 1"):
        scorer_type(alpha)


def test_attribution_vanishes_for_the_intact_model(statistics_and_blocks):
    statistics, _ = statistics_and_blocks
    assert (attribution_LEC(statistics, 1.0) == 0).all()
    assert (block_local_loss_L(statistics, 1.0) == 0).all()


def test_an_expert_is_the_sum_of_its_channels(statistics_and_blocks):
    statistics, _ = statistics_and_blocks
    scores = AttributionScorer(ALPHA)(statistics)
    assert torch.equal(scores.expert_LE, scores.channel_LEC.sum(dim=-1))
