"""Which part each matrix belongs to, told by names that the families are known to use."""

import pytest
import torch
from families import FAMILIES, build_family
from torch import nn

from moeprune.models.adapter import moe_layers
from moeprune.models.families import to_contract
from moeprune.models.footprint.prediction import empty_model
from moeprune.models.parts import PARTS, part_of_modules
from moeprune.surgery.prune import prune
from moeprune.types import Plan

BLOCKS = (".mlp.", ".feed_forward.", ".block_sparse_moe.")


def expected_part(name: str) -> str:
    """By the words that these families use; routers and routed experts are asked for apart."""
    if ".shared_expert" in name:
        return "shared experts"
    if any(block in name for block in BLOCKS):
        return "dense mlp"
    if ".layers." in name:
        return "attention"
    return {"model.embed_tokens": "embeddings", "lm_head": "head"}[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_family(family):
    model = build_family(family, torch.float32)
    to_contract(model)
    on_meta = part_of_modules(empty_model(model.config, torch.bfloat16))
    layers = moe_layers(model)
    width = layers[0].widths[0]
    kept = tuple(tuple(torch.arange(width) for _ in range(layer.expert_count)) for layer in layers)
    parts = part_of_modules(prune(model, Plan(kept, width)))
    matrices = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    assert matrices <= parts.keys() and set(parts.values()) <= set(PARTS)
    layers = moe_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    routers = {names[id(layer.router)] for layer in layers}
    experts = tuple(layer.name for layer in layers)
    assert {name for name, part in parts.items() if part == "routed experts"} == {
        name for name in parts if name.startswith(experts)
    }
    assert routers <= {name for name, part in parts.items() if part == "router"}
    others = {name: part for name, part in parts.items() if part not in ("routed experts", "router")}
    assert others == {name: expected_part(name) for name in others}
    assert {name: part for name, part in on_meta.items() if part != "routed experts"} == {
        name: part for name, part in parts.items() if part != "routed experts"
    }
