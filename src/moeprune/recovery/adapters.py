"""Recovery by low-rank adapters on the routed experts and the routers; the model's own weights stay as they are."""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from moeprune.errors import InputError, require_positive
from moeprune.models.adapter import moe_layers
from moeprune.models.compressed.adapters import adapter_parameters, attach_adapters
from moeprune.training.learner import ParameterGroup, require_rate

EXPERTS, ROUTERS = "experts", "routers"


@dataclass(frozen=True)
class Adapters:
    """LoRA (2106.09685), or with ``use_dora`` DoRA (2402.09353), on gate, up and down of every expert; LoRA on routers.

    W becomes ``W + (alpha / rank) B A``, and with DoRA its rows are scaled to learnt magnitudes besides. ``dropout`` is
    of what goes into the experts' adapters. ``router_rank`` 0 leaves the routers alone. The paper (2606.18304) takes
    DoRA of rank 32, alpha 192, dropout 0.05 at 1e-4, and for routers LoRA of rank 4, alpha 16 at 1e-6. Experts without
    channels have no adapter.

    Raises InputError for settings that cannot be.
    """

    rank: int
    alpha: float
    dropout: float
    use_dora: bool
    learning_rate: float
    router_rank: int
    router_alpha: float
    router_learning_rate: float

    adds_adapters: ClassVar[bool] = True
    needs_unquantized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_positive(self, "rank")
        require_rate(EXPERTS, self.learning_rate)
        require_rate(ROUTERS, self.router_learning_rate)
        if self.router_rank < 0 or not 0 <= self.dropout < 1:
            raise InputError(
                f"recovery.weights.router_rank={self.router_rank} and recovery.weights.dropout={self.dropout} are not "
                "possible together.",
                change="Use a router_rank of 0 (none) or more, and a dropout from 0 up to, but not including, 1.",
            )

    def attach(self, model: PreTrainedModel, seed: int) -> None:
        """Put the adapters on a pruned, perhaps quantised model, in place; A is drawn from ``seed``, B is 0."""
        configs = {EXPERTS: self._for_experts(model)}
        if self.router_rank:
            configs[ROUTERS] = self._for_routers(model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            attach_adapters(model, configs)

    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        """The experts' adapters and the routers', each at its own learning rate."""
        rates = {EXPERTS: self.learning_rate, ROUTERS: self.router_learning_rate}
        found = {name: list(adapter_parameters(model, name).values()) for name in rates}
        return [ParameterGroup(name, parameters, rates[name]) for name, parameters in found.items() if parameters]

    def _for_experts(self, model: nn.Module) -> LoraConfig:
        layers = moe_layers(model)
        widths = {re.escape(layer.name): layer.stored_widths for layer in layers}
        empty = [rf"{name}\.{slot}\..*" for name, of in widths.items() for slot, width in enumerate(of) if not width]
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_dora=self.use_dora,
            target_modules=rf"(?:{'|'.join(widths)})\.\d+\.(?:gate|up|down)_proj",
            exclude_modules="|".join(empty) or None,
            task_type="CAUSAL_LM",
        )

    def _for_routers(self, model: nn.Module) -> LoraConfig:
        routers = {id(layer.router) for layer in moe_layers(model)}
        return LoraConfig(
            r=self.router_rank,
            lora_alpha=self.router_alpha,  # type: ignore[arg-type]
            target_modules=[],
            target_parameters=[f"{name}.weight" for name, module in model.named_modules() if id(module) in routers],
            task_type="CAUSAL_LM",
        )
