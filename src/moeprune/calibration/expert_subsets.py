"""Which experts of a layer, kept together, change its routed output least; their tokens reroute."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.calibration.expert_inputs import walk_expert_inputs
from moeprune.calibration.restricted_layer import RestrictedLayer, require_removable, sampled_tokens
from moeprune.calibration.subset_search import GeneticSearch, best_of_all, eliminated, without
from moeprune.calibration.tensor_files import load_fields, save_fields
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import require_positive
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.workspace import IN_MEMORY, Workspace


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
    version: ClassVar[int] = 2  # 2: experts in another order of sums
    needs_removable_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self, "tokens")

    def __call__(
        self, model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> ExpertSubsets:
        for layer in moe_layers(skeleton(model)):
            require_removable(layer)
        sampled_NT = sampled_tokens(windows, self.tokens, self.seed)
        found = []
        for layer, inputs in walk_expert_inputs(model, windows, batch_size, "expert subsets", workspace):
            pieces = []
            for seen in inputs:
                rows = slice(seen.first_window, seen.first_window + len(seen.x_BTH))
                pieces.append(seen.x_BTH[sampled_NT[rows].to(seen.x_BTH.device)])
            found.append(self._search(RestrictedLayer(layer, torch.cat(pieces))))
        return ExpertSubsets(*(torch.stack(field) for field in zip(*found, strict=True)))

    def load(self, path: Path) -> ExpertSubsets:
        return load_fields(ExpertSubsets, path)

    def _search(self, restricted: RestrictedLayer) -> tuple[Tensor, Tensor, Tensor]:
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
