"""One MoE layer whose router may only choose among some of its experts, without running an expert again."""

import copy

import torch
from torch import Tensor

from moeprune.calibration.expert_inputs import channels_of
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.models.adapter import MoeLayer
from moeprune.models.runtime.contract import project_down
from moeprune.models.runtime.router import keep_router_rows

# Outputs of all experts are held for so many tokens at a time.
TOKEN_CHUNK = 64


class RestrictedLayer:
    """The losses of one layer on tokens ``x_TH`` when its router may only choose among some experts.

    Outputs ``f_te`` of all experts are turned into their Gram matrices once; where gates scale the experts' inputs
    (Llama 4), they are those for the input scaled by the gate that e gives t whenever it is chosen.
    """

    @torch.no_grad()
    def __init__(self, layer: MoeLayer, x_TH: Tensor) -> None:
        self.layer = layer
        self._x_TH = x_TH
        self._gram_TEE = torch.cat([_gram_TEE(layer, chunk_TH) for chunk_TH in x_TH.split(TOKEN_CHUNK)])
        self._gates_TE = self._gates(list(range(layer.expert_count)))

    @torch.no_grad()
    def loss(self, live: list[int]) -> float:
        """``||F(x) - F_S(x)||_F`` with S = ``live``."""
        return float(self.changes_T(live).sum().clamp(min=0).sqrt())

    @torch.no_grad()
    def changes_T(self, live: list[int]) -> Tensor:
        """``||F(x_t) - F_S(x_t)||^2`` of each token; float64."""
        delta_TE = self._gates_TE - self._gates(live)
        moved_TE = torch.bmm(self._gram_TEE, delta_TE.unsqueeze(-1)).squeeze(-1)
        return (moved_TE * delta_TE).sum(dim=-1)

    def _gates(self, live: list[int]) -> Tensor:
        """Gates of the outputs [T, E] that the router with only the rows of ``live`` gives; float64."""
        router = copy.deepcopy(self.layer.router)
        live_S = torch.tensor(live, device=self._x_TH.device)
        if len(live) < self.layer.expert_count:
            keep_router_rows(router, live_S)
        _, gates_TK, rows_TK = router(self._x_TH)
        if self.layer.gates_inputs:
            gates_TK = torch.ones_like(gates_TK)
        return _spread(gates_TK, live_S[rows_TK], self.layer.expert_count)


def _gram_TEE(layer: MoeLayer, x_TH: Tensor) -> Tensor:
    """``<f_te, f_td>`` of every token and pair of experts; float64."""
    experts, outputs = layer.experts, []
    input_gates_TE = _gates_of_all(layer, x_TH) if layer.gates_inputs else None
    for expert in range(layer.expert_count):
        scaled_TH = x_TH if input_gates_TE is None else (x_TH * input_gates_TE[:, expert, None]).to(x_TH.dtype)
        outputs.append(project_down(experts, expert, channels_of(experts, expert, scaled_TH)))
    f_TEH = torch.stack(outputs, dim=1).double()
    return torch.bmm(f_TEH, f_TEH.transpose(1, 2))


def _gates_of_all(layer: MoeLayer, x_TH: Tensor) -> Tensor:
    """The gate that each expert would give each token [T, E]; in Llama 4 it does not depend on the others."""
    router = copy.deepcopy(layer.router)
    router.top_k = layer.expert_count
    _, gates_TE, experts_TE = router(x_TH)
    return _spread(gates_TE, experts_TE, layer.expert_count)


def _spread(gates_TK: Tensor, experts_TK: Tensor, expert_count: int) -> Tensor:
    """Gates [T, E], 0 for experts not chosen; float64."""
    gates_TE = torch.zeros(len(gates_TK), expert_count, dtype=torch.float64, device=gates_TK.device)
    return gates_TE.scatter_(1, experts_TK, gates_TK.double())


def sampled_tokens(windows: TokenWindows, tokens: int, seed: int) -> Tensor:
    """Which of the windows' tokens are drawn with ``seed``, ``tokens`` of them or all; bool [N, T], padding is not."""
    valid_P = windows.mask_NT.flatten().nonzero().flatten()
    order_P = torch.randperm(len(valid_P), generator=torch.Generator().manual_seed(seed))
    sampled_NT = torch.zeros_like(windows.mask_NT, dtype=torch.bool)
    sampled_NT.view(-1)[valid_P[order_P[:tokens]]] = True
    return sampled_NT


def require_removable(layer: MoeLayer) -> None:
    """Raise InputError where no expert of the layer can go, or its router cannot lose rows."""
    if layer.routes_by_group:
        raise InputError(
            f"{layer.name} routes among groups of experts, which cannot shrink.",
            change="Use a scorer that does not try subsets of experts.",
        )
    if layer.top_k >= layer.expert_count:
        raise InputError(
            f"{layer.name} sends every token to {layer.top_k} of {layer.expert_count} experts; none can be removed.",
            change="Use a scorer of channels.",
        )
