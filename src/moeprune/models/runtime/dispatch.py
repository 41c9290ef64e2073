"""Groups a batch's (token, expert) assignments by expert, so that each expert computes on one contiguous slice."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The assignments of a batch, sorted by expert.

    ``token_A`` and ``gate_A`` (A = T * K assignments, less those to no expert) say which token each row belongs to and
    what its expert's output is multiplied with; ``counts`` is the number of rows of each expert. ``input_gate_A``,
    where a family scales the expert's input instead (Llama 4), is what with; ``gate_A`` is then 1.
    """

    token_A: Tensor
    gate_A: Tensor
    counts: list[int]
    input_gate_A: Tensor | None = None

    def inputs(self, hidden_TH: Tensor) -> Tensor:
        """What goes into the experts [A, H], rows sorted by expert."""
        hidden_AH = hidden_TH[self.token_A]
        if self.input_gate_A is None:
            return hidden_AH
        return (hidden_AH * self.input_gate_A.unsqueeze(-1)).to(hidden_TH.dtype)

    def active(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) for each expert that got a token."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def dispatch(experts_TK: Tensor, gates_TK: Tensor, expert_count: int, gates_inputs: bool = False) -> Dispatch:
    """Sort the assignments by expert; the order inside an expert is the order of the tokens.

    The index ``expert_count`` stands for no expert; such assignments are left out. With ``gates_inputs`` the gates
    scale what goes into the experts.
    """
    chosen_A = experts_TK.flatten()
    order_A = torch.argsort(chosen_A, stable=True)
    counts = torch.bincount(chosen_A, minlength=expert_count).tolist()[:expert_count]
    order_A = order_A[: sum(counts)]
    token_A, gate_A = order_A // experts_TK.shape[1], gates_TK.flatten()[order_A]
    if gates_inputs:
        return Dispatch(token_A, torch.ones_like(gate_A), counts, gate_A)
    return Dispatch(token_A, gate_A, counts)


def combine(output_AH: Tensor, routed: Dispatch, token_count: int) -> Tensor:
    """Gate-weighted sum of the rows of each token, ``m_t = sum_e g_te f_te`` [T, H].

    Gates may be of higher precision than the outputs; as in the families' own code, the product is rounded and not
    they.
    """
    gated_AH = (output_AH * routed.gate_A.unsqueeze(-1)).to(output_AH.dtype)
    mixed_TH = output_AH.new_zeros(token_count, output_AH.shape[1])
    return mixed_TH.index_add_(0, routed.token_A, gated_AH)
