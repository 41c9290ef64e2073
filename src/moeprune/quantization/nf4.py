"""NF4: four-bit weights with one scale per block (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from dataclasses import dataclass

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from moeprune.errors import ModelError
from moeprune.models.adapter import moe_layers
from moeprune.models.four_bit import FourBitWeights, four_bit_linear
from moeprune.models.ragged import PackedWeights, RaggedExperts


@dataclass(frozen=True)
class NF4Quantizer:
    """All linear layers and routed experts in NF4; embeddings, head, routers, norms and experts' biases stay.

    4 bits a weight plus an fp32 scale per ``block_size`` weights: 4.5 bits at 64, 4.127 with ``double_quantization``,
    which stores the scales in 8 bits.
    """

    name: str = "nf4"
    block_size: int = 64
    double_quantization: bool = False

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> PreTrainedModel:
        """Quantise a pruned model in place. Raises ModelError when a matrix that should be in four bits is not."""
        for layer in tqdm(moe_layers(model), desc="quantize", unit="layer"):
            ragged = layer.experts
            weights = self._quantized_experts(ragged)
            quantized = RaggedExperts(weights, ragged.widths, ragged.act_fn, ragged.slot_of_row, ragged.bias_EH)
            ragged.weights.to("meta")  # the list of layers still refers to them; their memory is wanted now
            model.set_submodule(layer.name, quantized)
        routers = {id(layer.router) for layer in moe_layers(model)}
        for name, module in list(model.named_modules()):
            plain = type(module) is nn.Linear and id(module) not in routers
            if plain and module is not model.get_output_embeddings():
                model.set_submodule(name, self._linear(module.weight, module.bias))
        _check_quantized(model)
        return model

    def _quantized_experts(self, ragged: RaggedExperts) -> FourBitWeights:
        packed = ragged.weights
        assert isinstance(packed, PackedWeights)
        experts = range(len(ragged.widths))
        return FourBitWeights(
            [self._linear(packed.gate_up_of(expert), None) for expert in experts],
            [self._linear(packed.down_of(expert).T, None) for expert in experts],
        )

    def _linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear4bit:
        return four_bit_linear(weight, bias, block_size=self.block_size, nested=self.double_quantization)


def _check_quantized(model: PreTrainedModel) -> None:
    """Libraries skip shapes silently; every linear layer and every expert must have changed type."""
    head = model.get_output_embeddings()
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    left += [layer.name for layer in moe_layers(model) if not isinstance(layer.experts.weights, FourBitWeights)]
    unpacked = [
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit) and module.weight.dtype != torch.uint8
    ]
    if left or unpacked:
        raise ModelError(f"These matrices were not quantised: {', '.join((left + unpacked)[:5])}.")
