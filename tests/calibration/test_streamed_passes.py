"""Passes beyond the statistics find the same, bit for bit, whether layers lie in memory or on disk."""

from dataclasses import fields

import pytest
import torch
from families import build_family, save_as_the_hub_does
from pass_checks import left_as_it_was

from moeprune.calibration.all_tokens import AllTokensPass
from moeprune.calibration.expert_ablation import ExpertAblationPass
from moeprune.calibration.expert_subsets import ExpertSubsetPass
from moeprune.calibration.loss_gradients import BLOCK_LOCAL, LANGUAGE_MODEL, LossGradientPass
from moeprune.calibration.released_attribution import ReleasedAttributionPass
from moeprune.errors import InputError
from moeprune.models.adapter import decoder_layers
from moeprune.models.families import to_contract
from moeprune.models.layers.streaming import stream_dense
from moeprune.models.layers.workspace import Workspace

CPU = torch.device("cpu")
PASSES = {
    "all_tokens": AllTokensPass(groups=2),
    "expert_ablation": ExpertAblationPass(tokens=20),
    "expert_subsets": ExpertSubsetPass(tokens=20, exhaustive_up_to=6),
    "block_local": LossGradientPass(BLOCK_LOCAL),
    "released_attribution": ReleasedAttributionPass(),
}


@pytest.fixture(params=["qwen2_moe", "gpt_oss", "llama4"])
def family(request):
    return request.param


@pytest.fixture
def streamed(family, tmp_path):
    save_as_the_hub_does(build_family(family), tmp_path)
    model = stream_dense(tmp_path, torch.float64, (CPU,))
    # The grouped matrix product that transformers prefers does not know float64.
    model.model.config._experts_implementation = "eager"
    return model


@pytest.mark.parametrize("name", PASSES)
def test_a_streamed_model_gives_the_same(family, streamed, name, random_windows, tmp_path):
    """With its hidden states in files."""
    whole = build_family(family)
    to_contract(whole)
    with left_as_it_was(whole, random_windows.input_ids_NT):
        expected = PASSES[name](whole, random_windows, batch_size=2)
    workspace = Workspace(tmp_path / "walk", activations_gib=0.0)
    found = PASSES[name](streamed, random_windows, 2, workspace)
    assert workspace.depth == len(list(decoder_layers(streamed.model)))
    for field in fields(expected):
        assert torch.equal(getattr(found, field.name), getattr(expected, field.name))
    for _, layer in decoder_layers(streamed.model):
        assert all(parameter.is_meta for parameter in layer.parameters())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())


@pytest.mark.parametrize("family", ["qwen2_moe"], indirect=True)
def test_a_loss_at_the_end_needs_the_whole_model(streamed, random_windows):
    end_to_end = LossGradientPass(LANGUAGE_MODEL)
    assert end_to_end.needs_whole_model and not PASSES["block_local"].needs_whole_model
    with pytest.raises(InputError, match=r"(?s)need the whole model in memory.*Use loss=block_local"):
        end_to_end(streamed, random_windows, batch_size=2)
