"""Which matrices a quantizer takes; the one place that says so."""

from torch import nn
from transformers import PreTrainedModel

from moeprune.models.adapter import moe_layers


def quantizable_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """{name: layer} of all linear layers, those of ragged experts included, but for routers and the output head.

    Embeddings, norms, biases, convolutions, and experts that are still fused are no linear layers. On a model whose
    weights are on the meta device too.
    """
    spared = {id(part) for layer in moe_layers(model) for part in layer.router.modules()}
    spared.add(id(model.get_output_embeddings()))
    return {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) not in spared
    }
