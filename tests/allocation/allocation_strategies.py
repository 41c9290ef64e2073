"""Hypothesis strategies for budgets that can be met, channel counts that meet them, and scores of every kind."""

import itertools
from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor

from moeprune.allocation.budget import Budget
from moeprune.types import ExpertWeights, Scores


@st.composite
def budgets(draw, *, most_layers: int = 3, most_experts: int = 6, most_alignment: int = 4) -> Budget:
    """Small budgets that leave every layer its top-k experts."""
    layers, experts = draw(st.integers(1, most_layers)), draw(st.integers(1, most_experts))
    top_k = draw(st.integers(1, experts))
    alignment = draw(st.integers(1, most_alignment))
    blocks = draw(st.integers(1, 6))
    minimum_blocks = draw(st.integers(1, blocks))
    most = 1 - top_k * minimum_blocks / (experts * blocks)
    return Budget(
        ratio=draw(st.floats(0, 1, exclude_max=True)) * most,
        layers=layers,
        experts=experts,
        width=blocks * alignment,
        top_k=top_k,
        alignment=alignment,
        minimum_width=minimum_blocks * alignment,
    )


@st.composite
def counts_of(draw, budget: Budget) -> Tensor:
    """Counts [L, E] as `cover` makes them: they sum to the budget, and each layer has room for its top-k experts."""
    rng = draw(st.randoms(use_true_random=False))
    layer_counts = [budget.top_k * budget.minimum_width] * budget.layers
    for _ in range(budget.kept_channels - sum(layer_counts)):
        open_layers = [i for i, count in enumerate(layer_counts) if count < budget.experts * budget.width]
        layer_counts[rng.choice(open_layers)] += 1
    favour = [rng.random() ** 4 for _ in range(budget.experts)]
    counts = [[0] * budget.experts for _ in layer_counts]
    for layer, total in zip(counts, layer_counts, strict=True):
        for _ in range(total):
            open_experts = [i for i, count in enumerate(layer) if count < budget.width]
            layer[rng.choices(open_experts, weights=[favour[i] + 1e-6 for i in open_experts])[0]] += 1
    return torch.tensor(counts)


@st.composite
def scores_for(draw, budget: Budget, *, distinct: bool = False) -> Scores:
    """Scores of a model of the budget's shape, with expert weights and distances: heavy-tailed, or also signed, with
    many ties, or all zero."""
    kind = "heavy" if distinct else draw(st.sampled_from(["heavy", "signed", "ties", "zero"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (budget.layers, budget.experts, budget.width)

    def values(*size: int) -> Tensor:
        uniform = torch.rand(*size, generator=generator, dtype=torch.float64)
        return {"heavy": uniform**4, "signed": uniform - 0.3, "ties": (3 * uniform).floor(), "zero": 0 * uniform}[kind]

    distance_LEE = values(*shape[:2], budget.experts).abs()
    distance_LEE = (distance_LEE + distance_LEE.mT) * (1 - torch.eye(budget.experts))
    weights = ExpertWeights(values(*shape[:2]), *(values(*shape[:2]).clamp(min=0) for _ in range(3)))
    return Scores(
        values(*shape),
        values(*shape[:2]),
        values(shape[0]).clamp(min=0),
        distance_LEE=distance_LEE,
        weights=weights,
    )


def permuted(scores: Scores, order_E: Tensor) -> Scores:
    """The same model with the experts of every layer in another order."""
    weights = ExpertWeights(**{name: value_LE[:, order_E] for name, value_LE in vars(scores.weights).items()})
    return Scores(
        scores.channel_LEC[:, order_E],
        scores.expert_LE[:, order_E],
        scores.layer_L,
        distance_LEE=scores.distance_LEE[:, order_E][:, :, order_E],
        weights=weights,
    )


def brute_force_widths(budget: Budget) -> Iterator[tuple[int, ...]]:
    """Every allowed choice of widths, layer by layer, that meets the budget and leaves each layer its top-k experts."""
    widths = [0, *range(budget.minimum_width, budget.width + 1, budget.alignment)]
    for chosen in itertools.product(widths, repeat=budget.layers * budget.experts):
        layers = [chosen[start : start + budget.experts] for start in range(0, len(chosen), budget.experts)]
        if sum(chosen) == budget.kept_channels and all(sum(map(bool, layer)) >= budget.top_k for layer in layers):
            yield chosen
