"""Recovery: a compressed model is trained a little further, and comes back as one that can be written.

    training text -> windows -> (the dense model's logits) -> training -> merged, or adapters beside the weights

What a killed run needs to go on lies in a folder ``walk`` of the stage's own, which is no part of the result.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeprune.errors import InputError
from moeprune.models.compressed.adapters import adapter_names, adapts_quantized, merge_adapters, parameters_of_adapters
from moeprune.models.compressed.files import save_text
from moeprune.models.compressed.low_rank import remembered_norms
from moeprune.models.layers.streaming import Model
from moeprune.recovery.stored import check_stored, difference, logits_of, precisions, round_as_stored
from moeprune.training.data import LabelledWindows
from moeprune.training.distributed import launch
from moeprune.training.fine_tuning import FineTuning, fit
from moeprune.training.learner import ParameterGroup
from moeprune.training.steps import Objective
from moeprune.training.tasks import require_as_many_tasks

WALK, TRAINING, WINDOWS = "walk", "training", "windows.safetensors"
DETAILS, LOSS_CURVE = "recovery.json", "loss_curve.jsonl"
CHECKED_WINDOWS = 4


class Weights(Protocol):
    """What of a model trains.

    ``adds_adapters``: it is beside the weights, and has to be merged or kept. ``needs_unquantized``: it is the
    weights, and quantised ones cannot train.
    """

    adds_adapters: Any
    needs_unquantized: Any

    def attach(self, model: PreTrainedModel, seed: int) -> None:
        """Prepare the model in place; what trains requires gradients."""

    def groups(self, model: nn.Module) -> list[ParameterGroup]:
        """What trains, with its learning rates."""


@dataclass(frozen=True)
class Recovery:
    """Trains ``weights`` of a model on ``data`` for ``objective``.

    With ``merge`` adapters become part of the weights, without they stay beside them; None does the first but for
    adapters on quantised weights, where only the second is possible. ``dtype`` is what the result will be stored in. An
    objective with a method ``prepare(windows, dense, folder)`` is replaced by what that returns.
    """

    name: str
    weights: Weights
    objective: Any
    data: Callable[[PreTrainedTokenizerBase], LabelledWindows]
    training: FineTuning
    dtype: str
    merge: bool | None = None

    @property
    def merges(self) -> bool:
        """Whether the result has no adapters, where the weights are not quantised."""
        return self.merge is not False or not self.weights.adds_adapters

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError for training data that is bound to fail, where it can tell, and for tasks left idle."""
        require_as_many_tasks(self.training.devices)
        check = getattr(self.data, "check", None)
        if check is not None:
            check(tokenizer)

    def check_quantized_base(self) -> None:
        """Raise InputError where this recovery cannot work on quantised weights."""
        if self.weights.needs_unquantized:
            raise InputError(
                f"recovery={self.name} trains all weights, and quantised ones cannot train.",
                change="Use order=[prune,recover,quantize], or adapters: recovery=dora.",
            )
        if self.weights.adds_adapters and self.merge:
            raise InputError(
                f"The adapters of recovery={self.name} cannot be merged into a quantised base.",
                change="Use recovery.merge=null, or order=[prune,recover,quantize].",
            )

    def __call__(
        self,
        load: Callable[[], PreTrainedModel],
        dense: Callable[[], Model],
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
    ) -> PreTrainedModel:
        """The model that ``load`` gives, recovered; in ``folder`` it leaves ``recovery.json`` and ``loss_curve.jsonl``.

        ``dense`` gives the dense model, for objectives that learn from it. Called again with the folder of a killed
        run, it goes on there. Raises NumericalError when training diverges, InputError or ModelError when the model
        cannot be trained so, ModelError when storing the result changes what it computes.
        """
        walk = folder / WALK
        walk.mkdir(exist_ok=True)
        windows, objective = self._windows(tokenizer, walk), self.objective
        if hasattr(objective, "prepare"):
            objective = objective.prepare(windows, dense, walk / "teacher")
        if self.training.devices > 1:
            launch(_train_from, (self, load, windows, objective, walk / TRAINING), self.training.devices)
        model = load()
        computing = precisions(model)
        self._train(model, windows, objective, walk / TRAINING, devices=1)  # what several have trained, it reads back
        details = _describe(self.weights.groups(model))
        details |= self._store(model.eval(), computing, windows.take(CHECKED_WINDOWS))
        shutil.copyfile(walk / TRAINING / LOSS_CURVE, folder / LOSS_CURVE)
        save_text(folder / DETAILS, json.dumps(details | _summary(folder / LOSS_CURVE), indent=1))
        return model

    def _windows(self, tokenizer: PreTrainedTokenizerBase, walk: Path) -> LabelledWindows:
        """The training data, made once."""
        file = walk / WINDOWS
        if not file.exists():
            partial = file.with_suffix(".partial")
            self.data(tokenizer).save(partial)
            partial.rename(file)
        return LabelledWindows.load(file)

    def _train(
        self, model: PreTrainedModel, windows: LabelledWindows, objective: Objective, folder: Path, devices: int
    ) -> None:
        self.weights.attach(model, self.training.seed)
        groups = self.weights.groups(model)
        _check_types(model, groups, self.training.precision)
        settings = self.training if devices > 1 else replace(self.training, devices=1, strategy="auto")
        with remembered_norms():
            fit(model, groups, windows, objective, settings, folder)

    def _store(
        self, model: PreTrainedModel, computing: Mapping[str, torch.dtype], windows: LabelledWindows
    ) -> dict[str, Any]:
        """Make the trained model what will be stored, in place; says how far its logits moved."""
        dtype = getattr(torch, self.dtype)
        trained_NTV = logits_of(model, windows)
        keep = adapts_quantized(model) if self.merge is None else not self.merge
        if self.weights.adds_adapters and not keep:
            merge_adapters(model)
        round_as_stored(model.requires_grad_(False), dtype, computing)
        moved = difference(trained_NTV, logits_of(model, windows))
        check_stored(moved["stored_difference"], model.dtype, dtype)
        return {"merged": not adapter_names(model), **moved}


