"""Every expert on every token, whether it was routed there or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moeprune.calibration.expert_inputs import channels_of, walk_expert_inputs
from moeprune.calibration.tensor_files import load_fields, save_fields
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import require_positive
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import IN_MEMORY, Workspace


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
    token, E / K times what routing makes of them. Where gates scale the experts' inputs (Llama 4), none is applied: all
    experts see the same inputs. Raises InputError for fewer than one group.
    """

    groups: int = 10

    stage: ClassVar[str] = "all_tokens"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_positive(self, "groups")

    @torch.no_grad()
    def __call__(
        self, model: Model, windows: TokenWindows, batch_size: int, workspace: Workspace = IN_MEMORY
    ) -> AllTokens:
        window_count = len(windows.input_ids_NT)
        group_count = min(self.groups, window_count)
        group_of_window_N = torch.arange(window_count) * group_count // window_count
        tokens_N = windows.mask_NT.sum(dim=1, dtype=torch.float64)
        tokens_G = torch.zeros(group_count, dtype=torch.float64).index_add_(0, group_of_window_N, tokens_N)
        output_sum_LEGH = []
        for layer, inputs in walk_expert_inputs(model, windows, batch_size, "all experts on all tokens", workspace):
            shape = (layer.expert_count, group_count, layer.widths[0])
            channel_sum_EGC = torch.zeros(shape, dtype=torch.float64)
            for seen in inputs:
                group_B = group_of_window_N[seen.first_window : seen.first_window + len(seen.x_BTH)]
                for expert in range(layer.expert_count):
                    h_BTC = _channels_of_batch(layer.experts, expert, seen.x_BTH)
                    valid_h_BTC = h_BTC.masked_fill(seen.mask_BT.unsqueeze(-1) == 0, 0)
                    channel_sum_BC = valid_h_BTC.sum(dim=1, dtype=torch.float64).cpu()
                    channel_sum_EGC[expert].index_add_(0, group_B, channel_sum_BC)
            output_sum_LEGH.append(_output_sum_EGH(layer.experts, channel_sum_EGC, tokens_G))
        return AllTokens(tokens_G, torch.stack(output_sum_LEGH))

    def load(self, path: Path) -> AllTokens:
        return load_fields(AllTokens, path)


def _channels_of_batch(experts: Any, expert: int, x_BTH: Tensor) -> Tensor:
    return channels_of(experts, expert, x_BTH.flatten(0, 1)).unflatten(0, x_BTH.shape[:2])


def _output_sum_EGH(experts: Any, channel_sum_EGC: Tensor, tokens_G: Tensor) -> Tensor:
    """``W_down`` of the summed channels, and its bias once per token, expert by expert; float64."""
    outputs = [
        sums_GC @ down_HC.double().cpu().T for sums_GC, down_HC in zip(channel_sum_EGC, experts.down_proj, strict=True)
    ]
    output_sum_EGH = torch.stack(outputs)
    down_bias_EH = getattr(experts, "down_bias", None)
    if down_bias_EH is not None:
        output_sum_EGH += tokens_G.unsqueeze(-1) * down_bias_EH.double().cpu().unsqueeze(1)
    return output_sum_EGH
