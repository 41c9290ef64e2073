"""One experiment: everything a run needs to know, as plain objects."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from moeprune.allocation.budget import Budget
from moeprune.calibration.passes import CalibrationPass
from moeprune.calibration.sample import Calibration
from moeprune.calibration.statistics import Statistics
from moeprune.calibration.windows import TokenWindows
from moeprune.evaluation.evaluate import Evaluation
from moeprune.models.layers.streaming import Model
from moeprune.models.layers.workspace import Workspace
from moeprune.models.shape import ExpertShape, read_shape
from moeprune.models.source import ModelSource
from moeprune.pipeline.compatibility import check_compatible, check_passes, check_router_rows, check_whole_model
from moeprune.surgery.cut import Cut
from moeprune.surgery.prune import FinishedLayer
from moeprune.types import Plan, Scores

Scorer = Callable[..., Scores]  # statistics, then the result of each pass it asks for
Allocator = Callable[[Scores, Budget], Plan]
Surgery = Callable[[Model, Plan, Statistics, TokenWindows, int, Workspace], Iterator[FinishedLayer]]
Recovery = Callable[[PreTrainedModel], PreTrainedModel]
Quantizer = Callable[[Model, Workspace], Iterator[FinishedLayer]]


@dataclass(frozen=True)
class Experiment:
    """Model -> calibration -> scorer -> allocator at ``ratio`` -> surgery -> recovery -> quantizer -> evaluation.

    ``ratio`` is the fraction of routed-expert channels to remove. ``recovery`` and ``quantizer`` may be None. Experts
    that fewer than ``fewest_tokens`` calibration tokens reach are warned of.
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
    fewest_tokens: int = 32

    @property
    def passes(self) -> tuple[CalibrationPass, ...]:
        """What the scorer asks for beyond the statistics of routed tokens."""
        return tuple(getattr(self.scorer, "passes", ()))

    def check(self) -> None:
        """Raise InputError, BudgetError or ModelError for what is bound to fail, before anything is computed."""
        _ = self.model.placement
        check_compatible(self.scorer, self.allocator, self.surgery)
        shape = self._shape()
        check_passes(self.passes, shape, self.model.computation_dtype)
        if any(getattr(wanted, "needs_whole_model", False) for wanted in self.passes):
            check_whole_model(self.scorer, self.model.streams())
        check_router_rows(self.allocator, self.surgery, shape, self.budget())
        self.evaluation.check(self.model.tokenizer())

    def budget(self) -> Budget:
        """What ``ratio`` leaves on this model; needs its headers only.

        Raises InputError or BudgetError for a request that the model or the allocator cannot meet.
        """
        limits = {"alignment": self.model.alignment, "minimum_width": self.model.minimum_width}
        budget = Budget.for_model(self._shape(), ratio=self.ratio, **limits)
        check = getattr(self.allocator, "check", None)
        if check is not None:
            check(budget)
        return budget

    def _shape(self) -> ExpertShape:
        return read_shape(self.model.folder())
