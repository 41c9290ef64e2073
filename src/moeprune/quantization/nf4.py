"""NF4: four-bit weights with one scale per block (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from moeprune.errors import InputError
from moeprune.models.compressed.four_bit import four_bit_linear
from moeprune.models.footprint.tensors import Parts, four_bit_parts
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.quantization.replacing import replaced_layers

# Those that the library has on every device; it takes others silently on a CPU.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NF4Quantizer:
    """All linear layers and routed experts in NF4; embeddings, head, routers, norms and biases stay.

    4 bits a weight plus an fp32 scale per ``block_size`` weights: 4.5 bits at 64, 4.127 with ``double_quantization``,
    which stores the scales in 8 bits.

    Raises InputError for a block size that the library does not have.
    """

    name: str = "nf4"
    block_size: int = 64
    double_quantization: bool = False

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"quantizer.block_size={self.block_size} is not possible.", possible=BLOCK_SIZES)

    @property
    def label(self) -> str:
        """Its name in a table."""
        return f"{self.name} double" if self.double_quantization else self.name

    def parts(self, shape: tuple[int, int], dtype: str) -> Parts:
        """The tensors that stand for a weight [out, in] which was computed with in ``dtype``."""
        return four_bit_parts(shape, block_size=self.block_size, nested=self.double_quantization, dtype=dtype)

    def __call__(self, model: Model, workspace: Workspace = IN_MEMORY) -> Iterator[tuple[int, str, nn.Module]]:
        """Quantise a pruned model in place, and yield each decoder layer (depth, name, layer) when it is final.

        Raises ModelError when a matrix that should be in four bits is not.
        """
        return replaced_layers(model, workspace, self._linear, torch.uint8)

    def _linear(self, linear: nn.Linear) -> Linear4bit:
        return four_bit_linear(linear.weight, linear.bias, block_size=self.block_size, nested=self.double_quantization)
