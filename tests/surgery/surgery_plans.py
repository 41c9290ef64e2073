"""Plans for tests of surgery, and masks that say the same of a dense model."""

import torch

from moeprune.models.adapter import moe_layers
from moeprune.types import Plan


def plan_of(model, kept_of, merge=None) -> Plan:
    """``kept_of(layer, expert, width)`` gives the channels that stay."""
    layers = moe_layers(model)
    width = layers[0].widths[0]
    kept = [[kept_of(index, e, width) for e in range(layer.expert_count)] for index, layer in enumerate(layers)]
    return Plan(tuple(map(tuple, kept)), width, merge=merge)


def gate_up_of(experts, slot):
    """Gate rows, then up rows, of a stored expert of a pruned layer [2C, H]."""
    return torch.cat([experts[slot].gate_proj.weight, experts[slot].up_proj.weight])


def everything(_layer, _expert, width):
    return torch.arange(width)


def random_channels(layer, expert, width):
    """Between 1 and all channels, at random, sorted."""
    generator = torch.Generator().manual_seed(100 * layer + expert)
    count = int(torch.randint(1, width + 1, (), generator=generator))
    return torch.randperm(width, generator=generator)[:count].sort().values


def random_channels_and_empty_experts(layer, expert, width):
    """As `random_channels`, but expert 1 of every layer and expert 4 of the first keep none."""
    empty = expert == 1 or (layer, expert) == (0, 4)
    return torch.arange(0) if empty else random_channels(layer, expert, width)


def without_experts(*gone):
    """All channels, except those of whole experts, given as (layer, expert)."""
    return lambda layer, expert, width: torch.arange(0 if (layer, expert) in gone else width)


def removed_channels(kept_C, width):
    """bool [C], true where a channel goes."""
    removed = torch.ones(width, dtype=torch.bool)
    removed[kept_C] = False
    return removed


def mask_channels(model, plan: Plan) -> None:
    """Set the down columns of the removed channels to zero in the dense model."""
    for layer, kept in zip(moe_layers(model), plan.kept, strict=True):
        for expert, channels in enumerate(kept):
            layer.experts.down_proj.data[expert, :, removed_channels(channels, plan.width)] = 0
