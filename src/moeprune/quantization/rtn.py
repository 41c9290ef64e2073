"""Rounding to nearest: the control that the other grouped quantizers are measured against, and their fallback."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from moeprune.calibration.windows import TokenWindows
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.quantization.grouped import NEAREST, GroupedQuantizer, nearest_layer, nearest_table
from moeprune.quantization.replacing import FinishedLayer, replaced_layers


@dataclass(frozen=True)
class NearestQuantizer(GroupedQuantizer):
    """Each weight at the nearest of 2^bits evenly spaced points between its group's smallest and largest weight."""

    rounding: ClassVar[str] = NEAREST
    needs_calibration: ClassVar[bool] = False

    def __call__(
        self, model: Model, windows: TokenWindows | None, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> Iterator[FinishedLayer]:
        """Quantise a pruned model in place, and yield each decoder layer (depth, name, layer) when it is final.

        Raises ModelError, NumericalError and InputError as `replaced_layers` does.
        """
        linear, table = nearest_layer(self.bits, self.group_size), nearest_table(self.bits, self.group_size)
        return replaced_layers(model, self.parts, workspace, self.bits, linear, table)
