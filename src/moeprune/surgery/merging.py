"""Averages the weights of groups of experts into their leaders.

M-SMoE (arXiv 2310.01334, section 3) permutes the channels of each expert to match those of its group's leader and
averages by usage; HC-SMoE (arXiv 2410.08589) averages by usage without a permutation.
"""

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moeprune.errors import InputError
from moeprune.types import Merge


def merge_experts(experts: Any, leader_E: Tensor, weight_E: Tensor, align_channels: bool) -> None:
    """Replace in place the weights of each leader by the mean of its group's, ``sum_e weight_e W_e / sum_e weight_e``.

    In float64, rounded once to the weights' dtype; leaders without followers stay as they are. With ``align_channels``
    the channels of each member are first put in the order that matches its leader's best.
    """
    for leader in leader_E.unique().tolist():
        members = (leader_E == leader).nonzero().flatten().tolist()
        if members == [leader]:
            continue
        share_of = (weight_E[members].double() / weight_E[members].double().sum()).tolist()
        leading_CX = _channels(experts, leader)
        mean_CX = torch.zeros_like(leading_CX)
        for member, share in zip(members, share_of, strict=True):
            member_CX = _channels(experts, member)
            if align_channels and member != leader:
                member_CX = member_CX[matching_channels(leading_CX, member_CX)]
            mean_CX += share * member_CX
        hidden = experts.down_proj.shape[1]
        gate_CH, up_CH, down_CH, bias_C2 = mean_CX.split([hidden, hidden, hidden, mean_CX.shape[1] - 3 * hidden], dim=1)
        experts.gate_up_proj[leader].copy_(torch.cat([gate_CH, up_CH]))
        experts.down_proj[leader].copy_(down_CH.T)
        if bias_C2.numel():
            experts.gate_up_bias[leader].copy_(bias_C2.T.flatten())
            share_E1 = torch.tensor(share_of, dtype=torch.float64, device=bias_C2.device).unsqueeze(1)
            experts.down_bias[leader].copy_((share_E1 * experts.down_bias[members].double()).sum(dim=0))


def matching_channels(leading_CX: Tensor, member_CX: Tensor) -> Tensor:
    """For each channel of the leader, the member's channel to average with it, int64 [C]; each is used once.

    The permutation p that maximises ``sum_c <leading_c, member_p(c)>``, exactly (linear assignment): the weight
    matching of M-SMoE (arXiv 2310.01334), where a channel is its gate row, up row and down column in one vector.
    """
    similarity_CC = leading_CX @ member_CX.T
    _, columns = linear_sum_assignment(similarity_CC.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(member_CX.device)


def check_merge(merge: Merge, widths_LE: Tensor) -> None:
    """Raise InputError where leaders do not lead themselves, do not keep channels alone, or a group weighs nothing."""
    leader_LE, weight_LE = merge.leader_LE, merge.weight_LE
    if leader_LE.shape != widths_LE.shape or weight_LE.shape != widths_LE.shape:
        raise InputError(
            f"The plan's merge groups are for {tuple(leader_LE.shape)} (layers, experts), its channels for "
            f"{tuple(widths_LE.shape)}.",
            change="Make groups and channels from the same scores.",
        )
    leads_LE = leader_LE == torch.arange(leader_LE.shape[1])
    group_weight_LE = torch.zeros_like(weight_LE).scatter_add(1, leader_LE, weight_LE)
    led = leads_LE.gather(1, leader_LE).all() and torch.equal(leads_LE, widths_LE > 0)
    if not led or (weight_LE < 0).any() or (group_weight_LE[leads_LE] <= 0).any():
        raise InputError(
            "The plan's merge groups do not fit: a leader names itself, keeps channels while its followers keep none, "
            "and the weights of its group are at least 0 and not all 0.",
            change="Correct the allocator that made the plan.",
        )


def _channels(experts: Any, expert: int) -> Tensor:
    """[C, 3H] in float64: gate row, up row and down column of each channel; [C, 3H + 2] with its biases, if any."""
    gate_CH, up_CH = experts.gate_up_proj[expert].double().chunk(2)
    parts = [gate_CH, up_CH, experts.down_proj[expert].double().T]
    if getattr(experts, "gate_up_bias", None) is not None:
        parts.append(experts.gate_up_bias[expert].double().reshape(2, -1).T)
    return torch.cat(parts, dim=1)
