"""Finds the Mixture-of-Experts layers of any supported model by their structure, not by their names or config.

Axis letters: E routed experts, C intermediate channels of an expert, H hidden size, T tokens, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import ModelError


@dataclass(frozen=True)
class MoeLayer:
    """One decoder layer that holds routed experts, with the modules that the rest of the package works on.

    ``router(h_TH)`` returns ``(logits_TE, gates_TK, experts_TK)``: the gates are what the family finally applies, after
    top-k, renormalisation and scaling. ``experts(h_TH, experts_TK, gates_TK)`` returns the routed output ``m_TH``.
    """

    name: str  # of the experts module in the model
    decoder_layer: nn.Module
    router: Any
    experts: Any

    @property
    def expert_count(self) -> int:
        """Rows of the router."""
        return len(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Intermediate channels of what each router row leads to; all equal before pruning."""
        if hasattr(self.experts, "row_widths"):
            return tuple(self.experts.row_widths)
        return self.stored_widths

    @property
    def stored_widths(self) -> tuple[int, ...]:
        """Intermediate channels of each expert that is stored; merged ones count once."""
        if hasattr(self.experts, "widths"):
            return tuple(self.experts.widths)
        expert_count, _, width = self.experts.down_proj.shape
        return (width,) * expert_count

    @property
    def hidden_size(self) -> int:
        return int(self.router.weight.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.router.top_k)

    @property
    def routes_by_group(self) -> bool:
        """Whether the router first chooses groups of neighbouring experts; one expert less would shift the others."""
        grouped = (getattr(self.router, "num_group", None) or 1) > 1
        return grouped and getattr(self.router, "topk_method", None) != "greedy"


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """All MoE layers from first to last.

    Raises ModelError when the model has none: looked for is a module with a 3-D ``down_proj`` [E, H, C] and a fused
    ``gate_up_proj`` [E, 2C, H] beside a router with ``weight`` [E, H] and ``top_k``.
    """
    found = []
    for layer_name, layer in decoder_layers(model):
        for block_name, block in layer.named_modules():
            children = dict(block.named_children())
            experts = next((name for name, child in children.items() if _holds_routed_experts(child)), None)
            router = next((child for child in children.values() if _is_router(child)), None)
            if experts is not None and router is not None:
                name = ".".join(part for part in (layer_name, block_name, experts) if part)
                found.append(MoeLayer(name, layer, router, children[experts]))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no routed experts that this version can prune.\n"
            "Looked for: a decoder layer with an experts module (gate_up_proj [E, 2C, H], down_proj [E, H, C]) beside "
            "a router (weight [E, H], top_k).\nUse a checkpoint of the Qwen-MoE or DeepSeek families."
        )
    return found


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of all decoder layers, with and without routed experts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] == "layers":
            for index, layer in enumerate(module):
                yield f"{name}.{index}", layer


def _holds_routed_experts(module: nn.Module) -> bool:
    if hasattr(module, "widths"):
        return True
    down = getattr(module, "down_proj", None)
    gate_up = getattr(module, "gate_up_proj", None)
    if not (isinstance(down, Tensor) and isinstance(gate_up, Tensor) and down.dim() == gate_up.dim() == 3):
        return False
    return gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]


def _is_router(module: nn.Module) -> bool:
    return hasattr(module, "top_k") and isinstance(getattr(module, "weight", None), Tensor)


@torch.no_grad()
def keep_router_rows(router: Any, live: Tensor) -> None:
    """Keep the rows and per-expert biases of a router for the experts in ``live`` (int64 indices), in place."""
    expert_count = router.weight.shape[0]
    for name, values in [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]:
        if values.shape[:1] == (expert_count,):
            rows = values[live.to(values.device)]
            setattr(router, name, nn.Parameter(rows) if isinstance(values, nn.Parameter) else rows)
    router.num_experts = len(live)


@dataclass(frozen=True)
class Routing:
    """What one router decided for one batch: logits [T, E], gates [T, K], chosen experts [T, K]."""

    logits_TE: Tensor
    gates_TK: Tensor
    experts_TK: Tensor


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Within the context, every router call appends its Routing to the list, in layer order; hooks go at the end."""
    seen: list[Routing] = []
    hooks = [
        layer.router.register_forward_hook(lambda _module, _inputs, output: seen.append(Routing(*output)))
        for layer in moe_layers(model)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
