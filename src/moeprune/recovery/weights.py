"""Recovery by training the model's own weights: all that pruning left, or the routers'.

What trains is in float32, so that steps smaller than 16 bits can tell add up; afterwards it is rounded once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from moeprune.models.adapter import moe_layers
from moeprune.training.learner import ParameterGroup, require_rate


@dataclass(frozen=True)
class AllWeights:
    """Every weight trains. AdamW takes 16 bytes a parameter: in float32 the weight, its gradient and two moments."""

    learning_rate: float

    adds_adapters: ClassVar[bool] = False
    needs_unquantized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_rate("all weights", self.learning_rate)

    def attach(self, model: PreTrainedModel, seed: int) -> None:
        """Make all weights of a model without quantised ones trainable, in float32, in place."""
        _train_only(model, model.parameters())

    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        """One group of everything."""
        return [ParameterGroup("all weights", list(model.parameters()), self.learning_rate)]


@dataclass(frozen=True)
class Routers:
    """The routers train, everything else stays: the model learns to choose among the experts that are left."""

    learning_rate: float

    adds_adapters: ClassVar[bool] = False
    needs_unquantized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_rate("routers", self.learning_rate)

    def attach(self, model: PreTrainedModel, seed: int) -> None:
        """Make the routers trainable, in float32, in place; other weights may be quantised."""
        _train_only(model, _of_routers(model))

    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        """One group of all routers."""
        return [ParameterGroup("routers", _of_routers(model), self.learning_rate)]


def _of_routers(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for layer in moe_layers(model) for parameter in layer.router.parameters()]


def _train_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    trained = list(parameters)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)
