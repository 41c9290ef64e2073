"""Sums over routed tokens of how a loss depends on every channel: one forward and one backward pass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moeprune.calibration.expert_gradients import (
    ExpertGradients,
    block_local_gradients,
    language_model_gradients,
)
from moeprune.calibration.recorder import at_least_float32
from moeprune.calibration.tensor_files import load_fields, save_fields
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import require_choice
from moeprune.models.adapter import moe_layers
from moeprune.models.layers.streaming import Model, skeleton
from moeprune.models.layers.workspace import IN_MEMORY, Workspace

BLOCK_LOCAL = "block_local"
LANGUAGE_MODEL = "language_model"
LOSSES = (BLOCK_LOCAL, LANGUAGE_MODEL)


@dataclass(frozen=True)
class LossGradients:
    """Sums over the tokens routed to an expert; float64, padding excluded. With ``d = dLoss/dh`` of a token:

    ``contribution`` is ``h d``; its square is the empirical Fisher information of a mask on the channel, taken per
    token, not per sequence. ``weight_saliency`` is SNIP's, ``sum |W * dLoss/dW|`` over the weights of the channel (a
    row of gate, a row of up, their biases, a column of down), where dLoss/dW sums over the tokens of one batch and the
    absolute values are then added over batches: so it depends on the batch size. Taking them once, after all batches,
    would need the gradient of every weight at once. The other sums do not depend on the batch size beyond rounding.
    """

    routed_tokens_LE: Tensor
    contribution_sum_LEC: Tensor  # sum h d
    contribution_abs_sum_LEC: Tensor  # sum |h d|
    contribution_sq_sum_LEC: Tensor  # sum (h d)^2
    gradient_sq_sum_LEC: Tensor  # sum d^2
    weight_saliency_sum_LEC: Tensor

    def save(self, path: Path) -> None:
        save_fields(self, path)


@dataclass(frozen=True)
class LossGradientPass:
    """Gradients of one of two losses with respect to the channels.

    ``language_model``: the negative log-likelihood in nats, summed over the predicted tokens, through the whole model;
    a backward pass, with the weight gradients of the routed experts made and dropped layer by layer. ``block_local``:
    ``sum_t q_t ||y'_t - y_t||^2`` of arXiv 2606.18304, inside each layer, with all its routed experts scaled by
    ``alpha``; see `block_local_gradients`.

    Raises InputError for any other loss.
    """

    loss: str
    alpha: float = 0.9

    stage: ClassVar[str] = "loss_gradients"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_choice("loss", self.loss, LOSSES)

    @property
    def refuses_float16(self) -> bool:
        """Whether `block_local_gradients` gives the sums."""
        return self.loss == BLOCK_LOCAL

    @property
    def needs_whole_model(self) -> bool:
        """Whether all layers must be in memory at once."""
        return self.loss == LANGUAGE_MODEL

    def __call__(
        self, model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> LossGradients:
        sums = [_LayerSums(layer.experts) for layer in moe_layers(skeleton(model))]

        def receive(gradients: ExpertGradients) -> None:
            sums[gradients.layer].add(gradients)

        label = f"gradients of the {self.loss} loss"
        if self.loss == LANGUAGE_MODEL:
            language_model_gradients(model, windows, batch_size, receive, label)
        else:
            block_local_gradients(model, windows, batch_size, self.alpha, receive, label, workspace)
        channel_LESC = torch.stack([layer.channel_ESC for layer in sums])
        tokens_LE = torch.stack([layer.tokens_E for layer in sums])
        return LossGradients(tokens_LE, *channel_LESC.unbind(dim=2))

    def load(self, path: Path) -> LossGradients:
        return load_fields(LossGradients, path)


class _LayerSums:
    """The sums of one layer over all batches; S is the order of the fields of `LossGradients`."""

    def __init__(self, experts: torch.nn.Module) -> None:
        expert_count, _, width = experts.down_proj.shape  # type: ignore[misc]
        self.tokens_E = torch.zeros(expert_count, dtype=torch.float64)
        self.channel_ESC = torch.zeros(expert_count, 5, width, dtype=torch.float64)

    @torch.no_grad()
    def add(self, gradients: ExpertGradients) -> None:
        for expert, rows in gradients.routed.active():
            d_nC = at_least_float32(gradients.dh_AC[rows])
            contribution_nC = at_least_float32(gradients.h_AC[rows]) * d_nC
            terms = [contribution_nC, contribution_nC.abs(), contribution_nC.square(), d_nC.square()]
            sums_SC = [term_nC.sum(dim=0, dtype=torch.float64) for term_nC in terms]
            sums_SC.append(_weight_saliency_C(gradients, expert, rows))
            self.channel_ESC[expert] += torch.stack(sums_SC).cpu()
            self.tokens_E[expert] += gradients.valid_A[rows].sum().cpu()


def _weight_saliency_C(gradients: ExpertGradients, expert: int, rows: slice) -> Tensor:
    """``sum |W * dLoss/dW|`` over the weights of each channel, of one batch; float64."""
    experts: Any = gradients.experts
    dpre_activation_nI = gradients.dpre_activation_AI[rows]
    dgate_up_IH = dpre_activation_nI.T @ gradients.x_AH[rows]
    ddown_HC = gradients.df_AH[rows].T @ gradients.h_AC[rows]
    gate_up_I = (at_least_float32(experts.gate_up_proj[expert]) * dgate_up_IH).abs().sum(dim=1, dtype=torch.float64)
    gate_up_bias_EI = getattr(experts, "gate_up_bias", None)
    if gate_up_bias_EI is not None:
        gate_up_I += (at_least_float32(gate_up_bias_EI[expert]) * dpre_activation_nI.sum(dim=0)).abs()
    down_C = (at_least_float32(experts.down_proj[expert]) * ddown_HC).abs().sum(dim=0, dtype=torch.float64)
    return gate_up_I.unflatten(0, (2, -1)).sum(dim=0) + down_C
