"""GPTQ (arXiv 2210.17323): few bits, chosen such that each matrix computes what it did on the calibration text."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError, NumericalError, require_positive
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.walk import Batches, LayerVisit, walk_layers
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.grouped import GroupedLinear
from moeprune.quantization.gptq_solver import gptq, inverse_factor
from moeprune.quantization.grouped import GroupedQuantizer, grouped_layer, nearest_layer, nearest_table
from moeprune.quantization.hessians import InputSum, input_sums
from moeprune.quantization.replacing import (
    FinishedLayer,
    check_replaced,
    matrices_below,
    replace,
    replace_rest,
    require_finite,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQQuantizer(GroupedQuantizer):
    """Columns are rounded in turn, and later ones make up for the errors of earlier ones; see `gptq_solver.gptq`.

    One ``H = sum_t x_t x_t^T`` for each input: over the tokens routed to it for an expert's gate and up projections,
    one for its down projection, one for queries, keys and values. Layer by layer: the calibration text has gone through
    the quantised layers before; inside a layer, all inputs are those of its unquantised matrices.

    ``damping + scarcity * inputs / tokens`` times the mean of its diagonal is added to the diagonal of H. The paper
    (section 3.3) has ``damping`` alone, for matrices that see every token. An expert that sees few learns these by
    heart: on text held out from the embedded models, the output error of such experts was 1.2 (gate, up) and 1.8 (down)
    times that of nearest rounding with 32 to 63 tokens for 192 to 256 inputs, and below it from 1 and 2 tokens per
    input on. With scarcity 1 it was 0.92 and 0.99 times, and within 2% of the paper's where tokens are many.

    Matrices that fewer than ``fewest_tokens`` tokens reached, or zeros only, are rounded to nearest, and a warning says
    how many of which layer. So are embeddings and head, which the walk over the layers does not run.

    Raises NumericalError where a matrix or its H holds NaN or infinity.
    """

    damping: float = 0.01
    scarcity: float = 1.0
    fewest_tokens: int = 16

    rounding: ClassVar[str] = "gptq"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "fewest_tokens")
        if not 0 < self.damping < math.inf:
            raise InputError(f"quantizer.damping={self.damping} is not possible.", change="Use 0.01, or more.")
        if not 0 <= self.scarcity < math.inf:
            raise InputError(f"quantizer.scarcity={self.scarcity} is not possible.", change="Use a number from 0 to 1.")

    def __call__(
        self, model: Model, windows: TokenWindows | None, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> Iterator[FinishedLayer]:
        """Quantise a pruned model in place, and yield each decoder layer (depth, name, layer) when it is final.

        Two forward passes over the windows. Raises InputError without windows, or where ``parts`` do not fit the model;
        ModelError as `check_replaced` and `input_sums` do; NumericalError as the class says.
        """
        if windows is None:
            raise InputError("GPTQ needs calibration windows.", change="Use quantizer=hqq4, which needs none.")
        return self._layers(model, windows.batches(batch_size), workspace)

    @torch.no_grad()
    def _layers(self, model: Model, batches: Batches, workspace: Workspace) -> Iterator[FinishedLayer]:
        wanted = self.parts.names(skeleton(model))
        for visit in walk_layers(model, batches, "gptq", workspace, propagate="changed"):
            inside = matrices_below(visit.name, wanted)
            if inside:
                require_finite(inside, f"{visit.name}.")
                self._quantize_layer(visit, inside, batches)
                check_replaced(visit.layer, visit.name, inside, self.bits)
            yield visit.depth, visit.name, visit.layer
        linear, table = nearest_layer(self.bits, self.group_size), nearest_table(self.bits, self.group_size)
        replace_rest(skeleton(model), wanted, self.bits, linear, table)

    def _quantize_layer(self, visit: LayerVisit, inside: dict[str, nn.Linear], batches: Batches) -> None:
        left = dict(inside)
        for inputs in input_sums(visit, inside, batches):
            if inputs.tokens >= self.fewest_tokens and inputs.sum_II.any():
                matrices = [left.pop(path) for path in inputs.paths]
                quantized = self._rounded(visit, inputs, matrices)
                for path, linear, new in zip(inputs.paths, matrices, quantized, strict=True):
                    replace(visit.layer, path, linear, new)
        for path, linear in left.items():
            replace(visit.layer, path, linear, nearest_layer(self.bits, self.group_size)(linear))
        if left:
            few = f"{len(left)} of {len(inside)} matrices of {visit.name}"
            log.warning("%s saw fewer than %d tokens, or zeros only: rounded to nearest", few, self.fewest_tokens)

    def _rounded(self, visit: LayerVisit, inputs: InputSum, matrices: list[nn.Linear]) -> Iterator[GroupedLinear]:
        """The linear layers that share these inputs; their rows are solved for together."""
        damping = self.damping + self.scarcity * len(inputs.sum_II) / inputs.tokens
        try:
            factor_II = inverse_factor(inputs.sum_II, damping)
        except torch.linalg.LinAlgError as error:
            raise NumericalError(
                f"The inputs of {visit.name}.{inputs.paths[0]} hold NaN or infinity, or quantizer.damping="
                f"{self.damping} is too small for them."
            ) from error
        weight_OI = torch.cat([linear.weight for linear in matrices])
        rounded = gptq(weight_OI, factor_II, bits=self.bits, group_size=self.group_size)
        for linear, rows in zip(matrices, rounded.split([len(linear.weight) for linear in matrices]), strict=True):
            yield grouped_layer(linear, rows, bits=self.bits, group_size=self.group_size, rounding=self.rounding)