def _train_from(
    recovery: Recovery,
    load: Callable[[], PreTrainedModel],
    windows: LabelledWindows,
    objective: Objective,
    folder: Path,
) -> None:
    """What each of several processes does."""
    recovery._train(load(), windows, objective, folder, recovery.training.devices)


def _check_types(model: PreTrainedModel, groups: Sequence[ParameterGroup], precision: str) -> None:
    """Raise InputError where weights of one type would meet activations of another; PEFT casts for its adapters."""
    added = {id(value) for value in parameters_of_adapters(model).values()}
    trained = {value.dtype for group in groups for value in group.parameters if id(value) not in added}
    if trained - {model.dtype} and not precision.endswith("-mixed"):
        raise InputError(
            f"recovery.training.precision={precision} cannot train single weights of a model in {model.dtype}.",
            change="Use recovery.training.precision=bf16-mixed, or model.compute_dtype=float32.",
        )


def _describe(groups: Sequence[ParameterGroup]) -> dict[str, Any]:
    return {
        "trained_parameters": sum(parameter.numel() for group in groups for parameter in group.parameters),
        "learning_rates": {group.name: group.learning_rate for group in groups},
    }


def _summary(curve: Path) -> dict[str, Any]:
    """Steps, tokens, seconds and loss at the end of the curve, and the lowest loss on held-out windows."""
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    last = lines[-1]
    held_out = [line["validation_loss"] for line in lines if line.get("validation_loss") is not None]
    return {
        **({"lowest_validation_loss": min(held_out)} if held_out else {}),
        "steps": last["step"],
        "training_tokens": last["tokens"],
        "seconds": last["seconds"],
        "final_loss": last["loss"],
    }
