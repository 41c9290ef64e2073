"""Fine-tuning of chosen parameters on labelled windows, on one device or several."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moeprune.errors import InputError, require_choice, require_positive
from moeprune.training.data import LabelledWindows
from moeprune.training.distributed import fabric_for
from moeprune.training.learner import ParameterGroup, learner_for
from moeprune.training.run import Run, Schedule
from moeprune.training.steps import Objective, Steps, require_enough_micro_batches

PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")
SCHEDULES = ("cosine", "constant")
BETAS = (0.9, 0.999)
# What may be another when a run goes on: it changes the result by rounding and what dropout draws, or not at all.
FREE = (
    "micro_batch_size", "gradient_checkpointing", "devices", "strategy", "checkpoint_every_steps",
    "checkpoint_every_min",
)  # fmt: skip
FREE_IN_THE_CURVE = ("log_every",)  # also this; but its curve is another


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune: AdamW, linear warm-up, then a half cosine to 0 (or a constant rate).

    ``batch_size`` windows are one optimizer step, over all devices and micro-batches; of an epoch's last step, those
    that are left. Warm-up is ``warmup_ratio`` of all steps, rounded up; its first step has a rate above 0, unlike in
    transformers. ``gradient_clip`` bounds the norm over all groups. ``balance_weight`` times the load-balancing loss
    of each micro-batch is added to the loss per label.

    ``precision``: ``32-true`` and ``bf16-true`` compute in the types of the weights, the ``-mixed`` ones in 16 bits
    where PyTorch's autocast does. Parameters that train are float32, but for ``bf16-true``.

    ``validation_windows`` are held out, evenly spread over the windows; ``patience`` is how many measurements in a row,
    one every ``validate_every_steps`` steps, may pass without a new lowest loss on them. With patience, training ends
    with the parameters of the lowest; without, with the last.

    ``strategy`` says how several ``devices`` share the work: ``ddp`` (``auto``) or ``fsdp``. The defaults are those of
    arXiv 2606.18304.

    Raises InputError for values that cannot work.
    """

    epochs: int = 2
    batch_size: int = 64
    micro_batch_size: int = 8
    warmup_ratio: float = 0.1
    schedule: str = "cosine"
    gradient_clip: float = 0.5
    weight_decay: float = 0.0
    balance_weight: float = 0.0
    precision: str = "32-true"
    gradient_checkpointing: bool = False
    checkpoint_every_steps: int = 50
    checkpoint_every_min: float | None = 10.0
    log_every: int = 10
    validation_windows: int = 0
    validate_every_steps: int = 50
    patience: int | None = None
    devices: int = 1
    strategy: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "micro_batch_size", "checkpoint_every_steps", "log_every", "devices")
        require_positive(self, *counts, "validate_every_steps", *(("patience",) if self.patience is not None else ()))
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("strategy", self.strategy, STRATEGIES)
        require_choice("schedule", self.schedule, SCHEDULES)
        require_enough_micro_batches(self.batch_size, self.micro_batch_size, self.devices)
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"warmup_ratio={self.warmup_ratio} is not possible.", change="Use 0 to 1.")
        if not (self.gradient_clip > 0 and self.weight_decay >= 0 and self.balance_weight >= 0):
            raise InputError(
                f"gradient_clip={self.gradient_clip}, weight_decay={self.weight_decay}, "
                f"balance_weight={self.balance_weight} are not possible together.",
                change="Use a gradient_clip above 0 (inf for none), and weights of 0 or more.",
            )
        for name in ("seed", "validation_windows"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} is not possible.", change="Use 0 or more.")
        if self.patience is not None and self.validation_windows < 1:
            raise InputError("patience needs windows to measure on.", change="Set validation_windows, or no patience.")

    def identity(self) -> dict[str, object]:
        """What results depend on, for cache keys; so that a run which was cut, as for want of memory, may go on with
        other micro-batches, devices and checkpoints."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


def fit(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    windows: LabelledWindows,
    objective: Objective,
    settings: FineTuning,
    folder: Path,
) -> None:
    """Train the groups' parameters in place; all others have ``requires_grad`` off and stay as they are.

    ``folder`` gets ``loss_curve.jsonl`` and ``checkpoints``, from which a run that was killed goes on; one that is
    finished is only read back. Lines of the curve: ``step``, ``loss`` and the objective's other terms (means per
    label, of the steps since the last line), ``validation_loss`` where it was measured, ``gradient_norm`` (before
    clipping, of the last step), ``learning_rate`` of each group, ``tokens`` (labels so far), ``seconds`` (so far).

    One device is the one that the parameters are on. Several are for a function that `launch` calls, where every
    process has the same model; under ``fsdp`` that is spread over them afterwards. So let the launched processes only
    train, and call this once more with ``devices=1`` for the same folder: it reads back what they trained.

    Raises InputError when nothing is left to train or to train on, or a parameter has too few bits for its precision;
    NumericalError when the loss or the gradients stop being finite: the checkpoints, all from before that, stay.
    """
    _require_precise(groups, settings.precision)
    training, held_out = _held_out(len(windows), settings.validation_windows)
    fabric = fabric_for(
        _device(groups, settings.strategy),
        devices=settings.devices,
        strategy=settings.strategy,
        precision=settings.precision,
    )
    steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
    groups = [replace(group, weight_decay=settings.weight_decay) for group in groups]
    with _training_mode(model, settings.gradient_checkpointing):
        Run(
            learner_for(model, groups, fabric, betas=BETAS),
            _steps(settings, windows, training, objective, steps),
            _schedule(settings, held_out, steps),
            folder,
            _identity(settings, groups, windows),
        ).complete()


def _steps(
    settings: FineTuning, windows: LabelledWindows, training: np.ndarray, objective: Objective, steps: int
) -> Steps:
    return Steps(
        windows=windows,
        items_of_step=partial(items_of_step, training, settings.batch_size, settings.seed),
        micro_batch_size=settings.micro_batch_size,
        objective=objective,
        balance_weight=settings.balance_weight or None,
        rate_factor=partial(rate_factor, settings.schedule, steps, math.ceil(settings.warmup_ratio * steps)),
        gradient_clip=settings.gradient_clip,
        seed=settings.seed,
    )


def _schedule(settings: FineTuning, held_out: np.ndarray, steps: int) -> Schedule:
    return Schedule(
        steps=steps,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every_steps,
        checkpoint_every_min=settings.checkpoint_every_min,
        held_out=held_out.tolist(),
        validate_every=settings.validate_every_steps,
        patience=settings.patience,
    )


def items_of_step(items: np.ndarray, batch_size: int, seed: int, step: int) -> list[int]:
    """The windows of a step: a new permutation of the items for each epoch, ``batch_size`` after ``batch_size``."""
    epoch, place = divmod(step, math.ceil(len(items) / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(len(items))
    return items[order[place * batch_size : (place + 1) * batch_size]].tolist()


def rate_factor(schedule: str, steps: int, warmup_steps: int, step: int) -> float:
    """Learning rate relative to its highest: ``(step + 1) / warmup_steps``, then ``(1 + cos(pi x)) / 2`` or 1; x goes
    from 0 to 1 in the steps after the warm-up."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2


