"""A pruned model to quantise."""

import pytest
import torch

from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import moe_layers
from moeprune.surgery.prune import prune
from moeprune.types import Plan


@pytest.fixture
def pruned(tiny_model):
    """Expert 0 of the first layer removed, expert 1 of width 16, the others of width 8."""
    layers = moe_layers(tiny_model)
    kept = tuple(
        tuple(
            torch.arange(0 if (index, expert) == (0, 0) else 16 if expert == 1 else 8)
            for expert in range(layer.expert_count)
        )
        for index, layer in enumerate(layers)
    )
    return prune(tiny_model, Plan(kept, layers[0].widths[0]))


@pytest.fixture
def pruned_64(build_model, model_name):
    """A model in float64 whose experts have all kinds of widths, and one in the first layer none."""
    model = build_model(model_name, torch.float64)
    layers = moe_layers(model)
    kept = [[torch.arange(layer.widths[0] - expert) for expert in range(layer.expert_count)] for layer in layers]
    kept[0][1] = torch.arange(0)
    return prune(model, Plan(tuple(map(tuple, kept)), layers[0].widths[0]))


@pytest.fixture
def padded_windows() -> TokenWindows:
    """Seven windows of 12 random tokens; in every other one the last four are padding."""
    input_ids_NT = torch.randint(1, 257, (7, 12), generator=torch.Generator().manual_seed(2))
    mask_NT = torch.ones_like(input_ids_NT)
    mask_NT[::2, 8:] = 0
    return TokenWindows(input_ids_NT, mask_NT)
