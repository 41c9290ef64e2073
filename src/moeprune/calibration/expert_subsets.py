"""Which experts of a layer, kept together, change its routed output least; their tokens reroute."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.calibration.expert_inputs import channels_of, walk_expert_inputs
from moeprune.calibration.subset_search import GeneticSearch, best_of_all, eliminated, without
from moeprune.calibration.tensor_files import load_fields, save_fields
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError, require_positive
from moeprune.models.adapter import MoeLayer, moe_layers
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.workspace import IN_MEMORY, Workspace
from moeprune.models.runtime.contract import project_down
from moeprune.models.runtime.router import keep_router_rows

# Outputs of all experts are held for so many tokens at a time.
TOKEN_CHUNK = 64


@dataclass(frozen=True)
class ExpertSubsets:
    """The best subset found of each size; losses are ``||F(x) - F_S(x)||_F`` over the sampled tokens, float64.

    ``keep_LEE`` (bool): row k - 1 marks the k experts to keep. Fewer than the top-k of the router cannot route: those
    rows mark none, and their ``loss_LE`` (entry k - 1) is infinite. ``removal_loss_LE`` is the loss without expert e
    alone.
    """

    keep_LEE: Tensor
    loss_LE: Tensor
    removal_loss_LE: Tensor

    def save(self, path: Path) -> None:
        save_fields(self, path)


@dataclass(frozen=True)
class ExpertSubsetPass:
    """Searches the subsets S of a layer's experts with the smallest ``||F(x) - F_S(x)||_F`` (NAEE, arXiv 2402.14800).

    F is the routed output of the layer and F_S that of the same layer with the router rows of the others removed: its
    own router decides among S, so gates are what the family makes of them. Inputs x are those of the dense model, on
    ``tokens`` tokens drawn with ``seed`` from the windows (all of them, if there are fewer). With at most
    ``exhaustive_up_to`` experts all subsets of every size are tried, as in the paper; with more, experts are eliminated
    one by one, each time the one whose removal leaves the smallest loss (the paper does not go beyond 8 experts), or,
    with ``genetic``, combinations of experts are bred (MoE-I2, arXiv 2411.01016).

    With Gram matrices ``<f_te, f_td>`` [T, E, E] of the experts' outputs, made once per layer, a subset costs one call
    of the router and ``sum_t delta_t^T Gram_t delta_t``, delta the change of a token's gates: no expert runs again.
    Where gates scale the experts' inputs (Llama 4), f_te is the output for the input scaled by the gate that e gives t
    whenever it is chosen, and all gates of the outputs are 1.

    Raises InputError where nothing can be removed, or where the router chooses among groups of experts.
    """

    tokens: int = 2048
    exhaustive_up_to: int = 8
    seed: int = 0
    genetic: GeneticSearch | None = None

    stage: ClassVar[str] = "expert_subsets"
    version: ClassVar[int] = 1
    needs_removable_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self, "tokens")

    def __call__(
        self, model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> ExpertSubsets:
        for layer in moe_layers(skeleton(model)):
            _require_removable(layer)
        sampled_NT = self._sampled(windows)
        found = []
        for layer, inputs in walk_expert_inputs(model, windows, batch_size, "expert subsets", workspace):
            pieces = []
            for seen in inputs:
                rows = slice(seen.first_window, seen.first_window + len(seen.x_BTH))
                pieces.append(seen.x_BTH[sampled_NT[rows].to(seen.x_BTH.device)])
            found.append(self._search(_RestrictedLayer(layer, torch.cat(pieces))))
        return ExpertSubsets(*(torch.stack(field) for field in zip(*found, strict=True)))

    def load(self, path: Path) -> ExpertSubsets:
        return load_fields(ExpertSubsets, path)

    def _sampled(self, windows: TokenWindows) -> Tensor:
        """Which tokens are drawn; bool [N, T]."""
        valid_P = windows.mask_NT.flatten().nonzero().flatten()
        order_P = torch.randperm(len(valid_P), generator=torch.Generator().manual_seed(self.seed))
        sampled_NT = torch.zeros_like(windows.mask_NT, dtype=torch.bool)
        sampled_NT.view(-1)[valid_P[order_P[: self.tokens]]] = True
        return sampled_NT

    def _search(self, restricted: "_RestrictedLayer") -> tuple[Tensor, Tensor, Tensor]:
        """The fields of `ExpertSubsets` for one layer."""
        expert_count, least = restricted.layer.expert_count, restricted.layer.top_k
        removal_losses = [restricted.loss(without(range(expert_count), expert)) for expert in range(expert_count)]
        keep_EE = torch.zeros(expert_count, expert_count, dtype=torch.bool)
        loss_E = torch.full((expert_count,), torch.inf, dtype=torch.float64)
        keep_EE[-1], loss_E[-1] = True, 0
        search = best_of_all if expert_count <= self.exhaustive_up_to else self.genetic or eliminated
        for loss, kept in search(restricted.loss, expert_count, least):
            keep_EE[len(kept) - 1, kept] = True
            loss_E[len(kept) - 1] = loss
        return keep_EE, loss_E, torch.tensor(removal_losses, dtype=torch.float64)


class _RestrictedLayer:
    """The losses of one layer when its router may only choose among some experts."""

    @torch.no_grad()
    def __init__(self, layer: MoeLayer, x_TH: Tensor) -> None:
        self.layer = layer
        self._x_TH = x_TH
        self._gram_TEE = torch.cat([_gram_TEE(layer, chunk_TH) for chunk_TH in x_TH.split(TOKEN_CHUNK)])
        self._gates_TE = self._gates(list(range(layer.expert_count)))

    @torch.no_grad()
    def loss(self, live: list[int]) -> float:
        """``||F(x) - F_S(x)||_F`` with S = ``live``."""
        delta_TE = self._gates_TE - self._gates(live)
        moved_TE = torch.bmm(self._gram_TEE, delta_TE.unsqueeze(-1)).squeeze(-1)
        return float((moved_TE * delta_TE).sum().clamp(min=0).sqrt())

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


def _require_removable(layer: MoeLayer) -> None:
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
