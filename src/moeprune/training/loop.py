"""Language-model training of random weights: warm-up, constant rate, linear decay; goes on exactly where it was cut."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moeprune.training.data import WindowMixture
from moeprune.training.distributed import fabric_for
from moeprune.training.learner import ParameterGroup, learner_for
from moeprune.training.run import Run, Schedule
from moeprune.training.steps import Steps


@dataclass(frozen=True)
class TrainingSettings:
    """Optimisation settings; every length is in optimizer steps, every window in tokens."""

    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    decay_fraction: float
    weight_decay: float
    gradient_clip: float
    balance_weight: float
    seed: int
    checkpoint_every: int = 100
    log_every: int = 20


def rate_factor(step: int, settings: TrainingSettings) -> float:
    """Learning rate relative to its peak: linear warm-up, constant, linear decay to 0 over the last fraction."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    decay_steps = max(1, math.ceil(settings.steps * settings.decay_fraction))
    return min(warm, max(0.0, (settings.steps - step) / decay_steps))


def train(model: nn.Module, windows: WindowMixture, settings: TrainingSettings, run_dir: Path) -> nn.Module:
    """Train in place until ``settings.steps``; goes on from the last of ``run_dir/checkpoints`` where there is one.

    A GPU is used where there is one; the model stays on it.

    Raises NumericalError when the loss is not finite; the last checkpoint then stays.
    """
    size = settings.batch_size
    steps = Steps(
        windows=windows,
        items_of_step=lambda step: range(step * size, (step + 1) * size),
        micro_batch_size=size,
        objective=_mean_loss,
        balance_weight=settings.balance_weight,
        rate_factor=lambda step: rate_factor(step, settings),
        gradient_clip=settings.gradient_clip,
        seed=settings.seed,
    )
    schedule = Schedule(settings.steps, settings.log_every, settings.checkpoint_every)
    fabric = fabric_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    learner = learner_for(model, _groups(model, settings), fabric, betas=(0.9, 0.95))
    Run(learner, steps, schedule, run_dir, asdict(settings)).complete()
    return model


def _mean_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss per token as transformers gives it; all windows are equally long, so it counts once per batch."""
    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
    return {"loss": loss, "targets": torch.ones((), device=loss.device)}


def _groups(model: nn.Module, settings: TrainingSettings) -> list[ParameterGroup]:
    """Weights decay, but not those of norms and biases."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    return [
        ParameterGroup("matrices", matrices, settings.learning_rate, settings.weight_decay),
        ParameterGroup("vectors", vectors, settings.learning_rate),
    ]
