"""Every expert on every token, whether it was routed there or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeprune.calibration.expert_inputs import ExpertInputs, channels_of, visit_expert_inputs
from moeprune.calibration.tensor_files import load_fields, save_fields
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import require_positive
from moeprune.models.adapter import MoeLayer, moe_layers


@dataclass(frozen=True)
class AllTokens:
    """Sums over all tokens of a group of windows, float64, padding excluded; axis G, the groups.

    ``output_sum_LEGH`` sums the outputs f of each expert, no gate applied; ``tokens_G`` counts the tokens.
    """

    tokens_G: Tensor
    output_sum_LEGH: Tensor

    @property
    def mean_output_LEH(self) -> Tensor:
        """Mean output of each expert over all tokens."""
        return self.output_sum_LEGH.sum(dim=2) / self.tokens_G.sum()

    def save(self, path: Path) -> None:
        save_fields(self, path)


@dataclass(frozen=True)
class AllTokensPass:
    """The outputs of all experts on all tokens, summed within ``groups`` groups of consecutive windows.

    Groups (at most one per window) are for criteria that compare experts on several pieces of text. As f = W_down h is
    linear in h, h is summed over tokens first: the cost is two of the three projections of every expert for every
    token, E / K times what routing makes of them. Raises InputError for fewer than one group.
    """

    groups: int = 10

    stage: ClassVar[str] = "all_tokens"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_positive(self, "groups")

    def __call__(self, model: PreTrainedModel, windows: TokenWindows, batch_size: int) -> AllTokens:
        window_count = len(windows.input_ids_NT)
        group_count = min(self.groups, window_count)
        group_of_window_N = torch.arange(window_count) * group_count // window_count
        layers = moe_layers(model)
        channel_sum_LEGC = [
            torch.zeros(layer.expert_count, group_count, layer.widths[0], dtype=torch.float64) for layer in layers
        ]

        def receive(seen: ExpertInputs) -> None:
            group_B = group_of_window_N[seen.first_window : seen.first_window + len(seen.x_BTH)]
            for expert in range(layers[seen.layer].expert_count):
                h_BTC = channels_of(layers[seen.layer].experts, expert, seen.x_BTH)
                valid_h_BTC = h_BTC.masked_fill(seen.mask_BT.unsqueeze(-1) == 0, 0)
                channel_sum_BC = valid_h_BTC.sum(dim=1, dtype=torch.float64).cpu()
                channel_sum_LEGC[seen.layer][expert].index_add_(0, group_B, channel_sum_BC)

        visit_expert_inputs(model, windows, batch_size, receive, "all experts on all tokens")
        tokens_N = windows.mask_NT.sum(dim=1, dtype=torch.float64)
        tokens_G = torch.zeros(group_count, dtype=torch.float64).index_add_(0, group_of_window_N, tokens_N)
        output_sums = [_outputs_EGH(layer, sums) for layer, sums in zip(layers, channel_sum_LEGC, strict=True)]
        return AllTokens(tokens_G, torch.stack(output_sums))

    def load(self, path: Path) -> AllTokens:
        return load_fields(AllTokens, path)


def _outputs_EGH(layer: MoeLayer, channel_sum_EGC: Tensor) -> Tensor:
    """``W_down`` applied expert by expert; float64."""
    down_EHC = layer.experts.down_proj.detach()
    return torch.stack(
        [sums_GC @ down_HC.double().cpu().T for sums_GC, down_HC in zip(channel_sum_EGC, down_EHC, strict=True)]
    )
