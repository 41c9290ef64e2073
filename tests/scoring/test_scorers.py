"""What holds for every scorer of routed tokens, and for scores."""

import pytest
import torch

from moeprune.calibration.statistics import collect_statistics
from moeprune.errors import NumericalError
from moeprune.models.adapter import moe_layers
from moeprune.scoring.activation import ActivationScorer
from moeprune.scoring.aimer import AimerScorer
from moeprune.scoring.attribution import AttributionScorer
from moeprune.scoring.camera import CameraScorer
from moeprune.scoring.expert_outputs import EasyEpScorer, ExpertOutputScorer, MoneScorer
from moeprune.scoring.flap import FlapScorer
from moeprune.scoring.frequency import FrequencyScorer, RouterScoreScorer, SoftCountScorer
from moeprune.scoring.magnitude import MagnitudeScorer
from moeprune.scoring.removal import RemovalScorer
from moeprune.scoring.wanda import WandaScorer
from moeprune.types import ExpertWeights, Scores

# These see only what tokens do in the experts they are routed to.
OF_ROUTED_TOKENS = [
    ActivationScorer(),
    AttributionScorer(),
    AttributionScorer(usage=True),
    CameraScorer(),
    EasyEpScorer(),
    ExpertOutputScorer(gated=False, squared=False, per_token=False),
    ExpertOutputScorer(gated=True, squared=False, per_token=True),
    ExpertOutputScorer(gated=False, squared=True, per_token=True),
    FrequencyScorer(),
    MoneScorer(),
    MoneScorer(over_routed_tokens=True),
    RemovalScorer(),
    RemovalScorer(intact=False),
    SoftCountScorer(),
    WandaScorer(),
    WandaScorer(inputs=True),
]
SCORERS = [*OF_ROUTED_TOKENS, AimerScorer(), FlapScorer(), MagnitudeScorer(), RouterScoreScorer()]


@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
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


@pytest.fixture
def statistics_without_expert_zero(tiny_model_64, random_windows):
    """Of a model whose first layer sends the tokens of expert 0 to expert 1."""
    moe_layers(tiny_model_64)[0].router.register_forward_hook(_expert_one_for_expert_zero)
    return collect_statistics(tiny_model_64, random_windows, batch_size=5)


@pytest.mark.parametrize("scorer", OF_ROUTED_TOKENS, ids=repr)
def test_an_expert_that_no_token_reaches_scores_zero(statistics_without_expert_zero, scorer):
    scores = scorer(statistics_without_expert_zero)
    assert scores.expert_LE[0, 0] == 0
    assert scores.expert_LE[0, 1] != 0
    if scores.channel_LEC is not None:
        assert (scores.channel_LEC[0, 0] == 0).all()
        assert (scores.channel_LEC[0, 1] != 0).all()


def test_flap_gives_channels_that_no_token_reaches_the_least_score_of_their_layer(statistics_without_expert_zero):
    channel_LEC = FlapScorer()(statistics_without_expert_zero).channel_LEC
    assert channel_LEC is not None
    assert (channel_LEC[0, 0] == channel_LEC[0].min()).all()
    assert (channel_LEC[0, 1] > channel_LEC[0].min()).all()


@pytest.mark.parametrize("scorer", SCORERS, ids=repr)
def test_layers_are_scored_by_their_loss_and_classes_say_whether_they_score_channels(
    statistics_without_expert_zero, scorer
):
    scores = scorer(statistics_without_expert_zero)
    torch.testing.assert_close(scores.layer_L, 0.01 * statistics_without_expert_zero.routed_output_loss_L)
    assert getattr(scorer, "scores_channels", True) == (scores.channel_LEC is not None)
    assert {value.dtype for value in (scores.channel_LEC, scores.expert_LE) if value is not None} == {torch.float64}


def _full_scores() -> dict[str, torch.Tensor]:
    shapes = {"channel_LEC": (2, 3, 4), "expert_LE": (2, 3), "layer_L": (2,), "distance_LEE": (2, 3, 3)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("field", list(_full_scores()))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_a_numerical_error(field, value):
    tensors = _full_scores()
    tensors[field].view(-1)[-1] = value
    with pytest.raises(NumericalError, match=field):
        Scores(**tensors)


def test_expert_weights_that_are_not_finite_are_a_numerical_error():
    ones_LE = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"weights\.router_LE"):
        Scores(**_full_scores(), weights=ExpertWeights(ones_LE, ones_LE, ones_LE * torch.nan, ones_LE))


def test_scores_survive_a_round_trip(tmp_path):
    weights = ExpertWeights(*torch.rand(4, 2, 3, dtype=torch.float64).unbind())
    subset_LEE = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    scores = Scores(**_full_scores(), subset_LEE=subset_LEE, weights=weights)
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    for name, value in {**_full_scores(), "subset_LEE": subset_LEE}.items():
        assert torch.equal(getattr(loaded, name), value)
        assert getattr(loaded, name).dtype == value.dtype
    assert loaded.weights is not None
    for name, value in vars(weights).items():
        assert torch.equal(getattr(loaded.weights, name), value)


def test_scores_without_optional_parts_survive_a_round_trip(tmp_path):
    Scores(None, torch.rand(2, 3), torch.rand(2)).save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert (loaded.channel_LEC, loaded.subset_LEE, loaded.distance_LEE, loaded.weights) == (None, None, None, None)


def test_scores_that_share_memory_and_carry_everything_survive_a_round_trip(tmp_path):
    used_LE = torch.rand(2, 3, dtype=torch.float64)
    weights = ExpertWeights(used_LE + 1, used_LE, used_LE, used_LE)
    subset_LEE = torch.tril(torch.ones(3, 3)).bool().expand(2, 3, 3)
    scores = Scores(None, used_LE, used_LE[:, 0], subset_LEE, torch.rand(2, 3, 3, dtype=torch.float64), weights)
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.subset_LEE, subset_LEE)
    assert torch.equal(loaded.distance_LEE, scores.distance_LEE)
    for name, value in vars(weights).items():
        assert torch.equal(getattr(loaded.weights, name), value)
