"""Routed experts of different widths, stored without padding.

    width 4   ████            gate rows, up rows and down columns of expert 0
    width 1   █               ... of expert 1
    width 6   ██████          ... of expert 2

Which stored expert a router row leads to is a table of its own, so that rows may share an expert, or have none.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .activations import GatedActivation
from .kernels import Batch, mix_experts


class Expert(nn.Module):
    """One gated expert of ``width`` channels: three linear layers, named as checkpoints of most families name them.

    Any module that maps the same shapes may take the place of one of them, as a four-bit linear layer or a LoRA.
    """

    def __init__(
        self, width: int, hidden_size: int, *, bias: bool = False, device: object = None, dtype: object = None
    ) -> None:
        super().__init__()
        options: dict = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, width, **options)
        self.up_proj = nn.Linear(hidden_size, width, **options)
        self.down_proj = nn.Linear(width, hidden_size, **options)

    @property
    def width(self) -> int:
        """Intermediate channels."""
        return self.down_proj.in_features


class RaggedExperts(nn.ModuleList):
    """Routed experts of a pruned layer; a drop-in for the experts module of a transformers MoE block.

    Its items are the stored experts (`Expert`); only those that got a token are visited. ``activation`` combines gate
    and up. ``slot_of_row`` says which stored expert each router row leads to: -1 for none, the same one for rows that
    were merged (their gates add up); by default row i leads to expert i. With ``bias_EH`` [router rows, H] a token
    routed to row e with gate g also gets ``g * bias_e``. With ``gates_inputs`` the gate scales what goes into an
    expert, not what comes out of it (Llama 4).

    Raises ValueError for a slot that does not exist.
    """

    def __init__(
        self,
        experts: Iterable[Expert],
        activation: GatedActivation,
        slot_of_row: Sequence[int] | None = None,
        bias_EH: Tensor | None = None,
        gates_inputs: bool = False,
    ) -> None:
        super().__init__(experts)
        self.activation = activation
        self.gates_inputs = gates_inputs
        slots = len(self)
        self.slot_of_row = tuple(range(slots)) if slot_of_row is None else tuple(slot_of_row)
        self.rows_are_slots = self.slot_of_row == tuple(range(slots))
        if not all(-1 <= slot < slots for slot in self.slot_of_row):
            raise ValueError(f"slot_of_row {self.slot_of_row} names experts that are not there; there are {slots}.")
        self.bias_EH = None if bias_EH is None else nn.Parameter(bias_EH)

    @property
    def experts(self) -> list[Expert]:
        """The stored experts."""
        return list(self)  # type: ignore[arg-type]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stored expert."""
        return tuple(expert.width for expert in self.experts)

    @property
    def has_biases(self) -> bool:
        """Whether the experts' linear layers have biases."""
        return any(expert.down_proj.bias is not None for expert in self.experts)

    @property
    def row_widths(self) -> tuple[int, ...]:
        """Channels of what each router row leads to; 0 for rows without an expert."""
        widths = self.widths
        return tuple(widths[slot] if slot >= 0 else 0 for slot in self.slot_of_row)

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        slots_TK = experts_TK
        if not self.rows_are_slots:
            nothing = len(self)
            slots_E = [slot if slot >= 0 else nothing for slot in self.slot_of_row]
            slots_TK = torch.tensor(slots_E, device=experts_TK.device)[experts_TK]
        mixed_TH = mix_experts(Batch(self.experts, self.activation, hidden_TH, slots_TK, gates_TK, self.gates_inputs))
        if self.bias_EH is None:
            return mixed_TH
        output_gates_TK = torch.ones_like(gates_TK) if self.gates_inputs else gates_TK
        gates_TE = mixed_TH.new_zeros(len(mixed_TH), len(self.bias_EH))
        gates_TE.scatter_(1, experts_TK, output_gates_TK.to(mixed_TH.dtype))
        return torch.addmm(mixed_TH, gates_TE, self.bias_EH)

    def extra_repr(self) -> str:
        return f"router_rows={len(self.slot_of_row)}, experts={len(self)}, channels={sum(self.widths)}"
