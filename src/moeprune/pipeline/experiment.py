"""One experiment: everything a run needs to know, as plain objects."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moeprune.allocation.budget import Budget
from moeprune.calibration.passes import CalibrationPass
from moeprune.calibration.sample import Calibration
from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.errors import InputError
from moeprune.evaluation.evaluate import Evaluation, Part
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import Workspace
from moeprune.models.shape import ExpertShape
from moeprune.models.source import ModelSource
from moeprune.pipeline.compatibility import (
    check_compatible,
    check_lengths,
    check_passes,
    check_router_rows,
    check_whole_model,
)
from moeprune.pipeline.order import PRUNE, QUANTIZE, RECOVER, check_after_pruning, check_order, check_places
from moeprune.surgery.cut import Cut
from moeprune.surgery.prune import FinishedLayer
from moeprune.types import Plan, Scores

Scorer = Callable[..., Scores]  # statistics, then the result of each pass it asks for
Allocator = Callable[[Scores, Budget], Plan]
Surgery = Callable[[Model, Plan, Statistics, TokenWindows, int, Workspace], Iterator[FinishedLayer]]
Loader = Callable[[], PreTrainedModel]
# How to load the model, and the dense one; the tokenizer; a folder that survives an interruption.
Recovery = Callable[[Loader, Callable[[], Model], PreTrainedTokenizerBase, Path], PreTrainedModel]
Quantizer = Callable[[Model, TokenWindows | None, int, Workspace], Iterator[FinishedLayer]]


@dataclass(frozen=True)
class Experiment:
    """Model -> calibration -> scorer -> allocator at ``ratio`` -> surgery -> recovery -> quantizer -> evaluation.

    ``ratio`` is the fraction of routed-expert channels to remove. ``recovery`` and ``quantizer`` may be None; ``order``
    says which of them comes first. Experts that fewer than ``fewest_tokens`` calibration tokens reach are warned of.
    """

    model: ModelSource
    calibration: Calibration
    scorer: Scorer
    allocator: Allocator
    ratio: float
    evaluation: Evaluation
    surgery: Surgery = field(default_factory=Cut)
    recovery: Recovery | None = None
    quantizer: Quantizer | None = None
    order: Sequence[str] = (PRUNE, RECOVER, QUANTIZE)
    fewest_tokens: int = 32

    @property
    def passes(self) -> tuple[CalibrationPass, ...]:
        """What the scorer asks for beyond the statistics of routed tokens."""
        return tuple(getattr(self.scorer, "passes", ()))

    @property
    def after_pruning(self) -> list[tuple[str, Any]]:
        """(stage, what does it) for the stages that follow the cut, in order; those without a choice are left out."""
        chosen = {RECOVER: self.recovery, QUANTIZE: self.quantizer}
        return [(stage, chosen[stage]) for stage in self.order if chosen.get(stage) is not None]

    def check(self) -> list[Part]:
        """The parts of the evaluation. Raises InputError, BudgetError or ModelError for what is bound to fail, before
        anything is computed."""
        _ = self.model.placement
        self.check_on(self._shape(), self.model.context())
        check_after_pruning(self.after_pruning, self.model.folder())
        if any(getattr(wanted, "needs_whole_model", False) for wanted in self.passes):
            check_whole_model(self.scorer, self.model.streams())
        if self.evaluation.speed is not None and self.model.streams():
            raise InputError(
                "evaluation.speed times models in memory, and the layers of this one stay on disk.",
                change="Set evaluation.speed=null, or, where the model does fit, model.streaming=never.",
            )
        tokenizer = self.model.tokenizer()
        parts = self.evaluation.check(tokenizer, self.model.streams())
        check_recovery = getattr(self.recovery, "check", None)
        if check_recovery is not None:
            check_recovery(tokenizer)
        return parts

    def check_on(self, shape: ExpertShape, context: int | None) -> None:
        """Raise InputError or BudgetError for what is bound to fail on experts of this shape, in a model that sees
        ``context`` tokens at once; needs no checkpoint."""
        check_order(self.order)
        check_places(self.after_pruning)
        check_compatible(self.scorer, self.allocator, self.surgery)
        check_passes(self.passes, shape, self.model.computation_dtype)
        check_lengths(self._lengths(), context)
        check_router_rows(self.allocator, self.surgery, shape, self.budget_on(shape))

    def budget(self) -> Budget:
        """What ``ratio`` leaves on this model; needs its headers only.

        Raises InputError or BudgetError for a request that the model or the allocator cannot meet.
        """
        return self.budget_on(self._shape())

    def budget_on(self, shape: ExpertShape) -> Budget:
        """What ``ratio`` leaves of experts of this shape. Raises as `budget` does."""
        limits = {"alignment": self.model.alignment, "minimum_width": self.model.minimum_width}
        budget = Budget.for_model(shape, ratio=self.ratio, **limits)
        check = getattr(self.allocator, "check", None)
        if check is not None:
            check(budget)
        return budget

    def _lengths(self) -> dict[str, int]:
        """The sequence lengths by the names of their settings."""
        data = getattr(self.recovery, "data", None)
        users = {"calibration": self.calibration, "evaluation": self.evaluation, "training_data": data}
        lengths = {name: getattr(user, "sequence_length", None) for name, user in users.items()}
        return {f"{name}.sequence_length": length for name, length in lengths.items() if length is not None}

    def _shape(self) -> ExpertShape:
        return self.model.shape()
