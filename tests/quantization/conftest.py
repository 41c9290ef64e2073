"""A pruned model to quantise."""

import pytest
import torch

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
