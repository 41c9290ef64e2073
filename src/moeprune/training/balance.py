"""Load balancing, one loss per layer: pooling the layers lets a single expert die unnoticed."""

import torch
from torch import Tensor

from moeprune.models.adapter import Routing


def load_balancing_loss(routing: list[Routing], counted_T: Tensor | None = None) -> Tensor:
    """Mean over layers of ``E / K * sum_e f_e p_e``; 1 when a layer is balanced, 0 where no token counts.

    Tokens count where ``counted_T`` (bool) says so, or all of them.

    ``f_e`` is the share of tokens that layer sends to expert e, ``p_e`` the mean softmax probability of e
    (Switch Transformers 2101.03961, section 2.2, extended to top-k). transformers' own auxiliary loss pools all layers.
    """
    if counted_T is not None:
        routing = [
            Routing(layer.logits_TE[counted_T], layer.gates_TK[counted_T], layer.experts_TK[counted_T])
            for layer in routing
        ]
    return torch.stack([_layer_loss(layer) for layer in routing]).mean()


def _layer_loss(layer: Routing) -> Tensor:
    tokens, expert_count = layer.logits_TE.shape
    top_k = layer.experts_TK.shape[1]
    share_E = torch.bincount(layer.experts_TK.flatten(), minlength=expert_count) / max(1, tokens)
    probability_E = layer.logits_TE.float().softmax(dim=-1).sum(dim=0) / max(1, tokens)
    return expert_count / top_k * (share_E * probability_E).sum()


def expert_load_LE(routing: list[Routing]) -> Tensor:
    """Share of routed assignments that each expert receives, per layer; a balanced expert has 1 / E."""
    counts = [torch.bincount(layer.experts_TK.flatten(), minlength=layer.logits_TE.shape[1]) for layer in routing]
    return torch.stack([count / count.sum() for count in counts])
