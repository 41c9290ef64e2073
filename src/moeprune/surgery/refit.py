"""Refits what is left of each pruned expert to what the dense expert computed, by least squares."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError, NumericalError
from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.dispatch import dispatch
from moeprune.models.layer_walk import walk_layers
from moeprune.surgery.prune import REMOVE_ROW, check_plan, check_row_policy, prune, refuse_merging
from moeprune.types import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refit:
    """Cut, with the down projection of each pruned expert refitted by ridge least squares.

    S are the kept channels of expert e, R the removed ones, ``G = sum_t q_t g_te^2 h_t h_t^T`` the Gram matrix of its
    channel activations over the calibration tokens routed to it in the dense model, ``q_t = 1 / (||y_t||^2 + eps)``
    with the layer output y. ``W'`` minimises

        sum_t q_t g_te^2 ||W h_t - W' h_t,S||^2 + lambda ||W' - W_S||^2
        W' = W_S + W_R G_RS (G_SS + lambda I)^-1,  lambda = ridge * mean of the diagonal of G_SS

    Solved in float64, rounded once to the weights' dtype. The penalty draws towards the plain cut ``W_S``, not towards
    0, so that on the calibration tokens no ridge makes an expert worse than the plain cut, and an expert that keeps
    all channels stays as it is. An expert with fewer calibration tokens than kept channels keeps the plain cut: its
    Gram matrix has not full rank, and the fit would only learn these tokens by heart. So does one whose kept channels
    were all silent. Gates and inputs are those of the dense model, also where router rows go.

    Raises NumericalError when a Gram matrix is singular, which ``ridge=0`` allows.
    """

    ridge: float = 0.01
    empty_experts: str = REMOVE_ROW
    refuses_merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_row_policy(self.empty_experts)
        if not self.ridge >= 0:
            raise InputError(f"ridge={self.ridge} is not possible.", change="Use a number of at least 0, as 0.01.")

    @torch.no_grad()
    def __call__(
        self, model: PreTrainedModel, plan: Plan, statistics: Statistics, windows: TokenWindows, batch_size: int
    ) -> PreTrainedModel:
        """Refit and cut in place, layer by layer; one forward pass over the windows.

        Raises InputError as `prune` does, and for a plan that merges.
        """
        refuse_merging(plan, "this refit")
        check_plan(model, plan, self.empty_experts)
        wanted = {
            layer.decoder_layer: (layer, _refitted_experts(kept, plan.width, routed_tokens_E))
            for layer, kept, routed_tokens_E in zip(
                moe_layers(model), plan.kept, statistics.routed_tokens_LE, strict=True
            )
        }
        if any(experts for _, experts in wanted.values()):
            for decoder_layer, outputs in walk_layers(model, windows.batches(batch_size), "refit"):
                layer, kept_of = wanted.get(decoder_layer, (None, {}))
                if layer is not None and kept_of:
                    # The walk has left the layer when its Gram matrices are complete, so it may change.
                    self._refit_layer(layer, kept_of, gram_matrices(layer, kept_of, outputs))
        return prune(model, plan, self.empty_experts)

    def _refit_layer(self, layer: MoeLayer, kept_of: dict[int, Tensor], gram_of: dict[int, Tensor]) -> None:
        for expert, kept_S in kept_of.items():
            down_HC = layer.experts.down_proj[expert]
            try:
                refitted_HS = refitted_columns(down_HC.double(), kept_S.to(down_HC.device), gram_of[expert], self.ridge)
            except torch.linalg.LinAlgError as error:
                raise NumericalError(
                    f"The Gram matrix of expert {expert} in {layer.name} is singular.\nUse surgery.ridge=0.01 or more."
                ) from error
            down_HC[:, kept_S] = refitted_HS.to(down_HC.dtype)


def refitted_columns(down_HC: Tensor, kept_S: Tensor, gram_SC: Tensor, ridge: float) -> Tensor:
    """``W' = W_S + W_R G_RS (G_SS + lambda I)^-1`` [H, S], see `Refit`; float64.

    Raises torch.linalg.LinAlgError where ``G_SS + lambda I`` is singular.
    """
    if not gram_SC.any():
        return down_HC[:, kept_S]
    gram_SS = gram_SC[:, kept_S]
    damping = ridge * gram_SS.diagonal().mean()
    removed_C = torch.ones(down_HC.shape[1], dtype=torch.bool, device=down_HC.device)
    removed_C[kept_S] = False
    factor_SS = torch.linalg.cholesky(gram_SS + damping * torch.eye(len(kept_S)).to(gram_SS))
    missing_SH = gram_SC[:, removed_C] @ down_HC[:, removed_C].T
    return down_HC[:, kept_S] + torch.cholesky_solve(missing_SH, factor_SS).T


def gram_matrices(
    layer: MoeLayer, kept_of: dict[int, Tensor], outputs: Iterator[tuple[Tensor, Tensor]]
) -> dict[int, Tensor]:
    """The rows S of each wanted expert's Gram matrix, float64 [S, C], see `Refit`.

    ``outputs`` runs the layer on one batch after the other, as `walk_layers` gives it.
    """
    experts = layer.experts
    gram_of = {
        expert: experts.down_proj.new_zeros(len(kept_S), experts.down_proj.shape[2], dtype=torch.float64)
        for expert, kept_S in kept_of.items()
    }
    inputs: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = experts.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments))
    try:
        for valid_T, y_TH in outputs:
            q_T = valid_T / (y_TH.double().square().sum(dim=-1) + OUTPUT_NORM_EPS)
            x_TH, experts_TK, gates_TK = inputs.pop()
            routed = dispatch(experts_TK, gates_TK, layer.expert_count)
            for expert, rows in routed.active():
                if expert not in gram_of:
                    continue
                token_n = routed.token_A[rows]
                gate_nC, up_nC = (x_TH[token_n] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                weight_n = q_T[token_n].sqrt() * routed.gate_A[rows].double()
                weighted_nC = (experts.act_fn(gate_nC) * up_nC).double() * weight_n.unsqueeze(-1)
                gram_of[expert] += weighted_nC[:, kept_of[expert]].T @ weighted_nC
    finally:
        hook.remove()
    return gram_of


def _refitted_experts(kept: tuple[Tensor, ...], width: int, routed_tokens_E: Tensor) -> dict[int, Tensor]:
    """{expert: its kept channels} for experts that lose some channels and have enough tokens to be refitted."""
    pruned = {expert: kept_S for expert, kept_S in enumerate(kept) if 0 < len(kept_S) < width}
    refitted = {expert: kept_S for expert, kept_S in pruned.items() if routed_tokens_E[expert] >= len(kept_S)}
    if len(refitted) < len(pruned):
        log.warning(
            "%d experts have fewer calibration tokens than kept channels: not refitted", len(pruned) - len(refitted)
        )
    return refitted
