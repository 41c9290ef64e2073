"""Routers: which modules are one, and how one loses rows."""

from typing import Any

import torch
from torch import Tensor, nn


def is_router(module: nn.Module) -> bool:
    """Whether a module chooses experts: it has ``top_k`` and a ``weight``."""
    return hasattr(module, "top_k") and isinstance(getattr(module, "weight", None), Tensor)


@torch.no_grad()
def keep_router_rows(router: Any, live: Tensor) -> None:
    """Keep the rows and per-expert biases of a router for the experts in ``live`` (int64 indices), in place.

    A bias may lie in a module of its own and have a leading axis of 1, as ERNIE's has.
    """
    expert_count = router.weight.shape[0]
    for module in router.modules():
        for name, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            axis = next((axis for axis in range(values.dim()) if values.shape[axis] == expert_count), None)
            if axis is None or values.shape[:axis].numel() != 1:
                continue
            rows = values.index_select(axis, live.to(values.device))
            kept = nn.Parameter(rows, requires_grad=values.requires_grad) if isinstance(values, nn.Parameter) else rows
            setattr(module, name, kept)
    for count in ("num_experts", "n_routed_experts", "out_features"):
        if getattr(router, count, None) == expert_count:
            setattr(router, count, len(live))
