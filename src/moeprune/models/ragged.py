"""Routed experts of different widths, stored without padding.

    width 4   ████            gate rows, up rows and down columns of expert 0
    width 1   █               ... of expert 1
    width 6   ██████          ... of expert 2

All experts of a layer share two flat parameters; an expert is a contiguous slice of each.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeprune.models.dispatch import combine, dispatch


class PackedWeights(nn.Module):
    """Weights of E gated experts with widths C_e in two flat parameters.

    ``gate_up`` [2 * sum C_e, H]: for each expert its gate rows, then its up rows.
    ``down`` [sum C_e, H]: for each expert the transposed columns of its down projection.
    """

    def __init__(self, widths: Sequence[int], hidden_size: int, *, device: object = None, dtype: object = None) -> None:
        super().__init__()
        total = sum(widths)
        self.gate_up = nn.Parameter(torch.empty(2 * total, hidden_size, device=device, dtype=dtype))  # type: ignore[call-overload]
        self.down = nn.Parameter(torch.empty(total, hidden_size, device=device, dtype=dtype))  # type: ignore[call-overload]
        self._start = [0, *accumulate(widths)]

    def gate_up_of(self, expert: int) -> Tensor:
        """[2 C_e, H], a view."""
        return self.gate_up[2 * self._start[expert] : 2 * self._start[expert + 1]]

    def down_of(self, expert: int) -> Tensor:
        """[C_e, H], a view; the transpose of the expert's down projection."""
        return self.down[self._start[expert] : self._start[expert + 1]]

    def gate_and_up(self, expert: int, hidden_TH: Tensor) -> Tensor:
        """``[x W_gate^T, x W_up^T]`` [T, 2 C_e]."""
        return F.linear(hidden_TH, self.gate_up_of(expert))

    def project_down(self, expert: int, channels_TC: Tensor) -> Tensor:
        """``h W_down^T`` [T, H]."""
        return channels_TC @ self.down_of(expert)


class RaggedExperts(nn.Module):
    """Routed experts of a pruned layer; a drop-in for the experts module of a transformers MoE block.

    ``weights`` computes an expert's projections (`PackedWeights`, or its quantised counterpart); only experts that got
    a token are visited.
    """

    weights: Any

    def __init__(self, weights: nn.Module, widths: Sequence[int], act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.widths = tuple(widths)
        self.act_fn = act_fn

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        routed = dispatch(experts_TK, gates_TK, len(self.widths))
        hidden_AH = hidden_TH[routed.token_A]
        outputs = []
        for expert, rows in routed.active():
            gate_TC, up_TC = self.weights.gate_and_up(expert, hidden_AH[rows]).chunk(2, dim=-1)
            outputs.append(self.weights.project_down(expert, self.act_fn(gate_TC) * up_TC))
        return combine(torch.cat(outputs), routed, len(hidden_TH))

    def extra_repr(self) -> str:
        return f"experts={len(self.widths)}, channels={sum(self.widths)}"
