"""int8: eight-bit weights with one scale per row (LLM.int8(), arXiv 2208.07339), through bitsandbytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from moeprune.models.compressed.eight_bit import eight_bit_linear
from moeprune.models.footprint.tensors import Parts, eight_bit_parts
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.quantization.replacing import replaced_layers


@dataclass(frozen=True)
class Int8Quantizer:
    """All linear layers and routed experts in int8; embeddings, head, routers, norms and biases stay.

    8 bits a weight plus an fp32 scale per row. Inputs are rounded to int8 too, a scale per token, but for those above
    6, which meet their weights in 16 bits, as in the paper.
    """

    name: str = "int8"

    bits: ClassVar[int] = 8

    @property
    def label(self) -> str:
        """Its name in a table."""
        return self.name

    def parts(self, shape: tuple[int, int], dtype: str) -> Parts:
        """The tensors that stand for a weight [out, in]; the same whatever ``dtype`` it was computed with in."""
        return eight_bit_parts(shape)

    def __call__(self, model: Model, workspace: Workspace = IN_MEMORY) -> Iterator[tuple[int, str, nn.Module]]:
        """Quantise a pruned model in place, and yield each decoder layer (depth, name, layer) when it is final.

        Raises ModelError when a matrix that should be in eight bits is not.
        """
        return replaced_layers(
            model, workspace, lambda linear: eight_bit_linear(linear.weight, linear.bias), torch.int8
        )
