"""Ways to compute the routed experts of a layer; all give the same sums, and `choose_kernel` says which is fastest.

Layers are called, never read, so that a four-bit linear layer or a LoRA may stand for any of them. Gate and up rows
packed side by side, products without the call, buckets of padded widths, and experts that gather and add one by one
were measured on CPU too: none was faster.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .activations import GatedActivation
from .dispatch import Dispatch, combine, dispatch


@dataclass(frozen=True)
class Batch:
    """Tokens and the experts they go to.

    ``experts`` are `ragged.Expert` modules, as in `RaggedExperts`; slot ``len(experts)`` stands for none.
    With ``gates_inputs`` the gate scales what goes into an expert, not what comes out of it.
    """

    experts: Sequence[Any]
    activation: GatedActivation
    hidden_TH: Tensor
    slots_TK: Tensor
    gates_TK: Tensor
    gates_inputs: bool = False

    def sorted(self) -> Dispatch:
        """The assignments, sorted by expert."""
        return dispatch(self.slots_TK, self.gates_TK, len(self.experts), self.gates_inputs)


Kernel = Callable[[Batch], Tensor]


def mix_experts(batch: Batch) -> Tensor:
    """Gate-weighted sum of the experts of each token, ``m_t = sum_k g_tk f_(slot tk)(x_t)`` [T, H]."""
    return choose_kernel(batch)(batch)


def choose_kernel(batch: Batch) -> Kernel:
    """The kernel for this batch.

    On CPU from measurement (benchmarks/inference.py prints it). On CUDA no GPU was at hand to measure: `by_width` is
    chosen where it launches at most a quarter of the loop's products.
    """
    assignments = batch.slots_TK.numel()
    if len(batch.hidden_TH) == 1:
        return one_token
    if batch.hidden_TH.is_cuda and assignments >= len(batch.experts) and _suits_grouped_products(batch):
        return by_width
    return loop


def one_token(batch: Batch) -> Tensor:
    """A single token's experts one after the other: nothing to sort, gather or scatter."""
    mixed_1H = torch.zeros_like(batch.hidden_TH)
    for slot, gate_11 in zip(batch.slots_TK[0].tolist(), batch.gates_TK.split(1, dim=1), strict=True):
        if slot == len(batch.experts):
            continue
        if batch.gates_inputs:
            mixed_1H = mixed_1H + _output(batch, slot, (batch.hidden_TH * gate_11).to(mixed_1H.dtype))
        else:
            mixed_1H = mixed_1H + (_output(batch, slot, batch.hidden_TH) * gate_11).to(mixed_1H.dtype)
    return mixed_1H


def loop(batch: Batch) -> Tensor:
    """The active experts one after the other, each on its slice of one sorted buffer."""
    routed = batch.sorted()
    inputs_AH = routed.inputs(batch.hidden_TH)
    outputs = [inputs_AH.new_zeros(0, inputs_AH.shape[1])]  # where no token met an expert
    outputs += [_output(batch, slot, inputs_AH[rows]) for slot, rows in routed.active()]
    return combine(torch.cat(outputs), routed, len(batch.hidden_TH))


def by_width(batch: Batch) -> Tensor:
    """One grouped matrix product for all active experts of equal width, whose weights are stacked for the call.

    Nothing is padded: aligned plans have few widths. Costs a copy of those weights, held while their width is computed.
    Slower than the loop on CPU. Asks for plain layers without bias, and widths of whole 16 bytes.
    """
    order = sorted(range(len(batch.experts)), key=lambda slot: batch.experts[slot].width)
    place_of_slot = torch.empty(len(order) + 1, dtype=torch.int64)
    place_of_slot[order] = torch.arange(len(order))
    place_of_slot[-1] = len(order)
    routed = replace(batch, slots_TK=place_of_slot.to(batch.slots_TK.device)[batch.slots_TK]).sorted()
    inputs_AH = routed.inputs(batch.hidden_TH)
    outputs_AH = torch.zeros_like(inputs_AH)
    active = ((batch.experts[order[place]], rows) for place, rows in routed.active())
    for width, members in groupby(active, key=lambda member: member[0].width):
        if width:
            experts, slices = zip(*members, strict=True)
            rows = slice(slices[0].start, slices[-1].stop)
            ends = [one.stop - rows.start for one in slices]
            outputs_AH[rows] = _compute_group(experts, batch.activation, inputs_AH[rows], ends)
    return combine(outputs_AH, routed, len(batch.hidden_TH))


def _compute_group(experts: Sequence[Any], activation: GatedActivation, x_NH: Tensor, ends: Sequence[int]) -> Tensor:
    """f of experts of one width on rows sorted by expert; those of expert i end before ``ends[i]``."""
    ends_G = torch.tensor(ends, dtype=torch.int32, device=x_NH.device)
    gates_and_ups = torch.stack([layer.weight for expert in experts for layer in (expert.gate_proj, expert.up_proj)])
    gate_up_GCH = gates_and_ups.view(len(experts), -1, x_NH.shape[1])
    gate_NC, up_NC = F.grouped_mm(x_NH, gate_up_GCH.transpose(1, 2), offs=ends_G).chunk(2, dim=1)
    del gates_and_ups, gate_up_GCH  # two thirds of these weights: not kept while the rest is stacked
    down_GHC = torch.stack([expert.down_proj.weight for expert in experts])
    return F.grouped_mm(activation(gate_NC, up_NC), down_GHC.transpose(1, 2), offs=ends_G)


def _suits_grouped_products(batch: Batch) -> bool:
    """Whether this GPU and PyTorch have the grouped product, and these experts are made for it."""
    hidden_TH, experts = batch.hidden_TH, batch.experts
    if not hasattr(F, "grouped_mm") or torch.cuda.get_device_capability(hidden_TH.device) < (8, 0):
        return False
    if hidden_TH.dtype != torch.bfloat16 or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return has_few_plain_widths(experts, hidden_TH)


def has_few_plain_widths(experts: Sequence[Any], hidden_TH: Tensor) -> bool:
    """At most a quarter as many widths as experts, all of whole 16 bytes in 16 bits; linear layers without bias, on
    the tokens' device."""
    widths = {expert.width for expert in experts}
    if 4 * len(widths) > len(experts) or any(size % 8 for size in (*widths, hidden_TH.shape[1])):
        return False
    layers = [layer for expert in experts for layer in (expert.gate_proj, expert.up_proj, expert.down_proj)]
    return all(_is_plain(layer) and layer.weight.device == hidden_TH.device for layer in layers)


def _output(batch: Batch, slot: int, x_NH: Tensor) -> Tensor:
    """f of one expert [N, H]."""
    expert = batch.experts[slot]
    return expert.down_proj(batch.activation(expert.gate_proj(x_NH), expert.up_proj(x_NH)))


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer computes ``x W^T`` and nothing else: no bias, no hooks, no patched forward."""
    watched = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Linear and layer.bias is None and not watched
