"""Scorers of gradients against their formulas on autograd through dense experts."""

import pytest
import torch
from dense_experts import trace_block_local, trace_language_model
from pass_checks import assert_close_to_scale

from moeprune.calibration.loss_gradients import LossGradientPass
from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import moe_layers
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.gradient import EndToEndScorer, GradientScorer, HeaprScorer, SaliencyScorer, SnipScorer
from moeprune.types import Scores

SCORERS = [SaliencyScorer, GradientScorer, SnipScorer, HeaprScorer, EndToEndScorer]
LOSSES = ["block_local", "language_model"]
every_scorer = pytest.mark.parametrize("scorer_type", SCORERS, ids=lambda kind: kind.__name__)
both_losses = pytest.mark.parametrize("loss", LOSSES)


def scores_of(scorer, model, windows: TokenWindows, batch_size: int = 5) -> Scores:
    results = [one(model, windows, batch_size) for one in scorer.passes]
    return scorer(collect_statistics(model, windows, batch_size), *results)


def traced_layers(model, windows, seen_layers, loss):
    """Traced of every layer, all windows in one batch."""
    if loss == "language_model":
        (batch,) = trace_language_model(model, windows, 5)
        return batch
    with seen_layers(model) as seen:
        model.base_model(windows.input_ids_NT)
    return [trace_block_local(saw, 0.9) for saw in seen]


def by_definition_EC(scorer, layer, traced):
    """The scorer's formula on one expert's routed tokens after the other."""
    rows = []
    for expert in range(layer.expert_count):
        routed_T = traced.routed_TE[:, expert]
        h_nC, d_nC, df_nH = (value[routed_T, expert] for value in (traced.h_TEC, traced.dh_TEC, traced.df_TEH))
        if not len(h_nC):
            rows.append(torch.zeros(layer.widths[0], dtype=torch.float64))
        elif isinstance(scorer, SaliencyScorer):
            rows.append((h_nC * d_nC).abs().mean(dim=0))
        elif isinstance(scorer, GradientScorer):
            rows.append(d_nC.square().mean(dim=0).sqrt())
        elif isinstance(scorer, SnipScorer):
            rows.append(traced.weight_saliency_EC[expert])
        elif isinstance(scorer, HeaprScorer):
            covariance_HH = df_nH.T @ df_nH / len(df_nH)
            columns = layer.experts.down_proj[expert].detach().T
            curvatures = torch.stack([column_H @ covariance_HH @ column_H for column_H in columns])
            rows.append(0.5 * h_nC.square().mean(dim=0) * curvatures)
        elif scorer.order == "first":
            rows.append(-(h_nC * d_nC).sum(dim=0))
        else:
            rows.append(0.5 * (h_nC * d_nC).square().sum(dim=0))
    return torch.stack(rows)


@both_losses
@pytest.mark.parametrize(("first", "tokens"), [(5, 11), (1, 4)])
def test_every_score_is_its_formula(tiny_model_64, random_windows, seen_layers, loss, first, tokens):
    """Also with so few tokens that experts get one or none."""
    windows = TokenWindows(random_windows.input_ids_NT[:first, :tokens], random_windows.mask_NT[:first, :tokens])
    traced = traced_layers(tiny_model_64, windows, seen_layers, loss)
    fisher = EndToEndScorer(loss, order="fisher")
    for scorer in [*(kind(loss) for kind in SCORERS), fisher]:
        scores = scores_of(scorer, tiny_model_64, windows)
        for index, layer in enumerate(moe_layers(tiny_model_64)):
            expected_EC = by_definition_EC(scorer, layer, traced[index])
            assert expected_EC.abs().max() > 0
            # Norms and routers compute in float32; through the whole model that shows.
            assert_close_to_scale(scores.channel_LEC[index], expected_EC, 1e-5)


@pytest.mark.parametrize("scorer_type", [SaliencyScorer, GradientScorer], ids=lambda kind: kind.__name__)
def test_the_block_local_closed_form_equals_the_backward_pass(tiny_model_64, random_windows, scorer_type):
    scorer = scorer_type()
    assert scorer.passes == ()
    statistics = collect_statistics(tiny_model_64, random_windows, 5)
    gradients = LossGradientPass("block_local")(tiny_model_64, random_windows, 5)
    assert_close_to_scale(scorer(statistics).channel_LEC, scorer(statistics, gradients).channel_LEC, 1e-10)


def test_block_local_first_order_is_attribution(tiny_model_64, random_windows):
    first = scores_of(EndToEndScorer("block_local"), tiny_model_64, random_windows)
    attribution = scores_of_attribution(tiny_model_64, random_windows)
    assert_close_to_scale(first.channel_LEC, attribution.channel_LEC, 1e-10)
    assert_close_to_scale(first.expert_LE, attribution.expert_LE, 1e-10)


def scores_of_attribution(model, windows) -> Scores:
    return AttributionScorer()(collect_statistics(model, windows, 5))


@both_losses
@every_scorer
def test_experts_are_scored_by_attribution_or_by_the_sum_of_their_channels(
    tiny_model_64, random_windows, scorer_type, loss
):
    scores = scores_of(scorer_type(loss), tiny_model_64, random_windows)
    attribution = scores_of_attribution(tiny_model_64, random_windows)
    if scorer_type in (HeaprScorer, EndToEndScorer):
        assert torch.equal(scores.expert_LE, scores.channel_LEC.sum(dim=-1))
    else:
        assert torch.equal(scores.expert_LE, attribution.expert_LE)
    assert torch.equal(scores.layer_L, attribution.layer_L)


@both_losses
@every_scorer
@torch.no_grad()
def test_permuting_experts_permutes_scores(tiny_model_64, random_windows, scorer_type, loss):
    before = scores_of(scorer_type(loss), tiny_model_64, random_windows)
    layers = moe_layers(tiny_model_64)
    order = torch.randperm(layers[0].expert_count, generator=torch.Generator().manual_seed(5))
    for layer in layers:
        for weight in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
            weight.copy_(weight[order].clone())
    after = scores_of(scorer_type(loss), tiny_model_64, random_windows)
    assert_close_to_scale(after.channel_LEC, before.channel_LEC[:, order], 1e-5)
    assert_close_to_scale(after.expert_LE, before.expert_LE[:, order], 1e-5)


def test_a_scorer_asks_for_the_pass_that_it_needs():
    assert SnipScorer().passes == (LossGradientPass("block_local", 0.9),)
    assert SaliencyScorer("language_model").passes == (LossGradientPass("language_model"),)
    assert HeaprScorer().passes == EndToEndScorer().passes == GradientScorer("language_model").passes


@every_scorer
def test_another_loss_is_refused(scorer_type):
    with pytest.raises(InputError, match="loss=global"):
        scorer_type(loss="global")


def test_another_order_is_refused():
    with pytest.raises(InputError, match="order=second"):
        EndToEndScorer(order="second")
