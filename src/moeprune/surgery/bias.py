"""Replaces what is removed by its mean over calibration tokens."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.models.adapter import MoeLayer
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.surgery.prune import REMOVE_ROW, FinishedLayer, check_row_policy, cut_layers, refuse_merging
from moeprune.types import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeanBias:
    """Cut, and give each expert the mean output of its removed channels as a bias.

    ``bias_e = W_down[:, removed] mean(h)[removed]``, the mean of the dense model's activations h over the N_e
    calibration tokens routed to e; the router's gate scales it like the rest of the expert. Source: the bias
    compensation of FLAP (arXiv 2312.11983). Where an expert keeps no channel but its router row
    (``empty_experts="keep_row"``), this is its mean output, MoNE's constant (arXiv 2507.00390); where its row goes, so
    does its bias. An expert that no calibration token reached has no mean: its bias is 0.
    """

    empty_experts: str = REMOVE_ROW
    refuses_merging: ClassVar[bool] = True
    adds_biases: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_row_policy(self.empty_experts)

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
        """Cut in place, layer by layer. Raises InputError as `cut_layers` does, and for a plan that merges."""
        refuse_merging(plan, "this bias")
        routed_tokens_LE = statistics.routed_tokens_LE
        unseen = int(((plan.widths_LE < plan.width) & (routed_tokens_LE == 0)).sum())
        if unseen:
            log.warning("%d experts lose channels but got no calibration token: their bias is 0", unseen)
        mean_LEC = statistics.channel_sum_LEC / routed_tokens_LE.clamp(min=1).unsqueeze(-1)

        def bias_of(index: int, layer: MoeLayer) -> Tensor:
            return _removed_mean(layer.experts, plan.kept[index], mean_LEC[index])

        return cut_layers(model, plan, self.empty_experts, workspace, bias_of)


def _removed_mean(experts: Any, kept: tuple[Tensor, ...], mean_EC: Tensor) -> Tensor:
    """The mean output of the channels that each expert does not keep, float64 [E, H]."""
    removed_EC = mean_EC.clone()
    for expert, channels in enumerate(kept):
        removed_EC[expert, channels] = 0
    removed_EC = removed_EC.to(experts.down_proj.device)
    mean_EH = torch.stack([down_HC.double() @ removed_EC[expert] for expert, down_HC in enumerate(experts.down_proj)])
    down_bias_EH = getattr(experts, "down_bias", None)
    if down_bias_EH is not None:  # goes with the last channel
        gone_E = torch.tensor([len(channels) == 0 for channels in kept], device=mean_EH.device)
        mean_EH += gone_E.unsqueeze(-1) * down_bias_EH.double()
    return mean_EH
