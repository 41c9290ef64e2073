"""One experiment: everything a run needs to know, as plain objects."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from moeprune.allocation.budget import Budget
from moeprune.calibration.sample import Calibration
from moeprune.calibration.statistics import Statistics
from moeprune.errors import InputError
from moeprune.evaluation.evaluate import Evaluation
from moeprune.models.shape import read_shape
from moeprune.models.source import ModelSource
from moeprune.types import Plan, Scores

Scorer = Callable[[Statistics], Scores]
Allocator = Callable[[Scores, Budget], Plan]
ModelTransform = Callable[[PreTrainedModel], PreTrainedModel]


@dataclass(frozen=True)
class Experiment:
    """Model -> calibration -> scorer -> allocator at ``ratio`` -> recovery -> quantizer -> evaluation.

    ``ratio`` is the fraction of routed-expert channels to remove. ``recovery`` and ``quantizer`` may be None.
    """

    model: ModelSource
    calibration: Calibration
    scorer: Scorer
    allocator: Allocator
    ratio: float
    evaluation: Evaluation
    recovery: ModelTransform | None = None
    quantizer: ModelTransform | None = None

    def check(self) -> None:
        """Raise InputError, BudgetError or ModelError for what is bound to fail, before anything is computed."""
        _ = self.model.placement
        if getattr(self.allocator, "needs_channel_scores", False) and not getattr(self.scorer, "scores_channels", True):
            raise InputError(
                f"{type(self.allocator).__name__} needs a score for every channel; {type(self.scorer).__name__} ranks "
                "whole experts only.",
                change="Use allocator=whole_experts, or a channel scorer such as scorer=attribution.",
            )
        self.budget()

    def budget(self) -> Budget:
        """What ``ratio`` leaves on this model; needs its headers only.

        Raises InputError or BudgetError for a request that the model or the allocator cannot meet.
        """
        limits = {"alignment": self.model.alignment, "minimum_width": self.model.minimum_width}
        budget = Budget.for_model(read_shape(self.model.folder()), ratio=self.ratio, **limits)
        check = getattr(self.allocator, "check", None)
        if check is not None:
            check(budget)
        return budget
