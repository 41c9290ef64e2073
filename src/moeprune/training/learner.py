"""A model being trained: on its devices, with its optimizer, and the state that a checkpoint keeps of both."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moeprune.errors import InputError
from moeprune.training.distributed import broadcast_from_first

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate (the highest of the schedule); the loss curve has it under ``name``.

    Raises InputError for a rate that is negative or not finite: AdamW would climb, or end in NaN.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require_rate(self.name, self.learning_rate)


def require_rate(name: str, rate: float) -> None:
    """Raise InputError for a learning rate that is negative or not finite."""
    if not 0 <= rate < math.inf:
        raise InputError(
            f"The learning rate of {name} is {rate}, which is not possible.", change="Use a number such as 1e-4."
        )


@dataclass(frozen=True)
class Learner:
    """A model on its devices, and the parameters of it that train, by name, in the optimizer's order."""

    fabric: "Fabric"
    module: Any
    optimizer: Any
    parameters: Mapping[str, nn.Parameter]

    @property
    def scaler_state(self) -> dict[str, Any]:
        """How losses are scaled in float16; empty otherwise."""
        return self.fabric.strategy.precision.state_dict()

    def values(self) -> dict[str, Tensor]:
        """Whole values of what trains, on the CPU; every process must call it."""
        return {name: _whole(parameter.detach()) for name, parameter in self.parameters.items()}

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.detach().copy_(_spread_like(values[name], parameter))

    def optimizer_values(self) -> dict[str, Tensor]:
        """``NAME/KEY`` -> the optimizer's state of a parameter, whole, on the CPU; every process must call it."""
        states = self.optimizer.optimizer.state_dict()["state"]
        names = list(self.parameters)
        return {f"{names[index]}/{key}": _whole(value) for index in states for key, value in states[index].items()}

    def set_optimizer_values(self, values: Mapping[str, Tensor]) -> None:
        states: dict[int, dict[str, Tensor]] = {}
        index_of = {name: index for index, name in enumerate(self.parameters)}
        for path, value in values.items():
            name, _, key = path.rpartition("/")
            like = self.parameters[name]
            spread = value if value.dim() == 0 else _spread_like(value, like)
            states.setdefault(index_of[name], {})[key] = spread
        optimizer = self.optimizer.optimizer
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def learner_for(
    model: nn.Module, groups: Sequence[ParameterGroup], fabric: "Fabric", *, betas: tuple[float, float]
) -> Learner:
    """The model with AdamW for the groups' parameters; all others stop to train (``requires_grad`` is off).

    All processes start with the values of the first.

    Raises InputError when no parameter is to train, or one is in two groups or not in the model.
    """
    names_of = _names(model, groups)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(True)
    broadcast_from_first([parameter for group in groups for parameter in group.parameters], fabric)
    module = fabric.setup_module(model)
    # FSDP puts other parameters in their places.
    now = dict(model.named_parameters())
    settings = [
        {
            "params": [now[name] for name in names],
            "name": group.name,
            "lr": group.learning_rate,
            "highest": group.learning_rate,
            "weight_decay": group.weight_decay,
        }
        for group, names in zip(groups, names_of, strict=True)
        if names
    ]
    # The fused one undoes the scaling of losses itself, too late for the clipping of gradients.
    fused = not getattr(fabric.strategy.precision, "scaler", None)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(settings, betas=betas, fused=fused))
    return Learner(fabric, module, optimizer, {name: now[name] for names in names_of for name in names})


def _names(model: nn.Module, groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """The names of each group's parameters."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    uses = Counter(id(parameter) for group in groups for parameter in group.parameters)
    if not uses:
        raise InputError("No parameter is to train.", change="Choose another recovery, or weights that the model has.")
    for group in groups:
        for parameter in group.parameters:
            if id(parameter) not in name_of:
                raise InputError(f"The group {group.name} has a parameter {tuple(parameter.shape)} of another model.")
            if uses[id(parameter)] > 1:
                raise InputError(f"{name_of[id(parameter)]} is more than once in the groups that train.")
    return [[name_of[id(parameter)] for parameter in group.parameters] for group in groups]


def _whole(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to("cpu", copy=True).contiguous()


def _spread_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
