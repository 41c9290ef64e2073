"""Finds the Mixture-of-Experts layers of any supported model by their structure, not by their names or config.

Axis letters: E routed experts, C intermediate channels of an expert, H hidden size, T tokens, K experts per token.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import ModelError
from moeprune.models.runtime.activations import gated_activation
from moeprune.models.runtime.router import is_router


@dataclass(frozen=True)
class MoeLayer:
    """One decoder layer that holds routed experts, with the modules that the rest of the package works on.

    ``router(h_TH)`` returns ``(logits_TE, gates_TK, experts_TK)``: the gates are what the family finally applies, after
    top-k, renormalisation and scaling. ``experts(h_TH, experts_TK, gates_TK)`` returns the routed output ``m_TH``. How
    the weights lie: `moeprune.models.runtime.contract`.
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
    def gates_inputs(self) -> bool:
        """Whether gates scale what goes into an expert (Llama 4), not what comes out of it."""
        return bool(getattr(self.experts, "gates_inputs", False))

    @property
    def output_scale(self) -> float:
        """What the decoder layer multiplies the routed output with before it adds it (GraniteMoE, MiniMax)."""
        for name in ("residual_multiplier", "mlp_beta_factor"):
            if hasattr(self.decoder_layer, name):
                return float(getattr(self.decoder_layer, name))
        return 1.0

    @property
    def routes_by_group(self) -> bool:
        """Whether the router first chooses groups of neighbouring experts; one expert less would shift the others."""
        grouped = (getattr(self.router, "num_group", None) or 1) > 1
        return grouped and getattr(self.router, "topk_method", None) != "greedy"


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """All MoE layers from first to last.

    Raises ModelError when the model has none: looked for is a module with a 3-D ``down_proj`` [E, H, C] and a fused
    ``gate_up_proj`` [E, 2C, H] beside a router with ``weight`` [E, H] and ``top_k``; also where such a block computes
    something else than the contract says.
    """
    found, refused = [], []
    for layer_name, layer in decoder_layers(model):
        for block_name, block in layer.named_modules():
            children = dict(block.named_children())
            experts = next((name for name, child in children.items() if _holds_routed_experts(child)), None)
            router = next((child for child in children.values() if is_router(child)), None)
            if experts is not None and router is not None:
                name = ".".join(part for part in (layer_name, block_name, experts) if part)
                found.append(MoeLayer(name, layer, router, children[experts]))
                refused += [f"{name}: {breach}" for breach in _breaches(router, children[experts])]
    if refused or not found:
        raise ModelError(
            f"{type(model).__name__} has no routed experts that this version can prune.\n"
            "Looked for: a decoder layer with an experts module (gate_up_proj [E, 2C, H], down_proj [E, H, C]) beside "
            f"a router (weight [E, H], top_k).\nFound: {'; '.join(refused[:2]) or _candidates(model)}.\n"
            "Families that can be pruned: docs/model.md lists them."
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


def _breaches(router: Any, experts: Any) -> Iterator[str]:
    """What a block whose weights look right does otherwise than the contract says."""
    parameters = inspect.signature(router.forward).parameters.values()
    if len([each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]) > 1:
        yield f"{type(router).__name__} wants more than hidden states to route by"
    if getattr(experts, "has_post_expert_norm", False):
        yield f"{type(experts).__name__} normalises what its experts give"
    if hasattr(experts, "_apply_gate") and not _gates_as_expected(experts):
        yield f"{type(experts).__name__} does not compute act(gate) * up"


def _gates_as_expected(experts: Any) -> bool:
    """Whether `gated_activation` is what the family computes, on values of both signs, beyond any clamp too."""
    gate_up = torch.linspace(-20, 20, 98, dtype=torch.float32, device="cpu").roll(31)
    try:
        theirs, ours = experts._apply_gate(gate_up), gated_activation(experts)(*gate_up.chunk(2))
    except (AttributeError, TypeError):  # another way to call it, or none of one name
        return False
    return torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5)


def _candidates(model: nn.Module) -> str:
    """The blocks that hold something like experts, for a message."""
    kinds = {type(module).__name__ for module in model.modules() if "expert" in type(module).__name__.lower()}
    layers = len(list(decoder_layers(model)))
    return f"{layers} decoder layers" + (f", and modules named {', '.join(sorted(kinds))}" if kinds else "")


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
