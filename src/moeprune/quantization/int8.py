"""int8: eight-bit weights with one scale per row (LLM.int8(), arXiv 2208.07339), through bitsandbytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import nn

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import NumericalError
from moeprune.models.compressed.eight_bit import eight_bit_linear
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.footprint.tensors import Parts, eight_bit_parts, grouped_parts
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.quantization.grouped import TABLE_GROUP, nearest_table
from moeprune.quantization.replacing import FinishedLayer, replaced_layers


@dataclass(frozen=True)
class Int8Quantizer:
    """Matrices in int8; routers, norms and biases stay. An embedding, which the library cannot keep so, and a head that
    is tied to it are rounded to nearest in 8 bits, see `moeprune.quantization.grouped`.

    8 bits a weight plus an fp32 scale per row. Inputs are rounded to int8 too, a scale per token, but for those above
    6, which meet their weights in 16 bits, as in the paper.
    """

    name: str = "int8"
    parts: QuantizedParts = field(default_factory=QuantizedParts)

    bits: ClassVar[int] = 8
    needs_calibration: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Its name in a table."""
        return self.name

    def stored(self, shape: tuple[int, int], dtype: str) -> Parts:
        """The tensors that stand for a weight [out, in]; the same whatever ``dtype`` it was computed with in."""
        return eight_bit_parts(shape)

    def stored_table(self, shape: tuple[int, int]) -> Parts:
        """The tensors that stand for an embedding table [rows, columns]."""
        return grouped_parts(shape, bits=self.bits, group_size=TABLE_GROUP)

    def __call__(
        self, model: Model, windows: TokenWindows | None, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> Iterator[FinishedLayer]:
        """Quantise a pruned model in place, and yield each decoder layer (depth, name, layer) when it is final.

        Raises ModelError, NumericalError and InputError as `replaced_layers` does; NumericalError for weights beyond
        float16 too.
        """
        table = nearest_table(self.bits, TABLE_GROUP)
        return replaced_layers(model, self.parts, workspace, self.bits, _eight_bit, table)


def _eight_bit(linear: nn.Linear) -> Linear8bitLt:
    largest = linear.weight.abs().amax() if linear.weight.numel() else 0.0
    if largest > torch.finfo(torch.float16).max:  # the library rounds to float16 first: a row would be NaN
        raise NumericalError(f"A weight of {float(largest):.3g} is beyond float16, through which int8 goes: use nf4.")
    return eight_bit_linear(linear.weight, linear.bias)
