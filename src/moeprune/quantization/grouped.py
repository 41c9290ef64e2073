"""What the quantizers have in common that keep a scale and a zero for each group of weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from moeprune.errors import InputError, require_positive
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.footprint.tensors import Parts, grouped_parts
from moeprune.models.runtime.grouped import GroupedEmbedding, GroupedLinear, grouped_embedding, grouped_linear
from moeprune.quantization.grid import Rounded, nearest

BITS = range(2, 9)
NEAREST = "nearest"
TABLE_GROUP = 64  # of embeddings whose quantizer keeps no groups itself


@dataclass(frozen=True)
class GroupedQuantizer:
    """``w = (code - zero) * scale`` in ``bits`` bits, scale and zero in float16 for ``group_size`` inputs of a row.

    ``bits + 32 / group_size`` bits a weight: 4.5 at 4 bits and 64. A group that a row does not fill pays as much as a
    full one: 32 bits for the scale and zero of a row of 24 weights. Routers, norms and biases stay.

    Raises InputError for bits or a group size that cannot be.
    """

    name: str
    bits: int = 4
    group_size: int = 64
    parts: QuantizedParts = field(default_factory=QuantizedParts)

    rounding: ClassVar[str]  # how codes are found, for tables

    def __post_init__(self) -> None:
        require_positive(self, "group_size")
        if self.bits not in BITS:
            raise InputError(f"quantizer.bits={self.bits} is not possible.", possible=BITS)

    @property
    def label(self) -> str:
        """Its name in a table."""
        return self.name

    def stored(self, shape: tuple[int, int], dtype: str) -> Parts:
        """The tensors that stand for a weight [out, in]; the same whatever ``dtype`` it was computed with in."""
        return grouped_parts(shape, bits=self.bits, group_size=self.group_size)

    def stored_table(self, shape: tuple[int, int]) -> Parts:
        """The tensors that stand for an embedding table [rows, columns]."""
        return grouped_parts(shape, bits=self.bits, group_size=self.group_size)


def grouped_layer(linear: nn.Linear, rounded: Rounded, *, bits: int, group_size: int, rounding: str) -> GroupedLinear:
    """The linear layer with its weight as it was rounded; its bias stays."""
    tensors = rounded.codes_OI, rounded.scales_OG, rounded.zeros_OG, linear.bias
    return grouped_linear(*tensors, bits=bits, group_size=group_size, rounding=rounding, dtype=linear.weight.dtype)


def grouped_table(
    table: nn.Embedding, rounded: Rounded, *, bits: int, group_size: int, rounding: str
) -> GroupedEmbedding:
    """The embedding with its rows as they were rounded."""
    tensors = rounded.codes_OI, rounded.scales_OG, rounded.zeros_OG
    return grouped_embedding(*tensors, bits=bits, group_size=group_size, rounding=rounding, dtype=table.weight.dtype)


def nearest_layer(bits: int, group_size: int) -> Callable[[nn.Linear], GroupedLinear]:
    """What rounds each weight of a linear layer to the nearest point of its group's grid."""

    def quantize(linear: nn.Linear) -> GroupedLinear:
        rounded = nearest(linear.weight, bits=bits, group_size=group_size)
        return grouped_layer(linear, rounded, bits=bits, group_size=group_size, rounding=NEAREST)

    return quantize


def nearest_table(bits: int, group_size: int) -> Callable[[nn.Embedding], GroupedEmbedding]:
    """What rounds each weight of an embedding to the nearest point of its group's grid."""

    def quantize(table: nn.Embedding) -> GroupedEmbedding:
        rounded = nearest(table.weight, bits=bits, group_size=group_size)
        return grouped_table(table, rounded, bits=bits, group_size=group_size, rounding=NEAREST)

    return quantize
