"""Routed experts of different widths, stored without padding.

    width 4   ████            gate rows, up rows and down columns of expert 0
    width 1   █               ... of expert 1
    width 6   ██████          ... of expert 2

All experts of a layer share two flat parameters; an expert is a contiguous slice of each. Which stored expert a router
row leads to is a table of its own, so that rows may share an expert, or have none.
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

    ``weights`` computes the projections of the stored experts (`PackedWeights`, or its quantised counterpart), whose
    ``widths`` are given; only experts that got a token are visited. ``slot_of_row`` says which stored expert each
    router row leads to: -1 for none, the same one for rows that were merged (their gates add up); by default row i
    leads to expert i. With ``bias_EH`` [router rows, H] a token routed to row e with gate g also gets ``g * bias_e``.

    Raises ValueError for a slot that does not exist.
    """

    weights: Any
    _slot_of_row_E: Tensor

    def __init__(
        self,
        weights: nn.Module,
        widths: Sequence[int],
        act_fn: Callable[[Tensor], Tensor],
        slot_of_row: Sequence[int] | None = None,
        bias_EH: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.widths = tuple(widths)
        self.act_fn = act_fn
        slots = len(self.widths)
        self.slot_of_row = tuple(range(slots)) if slot_of_row is None else tuple(slot_of_row)
        self.rows_are_slots = self.slot_of_row == tuple(range(slots))
        if not all(-1 <= slot < slots for slot in self.slot_of_row):
            raise ValueError(f"slot_of_row {self.slot_of_row} names experts that are not there; there are {slots}.")
        rows = [slot if slot >= 0 else slots for slot in self.slot_of_row]
        self.register_buffer("_slot_of_row_E", torch.tensor(rows, dtype=torch.int64), persistent=False)
        self.bias_EH = None if bias_EH is None else nn.Parameter(bias_EH)

    @property
    def row_widths(self) -> tuple[int, ...]:
        """Channels of what each router row leads to; 0 for rows without an expert."""
        return tuple(self.widths[slot] if slot >= 0 else 0 for slot in self.slot_of_row)

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        slots_TK = experts_TK
        if not self.rows_are_slots:
            # Experts that were put into a model on an accelerator hold their table on the CPU.
            slots_TK = self._slot_of_row_E.to(experts_TK.device)[experts_TK]
        routed = dispatch(slots_TK, gates_TK, len(self.widths))
        hidden_AH = hidden_TH[routed.token_A]
        outputs = [hidden_TH.new_zeros(0, hidden_TH.shape[1])]  # where no token met an expert
        for slot, rows in routed.active():
            gate_TC, up_TC = self.weights.gate_and_up(slot, hidden_AH[rows]).chunk(2, dim=-1)
            outputs.append(self.weights.project_down(slot, self.act_fn(gate_TC) * up_TC))
        mixed_TH = combine(torch.cat(outputs), routed, len(hidden_TH))
        if self.bias_EH is None:
            return mixed_TH
        gates_TE = mixed_TH.new_zeros(len(mixed_TH), len(self.bias_EH))
        gates_TE.scatter_(1, experts_TK, gates_TK.to(mixed_TH.dtype))
        return torch.addmm(mixed_TH, gates_TE, self.bias_EH)

    def extra_repr(self) -> str:
        return f"router_rows={len(self.slot_of_row)}, experts={len(self.widths)}, channels={sum(self.widths)}"
