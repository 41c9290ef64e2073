"""Groups a batch's (token, expert) assignments by expert, so that each expert computes on one contiguous slice."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """The assignments of a batch, sorted by expert.

    ``token_A`` and ``gate_A`` (A = T * K assignments, less those to no expert) say which token each row belongs to and
    with what gate; ``counts`` is the number of rows of each expert.
    """

    token_A: Tensor
    gate_A: Tensor
    counts: list[int]

    def active(self) -> Iterator[tuple[int, slice]]:
        """(expert, its rows) for each expert that got a token."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def dispatch(experts_TK: Tensor, gates_TK: Tensor, expert_count: int) -> Dispatch:
    """Sort the assignments by expert; the order inside an expert is the order of the tokens.

    The index ``expert_count`` stands for no expert; such assignments are left out.
    """
    chosen_A = experts_TK.flatten()
    order_A = torch.argsort(chosen_A, stable=True)
    counts = torch.bincount(chosen_A, minlength=expert_count).tolist()[:expert_count]
    order_A = order_A[: sum(counts)]
    return Dispatch(order_A // experts_TK.shape[1], gates_TK.flatten()[order_A], counts)


def combine(output_AH: Tensor, routed: Dispatch, token_count: int) -> Tensor:
    """Gate-weighted sum of the rows of each token, ``m_t = sum_e g_te f_te`` [T, H].

    Gates may be of higher precision than the outputs; as in the families' own code, the product is rounded and not
    they.
    """
    gated_AH = (output_AH * routed.gate_A.unsqueeze(-1)).to(output_AH.dtype)
    mixed_TH = output_AH.new_zeros(token_count, output_AH.shape[1])
    return mixed_TH.index_add_(0, routed.token_A, gated_AH)
