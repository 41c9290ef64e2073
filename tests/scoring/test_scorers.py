"""Activation and frequency against loops over tokens, and what holds for every scorer."""

import dataclasses

import pytest
import torch

from moeprune.calibration.statistics import collect_statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import NumericalError
from moeprune.models.adapter import moe_layers
from moeprune.scoring.activation import ActivationScorer
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.frequency import FrequencyScorer
from moeprune.types import Scores

SCORERS = [ActivationScorer(), AttributionScorer(), FrequencyScorer()]


def activations_of(seen, expert):
    """gate, up and h of every token routed to the expert, as three lists of rows."""
    gate_up, width = seen.layer.experts.gate_up_proj[expert], seen.layer.widths[expert]
    tokens = (seen.experts_TK == expert).any(dim=1).nonzero().flatten().tolist()
    gates = [gate_up[:width] @ seen.x_TH[token] for token in tokens]
    ups = [gate_up[width:] @ seen.x_TH[token] for token in tokens]
    return gates, ups, [seen.layer.experts.act_fn(gate) * up for gate, up in zip(gates, ups, strict=True)]


@pytest.mark.parametrize(("first", "tokens"), [(5, 11), (1, 4)])
@torch.no_grad()
def test_activation_is_the_mean_of_three_root_mean_squares(tiny_model_64, random_windows, seen_layers, first, tokens):
    """Also with so few tokens that experts get one or none."""
    windows = TokenWindows(random_windows.input_ids_NT[:first, :tokens], random_windows.mask_NT[:first, :tokens])
    with seen_layers(tiny_model_64) as seen:
        statistics = collect_statistics(tiny_model_64, windows, batch_size=5)
    scores = ActivationScorer()(statistics)
    for layer, saw in enumerate(seen):
        for expert in range(saw.layer.expert_count):
            if not statistics.routed_tokens_LE[layer, expert]:
                assert (scores.channel_LEC[layer, expert] == 0).all()
                continue
            rows = [torch.stack(values) for values in activations_of(saw, expert)]
            expected = sum((values**2).mean(dim=0) ** 0.5 for values in rows) / 3
            torch.testing.assert_close(scores.channel_LEC[layer, expert], expected, rtol=1e-11, atol=1e-13)


def test_activation_scores_experts_and_layers_by_attribution(tiny_model_64, random_windows):
    statistics = collect_statistics(tiny_model_64, random_windows, batch_size=5)
    activation, attribution = ActivationScorer(0.8)(statistics), AttributionScorer(0.8)(statistics)
    assert torch.equal(activation.expert_LE, attribution.expert_LE)
    assert torch.equal(activation.layer_L, attribution.layer_L)


@torch.no_grad()
def test_frequency_counts_the_tokens_of_each_expert(tiny_model_64, random_windows, seen_layers):
    with seen_layers(tiny_model_64) as seen:
        scores = FrequencyScorer()(collect_statistics(tiny_model_64, random_windows, batch_size=5))
    counts = [[int((saw.experts_TK == e).sum()) for e in range(saw.layer.expert_count)] for saw in seen]
    assert scores.expert_LE.tolist() == counts
    assert scores.channel_LEC is None


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
@torch.no_grad()
def test_permuting_experts_permutes_scores(tiny_model_64, random_windows, scorer):
    before = scorer(collect_statistics(tiny_model_64, random_windows, batch_size=5))
    layers = moe_layers(tiny_model_64)
    order = torch.randperm(layers[0].expert_count, generator=torch.Generator().manual_seed(5))
    for layer in layers:
        for weight in (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
            weight.copy_(weight[order].clone())
    after = scorer(collect_statistics(tiny_model_64, random_windows, batch_size=5))
    # The routers compute the softmax in float32, whose sum depends on the order of the experts.
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(after.expert_LE, before.expert_LE[:, order], **close)
    torch.testing.assert_close(after.layer_L, before.layer_L, **close)
    if before.channel_LEC is not None:
        torch.testing.assert_close(after.channel_LEC, before.channel_LEC[:, order], **close)


def _expert_one_for_expert_zero(_router, _inputs, output):
    logits_TE, gates_TK, experts_TK = output
    return logits_TE, gates_TK, experts_TK.masked_fill(experts_TK == 0, 1)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: type(scorer).__name__)
def test_an_expert_that_no_token_reaches_scores_zero(tiny_model_64, random_windows, scorer):
    moe_layers(tiny_model_64)[0].router.register_forward_hook(_expert_one_for_expert_zero)
    scores = scorer(collect_statistics(tiny_model_64, random_windows, batch_size=5))
    assert scores.expert_LE[0, 0] == 0
    assert scores.expert_LE[0, 1] != 0
    if scores.channel_LEC is not None:
        assert (scores.channel_LEC[0, 0] == 0).all()
        assert (scores.channel_LEC[0, 1] != 0).all()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Scores)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_a_numerical_error(field, value):
    shapes = {"channel_LEC": (2, 3, 4), "expert_LE": (2, 3), "layer_L": (2,)}
    tensors = {name: torch.ones(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors[field].view(-1)[-1] = value
    with pytest.raises(NumericalError, match=field):
        Scores(**tensors)


def test_scores_survive_a_round_trip(tmp_path):
    scores = Scores(None, torch.rand(2, 3, dtype=torch.float64), torch.rand(2, dtype=torch.float64))
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert loaded.channel_LEC is None
    assert torch.equal(loaded.expert_LE, scores.expert_LE)
    assert torch.equal(loaded.layer_L, scores.layer_L)
