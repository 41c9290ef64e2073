"""Which part of a model each of its matrices belongs to, found by structure."""

from torch import nn
from transformers import PreTrainedModel

from moeprune.models.adapter import decoder_layers, moe_layers
from moeprune.models.runtime.structure import nearest

ROUTED, SHARED, ATTENTION, DENSE_MLP = "routed experts", "shared experts", "attention", "dense mlp"
ROUTER, EMBEDDINGS, HEAD, OTHER = "router", "embeddings", "head", "other"
PARTS = (ROUTED, SHARED, ATTENTION, DENSE_MLP, ROUTER, EMBEDDINGS, HEAD, OTHER)


def part_of_modules(model: PreTrainedModel) -> dict[str, str]:
    """{name: one of PARTS} of all linear layers, embeddings, routers and modules of routed experts, quantised or not.

    Shared experts are what lies in an MoE block beside routed experts and router; dense MLPs, what lies in the same
    place of layers without routed experts; attention (linear attention and its projections included) is the rest of a
    decoder layer. Works on the meta device.
    """
    layers = moe_layers(model)
    name_of = {id(module): name for name, module in model.named_modules()}
    blocks = {layer.name.rpartition(".")[0] for layer in layers}
    decoder = [name for name, _ in decoder_layers(model)]
    insides = {layer.name.rpartition(".")[0].removeprefix(f"{name_of[id(layer.decoder_layer)]}.") for layer in layers}
    part_of = {
        **dict.fromkeys((f"{layer}.{inside}" for layer in decoder for inside in insides), DENSE_MLP),
        **dict.fromkeys(blocks, SHARED),
        **dict.fromkeys(decoder, ATTENTION),
        **dict.fromkeys((layer.name for layer in layers), ROUTED),
        **dict.fromkeys((name_of[id(layer.router)] for layer in layers), ROUTER),
        name_of[id(model.get_input_embeddings())]: EMBEDDINGS,
        name_of[id(model.get_output_embeddings())]: HEAD,
    }
    return {
        name: part_of.get(nearest(name, part_of) or "", OTHER)
        for name, module in model.named_modules()
        if part_of.get(name) in (ROUTED, ROUTER) or isinstance(module, nn.Linear | nn.Embedding)
    }
