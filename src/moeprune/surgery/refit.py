"""Refits what is left of each pruned expert to what the dense expert computed, by least squares."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError, NumericalError, require_choice
from moeprune.models.adapter import MoeLayer
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.walk import LayerVisit, on_every_share, run_through, walk_layers
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.contract import gate_and_up
from moeprune.models.runtime.dispatch import dispatch
from moeprune.surgery.prune import (
    REMOVE_ROW,
    FinishedLayer,
    check_plan,
    check_row_policy,
    cut_layer,
    cut_layers,
    indexed_moe_layers,
    refuse_merging,
)
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
    were all silent.

    ``propagate`` says which layers the calibration text has gone through when it comes to a layer: the ``dense`` ones,
    so that gates and inputs are those of the dense model, or the ``changed`` ones, pruned and refitted, so that a layer
    is fitted to the inputs it will get, and makes up in part for the loss of those before it (layers are fitted in turn
    as in SparseGPT, arXiv 2301.00774); one more forward pass. What is fitted to is always the dense layer's output.

    Raises NumericalError when a Gram matrix is singular, which ``ridge=0`` allows.
    """

    ridge: float = 0.01
    empty_experts: str = REMOVE_ROW
    propagate: Literal["dense", "changed"] = "dense"
    refuses_merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_row_policy(self.empty_experts)
        require_choice("propagate", self.propagate, ("dense", "changed"))
        if not self.ridge >= 0:
            raise InputError(f"ridge={self.ridge} is not possible.", change="Use a number of at least 0, as 0.01.")

    def __call__(
        self,
        model: Model,
        plan: Plan,
        statistics: Statistics,
        windows: TokenWindows,
        batch_size: int,
        workspace: Workspace = IN_MEMORY,
    ) -> Iterator[FinishedLayer]:
        """Refit and cut in place, layer by layer; one forward pass over the windows, two with ``propagate="changed"``.

        Raises InputError as `cut_layers` does, and for a plan that merges.
        """
        refuse_merging(plan, "this refit")
        check_plan(model, plan, self.empty_experts)
        wanted = _refitted_experts(plan, statistics.routed_tokens_LE)
        if not any(wanted):
            return cut_layers(model, plan, self.empty_experts, workspace)
        visits = walk_layers(model, windows.batches(batch_size), "refit", workspace, self.propagate)
        return self._refit_layers(indexed_moe_layers(model), plan, wanted, visits)

    @torch.no_grad()
    def _refit_layers(
        self,
        moe_layer_at: dict[nn.Module, tuple[int, MoeLayer]],
        plan: Plan,
        wanted: list[dict[int, Tensor]],
        visits: Iterator[LayerVisit],
    ) -> Iterator[FinishedLayer]:
        for visit in visits:
            if visit.layer in moe_layer_at:
                index, layer = moe_layer_at[visit.layer]
                if wanted[index]:
                    self._refit_layer(layer, wanted[index], gram_matrices(visit, layer, wanted[index]))
                elif self.propagate == "dense":
                    run_through(visit.outputs)  # before the layer changes
                cut_layer(visit.name, layer, index, plan, self.empty_experts)
            yield visit.depth, visit.name, visit.layer

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


@torch.no_grad()
def gram_matrices(visit: LayerVisit, layer: MoeLayer, kept_of: dict[int, Tensor]) -> dict[int, Tensor]:
    """The rows S of each wanted expert's Gram matrix, float64 [S, C], see `Refit`; runs all batches of the visit."""
    path = layer.name.removeprefix(f"{visit.name}.")
    parts = on_every_share(
        visit.shares,
        lambda share: _gram_matrices(share.layer.get_submodule(path), layer, kept_of, share.outputs),
    )
    gram_of, *others = parts  # the first device is the layer's; adding in place holds no second copy of all
    for part in others:
        for expert, gram_SC in gram_of.items():
            gram_SC += part.pop(expert).to(gram_SC.device)
    return gram_of


@torch.no_grad()
def _gram_matrices(
    experts: Any, layer: MoeLayer, kept_of: dict[int, Tensor], outputs: Iterator[tuple[Tensor, Tensor]]
) -> dict[int, Tensor]:
    """The part of `gram_matrices` that the batches of one device give, whose replica of the experts is ``experts``."""
    activation = gated_activation(experts)
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
            routed = dispatch(experts_TK, gates_TK, layer.expert_count, layer.gates_inputs)
            x_AH = routed.inputs(x_TH)
            for expert, rows in routed.active():
                if expert not in gram_of:
                    continue
                gate_nC, up_nC = gate_and_up(experts, expert, x_AH[rows]).chunk(2, dim=-1)
                weight_n = q_T[routed.token_A[rows]].sqrt() * routed.gate_A[rows].double()
                weighted_nC = activation(gate_nC, up_nC).double() * weight_n.unsqueeze(-1)
                gram_of[expert] += weighted_nC[:, kept_of[expert].to(weighted_nC.device)].T @ weighted_nC
    finally:
        hook.remove()
    return gram_of


def _refitted_experts(plan: Plan, routed_tokens_LE: Tensor) -> list[dict[int, Tensor]]:
    """For each MoE layer {expert: its kept channels}, of experts that lose some and have enough tokens for a refit."""
    wanted, too_few = [], 0
    for kept, routed_tokens_E in zip(plan.kept, routed_tokens_LE, strict=True):
        pruned = {expert: kept_S for expert, kept_S in enumerate(kept) if 0 < len(kept_S) < plan.width}
        wanted.append({expert: kept_S for expert, kept_S in pruned.items() if routed_tokens_E[expert] >= len(kept_S)})
        too_few += len(pruned) - len(wanted[-1])
    if too_few:
        log.warning("%d experts have fewer calibration tokens than kept channels: not refitted", too_few)
    return wanted
