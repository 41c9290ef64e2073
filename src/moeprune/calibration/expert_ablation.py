"""What each expert is worth in truth: the loss of its layer without it, the others' routing decided anew."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.calibration.expert_inputs import walk_expert_inputs
from moeprune.calibration.recorder import OUTPUT_NORM_EPS
from moeprune.calibration.restricted_layer import RestrictedLayer, require_removable, sampled_tokens
from moeprune.calibration.subset_search import without
from moeprune.calibration.tensor_files import load_fields, save_fields
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import require_positive
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.workspace import IN_MEMORY, Workspace


@dataclass(frozen=True)
class ExpertAblations:
    """``loss_LE``: the block-local loss of each layer without expert e alone; float64."""

    loss_LE: Tensor

    def save(self, path: Path) -> None:
        save_fields(self, path)


@dataclass(frozen=True)
class ExpertAblationPass:
    """The block-local relative loss of leaving out one expert, its router row too (arXiv 2606.18304, "true ablation"):

        sum_t q_t ||y'_t - y_t||^2 = sum_t q_t ||F(x_t) - F_-e(x_t)||^2,     q_t = 1 / (||y_t||^2 + eps)

    F is the routed output of the layer; F_-e that of the same layer without e, whose router gives e's tokens to others,
    and where gates are not renormalised more weight to all: so tokens that e never saw count as well. The sum runs over
    ``tokens`` tokens drawn with ``seed`` from the windows (all of them, if there are fewer), inputs are those of the
    dense model. The paper runs the layer again for each expert; here experts run once, see `RestrictedLayer`.

    Raises InputError where no expert can be removed, or where the router chooses among groups of experts.
    """

    tokens: int = 2048
    seed: int = 0

    stage: ClassVar[str] = "expert_ablation"
    version: ClassVar[int] = 1
    needs_removable_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self, "tokens")

    def __call__(
        self, model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> ExpertAblations:
        for layer in moe_layers(skeleton(model)):
            require_removable(layer)
        sampled_NT = sampled_tokens(windows, self.tokens, self.seed)
        losses = []
        for layer, inputs in walk_expert_inputs(model, windows, batch_size, "expert ablations", workspace):
            pieces = []
            for seen in inputs:
                drawn_BT = sampled_NT[seen.first_window : seen.first_window + len(seen.x_BTH)].to(seen.x_BTH.device)
                y_sq_T = seen.y_BTH[drawn_BT].double().square().sum(dim=-1)
                pieces.append((seen.x_BTH[drawn_BT], 1 / (y_sq_T + OUTPUT_NORM_EPS)))
            x_TH, q_T = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            restricted, everyone = RestrictedLayer(layer, x_TH), range(layer.expert_count)
            losses.append([float((q_T * restricted.changes_T(without(everyone, e))).sum()) for e in everyone])
        return ExpertAblations(torch.tensor(losses, dtype=torch.float64))

    def load(self, path: Path) -> ExpertAblations:
        return load_fields(ExpertAblations, path)
