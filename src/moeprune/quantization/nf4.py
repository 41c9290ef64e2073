"""NF4: four-bit weights with one scale per block (QLoRA, arXiv 2305.14314), through bitsandbytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from bitsandbytes.nn import Linear4bit
from torch import nn

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.compressed.four_bit import four_bit_linear
from moeprune.models.compressed.quantizable import QuantizedParts
from moeprune.models.footprint.tensors import Parts, four_bit_parts, grouped_parts
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.quantization.grouped import TABLE_GROUP, nearest_table
from moeprune.quantization.replacing import FinishedLayer, replaced_layers

# Those that the library has on every device; it takes others silently on a CPU.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NF4Quantizer:
    """Matrices in NF4; routers, norms and biases stay. An embedding, which the library cannot keep so, and a head that
    is tied to it are rounded to nearest in 4 bits, see `moeprune.quantization.grouped`.

    4 bits a weight plus an fp32 scale per ``block_size`` weights: 4.5 bits at 64, 4.127 with ``double_quantization``,
    which stores the scales in 8 bits.

    Raises InputError for a block size that the library does not have.
    """

    name: str = "nf4"
    block_size: int = 64
    double_quantization: bool = False
    parts: QuantizedParts = field(default_factory=QuantizedParts)

    bits: ClassVar[int] = 4
    needs_calibration: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise InputError(f"quantizer.block_size={self.block_size} is not possible.", possible=BLOCK_SIZES)

    @property
    def label(self) -> str:
        """Its name in a table."""
        return "nf4 double" if self.double_quantization else "nf4"

    def stored(self, shape: tuple[int, int], dtype: str) -> Parts:
        """The tensors that stand for a weight [out, in] which was computed with in ``dtype``."""
        return four_bit_parts(shape, block_size=self.block_size, nested=self.double_quantization, dtype=dtype)

    def stored_table(self, shape: tuple[int, int]) -> Parts:
        """The tensors that stand for an embedding table [rows, columns]."""
        return grouped_parts(shape, bits=self.bits, group_size=TABLE_GROUP)

    def __call__(
        self, model: Model, windows: TokenWindows | None, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> Iterator[FinishedLayer]:
        """Quantise a pruned model in place, and yield each decoder layer (depth, name, layer) when it is final.

        Raises ModelError, NumericalError and InputError as `replaced_layers` does.
        """
        table = nearest_table(self.bits, TABLE_GROUP)
        return replaced_layers(model, self.parts, workspace, self.bits, self._linear, table)

    def _linear(self, linear: nn.Linear) -> Linear4bit:
        return four_bit_linear(linear.weight, linear.bias, block_size=self.block_size, nested=self.double_quantization)