def _held_out(count: int, validation_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the windows to train on, and of those held out: evenly spread, as windows may be sorted."""
    if not 0 <= validation_windows < count:
        raise InputError(
            f"validation_windows={validation_windows} of {count} windows leaves none to train on.",
            change=f"Use 0 to {count - 1}.",
        )
    held_out = np.arange(validation_windows) * count // max(1, validation_windows)
    return np.setdiff1d(np.arange(count), held_out), held_out


def _device(groups: Sequence[ParameterGroup], strategy: str) -> torch.device:
    """Where the parameters are. FSDP shards a model that lies in CPU memory, as it may be too large for one GPU."""
    if strategy == "fsdp" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return next((parameter.device for group in groups for parameter in group.parameters), torch.device("cpu"))


def _require_precise(groups: Sequence[ParameterGroup], precision: str) -> None:
    """Updates of a usual size are lost in 16 bits."""
    dtypes = {str(parameter.dtype): parameter.dtype for group in groups for parameter in group.parameters}
    few_bits = [name for name, dtype in dtypes.items() if dtype.itemsize < 4]
    if few_bits and precision != "bf16-true":
        raise InputError(
            f"precision={precision} wants float32 for the parameters that train, and some are {few_bits[0]}.",
            change="Load the model in float32 (model.compute_dtype), train adapters, or use precision=bf16-true.",
        )


@contextmanager
def _training_mode(model: Any, gradient_checkpointing: bool) -> Iterator[None]:
    """Within the context the model trains, and computes activations again instead of keeping them where asked to."""
    if gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"{type(model).__name__} has no gradient checkpointing.", change="Turn it off.")
    was_training = model.training
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if gradient_checkpointing:
            model.activation_checkpointing_disable()
        model.train(was_training)


def _identity(settings: FineTuning, groups: Sequence[ParameterGroup], windows: LabelledWindows) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    kept = {name: value for name, value in settings.identity().items() if name not in FREE_IN_THE_CURVE}
    shapes = {group.name: [list(parameter.shape) for parameter in group.parameters] for group in groups}
    return {
        **kept,
        "learning_rates": {group.name: group.learning_rate for group in groups},
        "parameters": {name: [len(of_group), sum(map(math.prod, of_group))] for name, of_group in shapes.items()},
        "windows": [*windows.input_ids_NT.shape, windows.target_count],
    }
