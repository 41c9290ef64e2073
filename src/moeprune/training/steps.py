"""One optimizer step: gradients summed over micro-batches and devices, divided by the labels of the whole step."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, default_collate

from moeprune.errors import InputError, NumericalError
from moeprune.models.adapter import recorded_routing
from moeprune.training.balance import load_balancing_loss
from moeprune.training.data import read_tokens, target_tokens
from moeprune.training.learner import Learner

# ``(model, batch) -> {"loss": sum over the labels that count, "targets": how many they are, any other term: a sum}``.
# The batch has what the windows have, stacked. The loss is made smaller, all terms are in the loss curve.
Objective = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]

# float16 losses are scaled up, and down again by 2 for each step with infinite gradients; below this it is no accident.
SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Steps:
    """What every step of a run does. ``items_of_step(step)`` are the windows it takes, ``rate_factor(step)`` is the
    learning rate relative to its highest; steps count from 0.

    With a ``balance_weight`` (0 also), the load-balancing loss of each micro-batch is in the loss curve, and
    ``balance_weight`` times it is added to the loss per label.
    """

    windows: Dataset[dict[str, Tensor]]
    items_of_step: Callable[[int], Sequence[int]]
    micro_batch_size: int
    objective: Objective
    balance_weight: float | None
    rate_factor: Callable[[int], float]
    gradient_clip: float
    seed: int


def take_step(steps: Steps, learner: Learner, step: int) -> dict[str, float]:
    """Train on the windows of one step; returns means per label, ``tokens`` (labels), and ``gradient_norm``.

    The result is the same, up to rounding, for any micro-batch size and number of devices; but dropout draws once per
    micro-batch, from a seed of the run's seed, the step and the micro-batch's number. The balance loss is about one
    micro-batch.

    Raises NumericalError for a loss or gradient that is not finite; no parameter has then changed.
    """
    for group in learner.optimizer.param_groups:
        group["lr"] = group["highest"] * steps.rate_factor(step)
    learner.optimizer.zero_grad()
    sums = _backward(steps, learner, step)
    targets = max(1.0, sums.pop("targets"))
    tokens = sums.pop("tokens")
    means = {name: value / targets for name, value in sums.items()}
    _require_finite("loss", means["loss"], step, learner)
    norm = _clip(steps, learner, learner.fabric.world_size / targets)
    if not learner.scaler_state:
        _require_finite("gradients' norm", norm, step, learner)
    learner.optimizer.step()
    if learner.scaler_state.get("scale", 1.0) < SMALLEST_SCALE:
        _require_finite("gradients' norm", math.inf, step, learner)
    return {**means, "tokens": tokens, "gradient_norm": norm}


@torch.no_grad()
def mean_loss(steps: Steps, learner: Learner, items: Sequence[int], step: int) -> float:
    """The objective's loss per label on some windows, without dropout. Raises NumericalError where it is not finite."""
    learner.module.eval()
    micro_batches = _micro_batches(steps, learner, items)
    terms = [
        {name: counts * value for name, value in steps.objective(learner.module, batch).items()}
        for _, counts, batch in micro_batches
    ]
    learner.module.train()
    sums = _sums(learner, [{"loss": term["loss"], "targets": term["targets"]} for term in terms])
    loss = sums["loss"] / max(1.0, sums["targets"])
    _require_finite("validation loss", loss, step, learner)
    return loss


def _backward(steps: Steps, learner: Learner, step: int) -> dict[str, float]:
    """Leave the gradient of the summed loss, a mean over devices; returns the sums of all terms over all devices."""
    micro_batches = list(_micro_batches(steps, learner, steps.items_of_step(step)))
    all_terms = []
    for number, counts, batch in micro_batches:
        last = batch is micro_batches[-1][2]
        torch.manual_seed(_seed_of(steps.seed, step, number))
        with learner.fabric.no_backward_sync(learner.module, enabled=not last):
            terms, minimised = _terms(steps, learner.module, batch)
            learner.fabric.backward(counts * minimised)
        all_terms.append({name: counts * value.detach() for name, value in terms.items()})
    return _sums(learner, all_terms)


def _terms(steps: Steps, module: nn.Module, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The terms of one micro-batch, and what is to become smaller.

    Routers are only listened to in the forward pass: gradient checkpointing calls them once more in the backward pass.
    """
    tokens = target_tokens(batch).sum()
    if steps.balance_weight is None:
        terms = steps.objective(module, batch)
        return {**terms, "tokens": tokens}, terms["loss"]
    with recorded_routing(module) as routing:
        terms = steps.objective(module, batch)
    balance = load_balancing_loss(routing, read_tokens(batch)) * terms["targets"]
    return {**terms, "balance": balance, "tokens": tokens}, terms["loss"] + steps.balance_weight * balance


def _micro_batches(
    steps: Steps, learner: Learner, items: Sequence[int]
) -> Iterator[tuple[int, float, dict[str, Tensor]]]:
    """(number, whether it counts, batch) of this device's micro-batches.

    All devices have equally many, as they wait for each other: where some would have none left they repeat one, which
    counts 0 times.
    """
    size, devices = steps.micro_batch_size, learner.fabric.world_size
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    for first in range(0, len(parts), devices):
        place = first + learner.fabric.global_rank
        number = place % len(parts)
        batch: Any = learner.fabric.to_device(default_collate([steps.windows[item] for item in parts[number]]))
        yield number, float(place < len(parts)), batch


def _sums(learner: Learner, terms: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The sum of each term over micro-batches and devices."""
    names = list(terms[0])
    of_device = torch.stack([sum(term[name].double() for term in terms) for name in names])  # type: ignore[misc]
    of_all = learner.fabric.all_reduce(of_device, reduce_op="sum")
    return dict(zip(names, of_all.tolist(), strict=True))  # type: ignore[union-attr]


def _clip(steps: Steps, learner: Learner, factor: float) -> float:
    """Multiply all gradients, then clip them to their norm over all groups; returns the norm before."""
    gradients = []
    for parameter in learner.parameters.values():
        # That of an expert without tokens: as if it had none at all, AdamW would leave it alone on this device only.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if factor != 1:
        torch._foreach_mul_(gradients, factor)
    norm: Any = learner.fabric.clip_gradients(
        learner.module, learner.optimizer, max_norm=steps.gradient_clip, error_if_nonfinite=False
    )
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _require_finite(name: str, value: float, step: int, learner: Learner) -> None:
    if math.isfinite(value):
        return
    rates = ", ".join(f"{group['name']} {group['lr']:.3g}" for group in learner.optimizer.param_groups)
    raise NumericalError(f"The {name} is {value} at step {step}; lower the learning rate (now: {rates}).")


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def require_enough_micro_batches(batch_size: int, micro_batch_size: int, devices: int) -> None:
    """Raise InputError when a step has less than one micro-batch for each device."""
    if batch_size < (devices - 1) * micro_batch_size + 1:
        raise InputError(
            f"batch_size={batch_size} in micro-batches of {micro_batch_size} leaves some of {devices} devices idle.",
            change=f"Use a batch_size of {devices * micro_batch_size} or more, or a smaller micro_batch_size.",
        )
