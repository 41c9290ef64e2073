"""Unstructured Wanda: single weights become zero; a published point of comparison, which saves no bytes by itself."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import MoeLayer
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.surgery.prune import REMOVE_ROW, FinishedLayer, check_plan, cut_layers
from moeprune.types import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnstructuredWanda:
    """Zero the ``sparsity`` share of each row's weights with the lowest ``|W_ij| ||x_j||`` in all routed experts.

    ``||x_j||`` is the L2 norm of input j of the matrix over the calibration tokens routed to the expert: its inputs for
    gate and up, its channel activations for down. Weights are compared within an output row; ``floor(sparsity * n)`` of
    n go, ties by index. Source: Wanda (arXiv 2306.11695, section 3), without its N:M patterns. In an expert that no
    calibration token reached all inputs count alike: the smallest weights go.
    """

    sparsity: float
    needs_all_channels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise InputError(
                f"sparsity={self.sparsity} is not possible: it is the share of weights that become zero.",
                change="Use a number from 0 up to, but not including, 1.",
            )

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        plan: Plan,
        statistics: Statistics,
        windows: TokenWindows,
        batch_size: int,
        workspace: Workspace = IN_MEMORY,
    ) -> Iterator[FinishedLayer]:
        """Zero in place, layer by layer. Raises InputError for a plan that removes or merges anything."""
        check_plan(model, plan, REMOVE_ROW)
        if plan.kept_channels < plan.total_channels:
            raise InputError(
                f"The plan removes {plan.removed_ratio:.1%} of the channels, and this surgery {self.sparsity:.1%} of "
                "the weights of what is left.",
                change="Use allocator=keep_all with surgery=wanda_unstructured.",
            )
        unseen = statistics.routed_tokens_LE == 0
        if unseen.any():
            log.warning("%d experts got no calibration token: their smallest weights become zero", int(unseen.sum()))
        input_sq_LEH = statistics.input_sq_sum_LEH.masked_fill(unseen.unsqueeze(-1), 1.0)
        channel_sq_LEC = statistics.channel_sq_sum_LEC.masked_fill(unseen.unsqueeze(-1), 1.0)

        def zero_lowest(index: int, layer: MoeLayer) -> None:
            for expert in range(layer.expert_count):
                self._zero_lowest(layer.experts.gate_up_proj[expert], input_sq_LEH[index, expert].sqrt())
                self._zero_lowest(layer.experts.down_proj[expert], channel_sq_LEC[index, expert].sqrt())

        return cut_layers(model, plan, workspace=workspace, before_cut=zero_lowest)

    def _zero_lowest(self, weight_OI: Tensor, input_norm_I: Tensor) -> None:
        score_OI = weight_OI.double().abs() * input_norm_I.to(weight_OI.device)
        lowest_OI = score_OI.argsort(dim=1, stable=True)[:, : math.floor(self.sparsity * weight_OI.shape[1] + 1e-9)]
        weight_OI.scatter_(1, lowest_OI, 0.0)
