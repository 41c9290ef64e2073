"""How a gated expert combines its gate and up projections, by family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GatedActivation = Callable[[Tensor, Tensor], Tensor]  # gate [T, C], up [T, C] -> channel activations h [T, C]


@dataclass(frozen=True)
class Gated:
    """``h = act(gate) * up``, of nearly every family."""

    act_fn: Callable[[Tensor], Tensor]

    def __call__(self, gate_TC: Tensor, up_TC: Tensor) -> Tensor:
        return self.act_fn(gate_TC) * up_TC


@dataclass(frozen=True)
class ClampedSwish:
    """``h = (up + 1) gate sigmoid(alpha gate)`` with gate <= limit and |up| <= limit: GPT-OSS."""

    alpha: float
    limit: float

    def __call__(self, gate_TC: Tensor, up_TC: Tensor) -> Tensor:
        gate_TC = gate_TC.clamp(max=self.limit)
        up_TC = up_TC.clamp(min=-self.limit, max=self.limit)
        return (up_TC + 1) * (gate_TC * torch.sigmoid(gate_TC * self.alpha))


def gated_activation(experts: Any) -> GatedActivation:
    """The activation of a family's experts module, or of pruned experts."""
    if hasattr(experts, "activation"):
        return experts.activation
    if hasattr(experts, "alpha") and hasattr(experts, "limit"):
        return ClampedSwish(float(experts.alpha), float(experts.limit))
    return Gated(experts.act_fn)
