"""First order, second order and removal against the model itself, run with an expert really gone."""

import copy
from collections.abc import Callable

import pytest
import torch

from moeprune.calibration.expert_ablation import ExpertAblationPass
from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.models.runtime.router import keep_router_rows
from moeprune.scoring.activation import ActivationScorer
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.removal import RemovalScorer
from moeprune.scoring.true_ablation import TrueAblationScorer

ALPHA = 0.9


@pytest.fixture
def ablation(tiny_model_64, random_windows, seen_layers) -> Callable:
    """``ablation(change)``: relative squared error [L, E, T] of each layer's output when ``change(layer, expert)`` was
    made to that layer of a copy of the model, or with ``change(layer, None)`` [L, 1, T] for no expert in particular."""

    def outputs(model):
        with seen_layers(model) as seen:
            model(random_windows.input_ids_NT)
        return [layer.y_TH for layer in seen]

    def measure(change, experts=None):
        intact = outputs(tiny_model_64)
        rows = []
        for layer, y_TH in enumerate(intact):
            errors = []
            for expert in experts or range(moe_layers(tiny_model_64)[layer].expert_count):
                changed = copy.deepcopy(tiny_model_64)
                with torch.no_grad():
                    change(moe_layers(changed)[layer], expert)
                error_T = (outputs(changed)[layer] - y_TH).square().sum(dim=-1)
                errors.append(error_T / (y_TH.square().sum(dim=-1) + OUTPUT_NORM_EPS))
            rows.append(torch.stack(errors))
        return torch.stack(rows)

    return measure


@pytest.fixture
def statistics(tiny_model_64, random_windows):
    return collect_statistics(tiny_model_64, random_windows, batch_size=5)


def silence(layer, expert) -> None:
    layer.experts.down_proj[expert] = 0


def test_removal_is_the_loss_of_a_model_whose_expert_is_silent(ablation, statistics):
    loss_LE = ablation(silence).sum(dim=-1)
    torch.testing.assert_close(RemovalScorer()(statistics).expert_LE, loss_LE, rtol=1e-9, atol=1e-14)


def test_second_order_is_the_change_of_loss_of_a_scaled_model_and_first_order_misses_the_square(ablation, statistics):
    def scale(layer, expert):
        layer.experts.down_proj *= ALPHA
        if expert is not None:
            silence(layer, expert)

    change_LE = (ablation(scale) - ablation(scale, experts=[None])).sum(dim=-1)
    second_LE, first_LE = (score(statistics).expert_LE for score in (RemovalScorer(ALPHA, False), AttributionScorer()))
    torch.testing.assert_close(second_LE, change_LE, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(first_LE, change_LE - ALPHA**2 * statistics.removal_sum_LE, rtol=1e-8, atol=1e-13)


def remove(layer, expert) -> None:
    kept = torch.tensor([other for other in range(layer.expert_count) if other != expert])
    keep_router_rows(layer.router, kept)
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer.experts, name, torch.nn.Parameter(getattr(layer.experts, name)[kept]))
    layer.experts.num_experts = len(kept)


@pytest.mark.parametrize("model_name", ["qwen3_renormalised"])
def test_renormalised_gates_of_tokens_that_never_had_the_expert_do_not_change(
    ablation, tiny_model_64, random_windows, seen_layers
):
    """Plain gates do: the softmax runs over one expert less."""
    error_LET = ablation(remove)
    with seen_layers(tiny_model_64) as seen:
        tiny_model_64(random_windows.input_ids_NT)
    for error_ET, saw in zip(error_LET, seen, strict=True):
        had_ET = torch.stack([(saw.experts_TK == expert).any(dim=1) for expert in range(saw.layer.expert_count)])
        assert error_ET[~had_ET].max() < 1e-12
        assert error_ET[had_ET].min() > 1e-5


def test_true_ablation_is_the_loss_of_a_model_without_the_expert(ablation, tiny_model_64, random_windows, statistics):
    """Up to the router's softmax, which is in float32."""
    scorer = TrueAblationScorer()
    (found,) = (one(tiny_model_64, random_windows, 5) for one in scorer.passes)
    torch.testing.assert_close(found.loss_LE, ablation(remove).sum(dim=-1), rtol=1e-4, atol=1e-6)
    scores, usual = scorer(statistics, found), ActivationScorer()(statistics)
    assert torch.equal(scores.expert_LE, found.loss_LE)
    assert torch.equal(scores.channel_LEC, usual.channel_LEC) and torch.equal(scores.layer_L, usual.layer_L)


def test_true_ablation_of_a_sample_is_that_of_fewer_tokens(tiny_model_64, random_windows):
    everything = ExpertAblationPass()(tiny_model_64, random_windows, 5)
    sampled = ExpertAblationPass(tokens=20)(tiny_model_64, random_windows, 5)
    assert (sampled.loss_LE <= everything.loss_LE).all() and (sampled.loss_LE < everything.loss_LE).any()
    again = ExpertAblationPass(tokens=20)(tiny_model_64, random_windows, 2)
    torch.testing.assert_close(again.loss_LE, sampled.loss_LE, rtol=1e-9, atol=1e-12)


def test_the_second_order_of_experts_goes_with_activation_of_channels(statistics):
    scores, usual = ActivationScorer("second_order")(statistics), ActivationScorer()(statistics)
    assert torch.equal(scores.expert_LE, RemovalScorer(ALPHA, False)(statistics).expert_LE)
    assert torch.equal(scores.channel_LEC, usual.channel_LEC)
    assert torch.equal(usual.expert_LE, AttributionScorer()(statistics).expert_LE)
    with pytest.raises(InputError, match=r"scorer\.experts"):
        ActivationScorer("third_order")
