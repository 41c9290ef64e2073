"""Gives a family's model the experts of a pruned checkpoint, whose shapes its config.json says."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from .activations import gated_activation
from .contract import to_contract
from .grouped import GroupedEmbedding, GroupedLinear, put_embedding
from .ragged import Expert, RaggedExperts
from .router import is_router, keep_router_rows


def make_ragged(model: nn.Module, pruned: Mapping[str, Any]) -> None:
    """Replace the dense experts by ones of the widths that ``pruned`` says, and shorten their routers to match.

    ``pruned``, by name of the experts module: ``widths`` of the stored experts; ``slot_of_row`` where router row i does
    not lead to expert i; ``biased``, those whose router rows have a bias; ``expert_biases``, those whose experts'
    linear layers have biases; ``gates_inputs``, those whose gates scale what goes into an expert. By name of any
    module, ``grouped``: how the linear layers at and below it are kept in few bits (`grouped.GroupedWeight`); the
    longest name counts. Weights are not set.

    Raises ValueError where the model has no such modules, or a row leads to an expert that is not there.
    """
    to_contract(model)
    for name, widths in pruned["widths"].items():
        dense, router = _experts_and_router(model, name)
        weight = dense.down_proj
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        hidden_size = router.weight.shape[1]
        slot_of_row = pruned["slot_of_row"].get(name, range(len(widths)))
        bias_EH = torch.empty(len(slot_of_row), hidden_size, **options) if name in pruned["biased"] else None
        has_bias = name in pruned["expert_biases"]
        # Values for what is not in memory would take most of the time of loading a model of thousands of experts.
        with no_init_weights() if weight.is_meta else nullcontext():
            stored = [Expert(width, hidden_size, bias=has_bias, **options) for width in widths]
        gates_inputs = name in pruned["gates_inputs"]
        model.set_submodule(name, RaggedExperts(stored, gated_activation(dense), slot_of_row, bias_EH, gates_inputs))
        keep_router_rows(router, torch.arange(len(slot_of_row)))
    _make_grouped(model, pruned.get("grouped", {}))  # checkpoints from before it say nothing


def nearest(name: str, prefixes: Collection[str]) -> str | None:
    """The longest of some module names that ``name`` is, or lies below; None where there is none."""
    while name and name not in prefixes:
        name = name.rpartition(".")[0]
    return name or None


def _make_grouped(model: nn.Module, grouped: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the linear layers and the embedding that ``grouped`` names by ones of few bits."""
    used = set()
    for name, module in list(model.named_modules()):
        prefix = nearest(name, grouped)
        if prefix is None or type(module) not in (nn.Linear, nn.Embedding):
            continue
        used.add(prefix)
        settings: dict[str, Any] = {
            **grouped[prefix], "device": module.weight.device, "dtype": module.weight.dtype
        }  # fmt: skip
        if isinstance(module, nn.Embedding):
            put_embedding(model, GroupedEmbedding(module.num_embeddings, module.embedding_dim, **settings))
        else:
            settings["bias"] = module.bias is not None
            model.set_submodule(name, GroupedLinear(module.in_features, module.out_features, **settings))
    if odd := sorted(grouped.keys() - used):
        raise ValueError(f"{type(model).__name__} has no matrices {odd[0]}.")


def _experts_and_router(model: nn.Module, name: str) -> tuple[Any, Any]:
    try:
        experts = model.get_submodule(name)
        siblings = model.get_submodule(name.rpartition(".")[0]).children()
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no experts {name}.") from error
    router = next((child for child in siblings if is_router(child)), None)
    if router is None or not hasattr(experts, "down_proj"):
        raise ValueError(f"{name} of {type(model).__name__} are no experts beside a router.")
    return experts, router
